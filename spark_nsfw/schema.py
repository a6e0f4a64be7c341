"""The columns: what a sample row and a metadata row hold.

One pyarrow schema is the only place where a column is typed; Spark's schema is
derived from it (`spark_nsfw.spark.types`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import pyarrow as pa

__all__ = [
    "CAPTION",
    "CONTRACT_COLUMNS",
    "EMBEDDING_NORM",
    "ERROR_MESSAGE",
    "EXTRA_JSON",
    "IMAGE",
    "IMAGE_NUM_BYTES",
    "IMAGE_OFFSET",
    "KEY",
    "LOCATION_COLUMNS",
    "SCHEMA_PARTITION",
    "SHARD",
    "STATUS",
    "Status",
    "metadata_schema",
    "sample_schema",
    "without_image",
]

SHARD = "shard"
KEY = "key"
STATUS = "status"
ERROR_MESSAGE = "error_message"
IMAGE = "image"
IMAGE_OFFSET = "image_offset"
IMAGE_NUM_BYTES = "image_num_bytes"
CAPTION = "caption"
EXTRA_JSON = "extra_json"

#: L2 norm (float32) of CLIP's projection before it was normalised to the embedding.
EMBEDDING_NORM = "embedding_norm"

#: The partition that holds no rows. Readers guess the type of partition values: if every
#: shard's name were a number, they would read ``00000`` as 0. One name that is no number
#: makes all of them strings, in Spark, pandas, pyarrow and DuckDB alike.
SCHEMA_PARTITION = "__schema__"

#: Names that a shard's own columns may not take; theirs get the prefix ``source_``.
CONTRACT_COLUMNS = (
    SHARD, KEY, STATUS, ERROR_MESSAGE, IMAGE_OFFSET, IMAGE_NUM_BYTES, IMAGE, EXTRA_JSON,
)  # fmt: skip

#: Where in its shard an image lies. Outputs that were begun before 0.2.0 have not got them.
LOCATION_COLUMNS = (IMAGE_OFFSET, IMAGE_NUM_BYTES)


class Status(str, Enum):
    """What became of a sample or, in the last five, of its shard."""

    OK = "ok"
    IMAGE_MISSING = "image_missing"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_OVERSIZED = "image_oversized"
    EMBEDDING_INVALID = "embedding_invalid"
    SCORE_INVALID = "score_invalid"
    MEMBER_DUPLICATED = "member_duplicated"
    MEMBER_OVERSIZED = "member_oversized"
    MEMBER_TRUNCATED = "member_truncated"
    MEMBER_UNREADABLE = "member_unreadable"
    KEY_REPEATED = "key_repeated"
    SHARD_EMPTY = "shard_empty"
    SHARD_UNREADABLE = "shard_unreadable"
    SHARD_TRUNCATED = "shard_truncated"
    SHARD_CRASHED = "shard_crashed"
    SIDECAR_UNREADABLE = "sidecar_unreadable"

    @property
    def is_shard_level(self) -> bool:
        """Whether a row with this status stands for a shard rather than a sample."""
        return self.value.startswith(("shard_", "sidecar_"))


def sample_schema(
    *, captions: bool = False, passthrough: Iterable[pa.Field] = (), locations: bool = True
) -> pa.Schema:
    """The columns of one sample row, as the reader gives it.

    ``shard`` and ``key`` identify the sample (``key`` is null in a row that stands
    for a shard), ``image`` holds the encoded bytes and is null where ``status`` is
    not ``ok``. With ``locations``, ``image_offset`` is the byte of the shard at which the
    encoded image begins, and ``image_num_bytes`` its length; null where it is not there whole.
    """
    return pa.schema(
        [
            pa.field(SHARD, pa.string(), nullable=False),
            pa.field(KEY, pa.string()),
            *([pa.field(CAPTION, pa.string())] if captions else []),
            *passthrough,
            *([pa.field(name, pa.int64()) for name in LOCATION_COLUMNS] if locations else []),
            pa.field(STATUS, pa.string(), nullable=False),
            pa.field(ERROR_MESSAGE, pa.string()),
            pa.field(IMAGE, pa.binary()),
        ]
    )


def without_image(samples: pa.Schema) -> pa.Schema:
    """The columns of a sample row but for ``image``, which travels beside them."""
    return samples.remove(samples.get_field_index(IMAGE))


def metadata_schema(samples: pa.Schema, results: Sequence[pa.Field]) -> pa.Schema:
    """The columns of one metadata row: the sample's without the image, then the results.

    A column that the shard brought along under a result's name gives way to the result.
    """
    taken = {field.name.casefold() for field in results} | {IMAGE}
    own = (field for field in samples if field.name.casefold() not in taken)
    return pa.schema([*own, *results])
