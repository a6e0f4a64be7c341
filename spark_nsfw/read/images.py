"""A row of metadata → its image: one request for its bytes, wherever in the shard they lie."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pandas as pd

from spark_nsfw.errors import InputError, ShardUnreadableError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.tar import split_name
from spark_nsfw.schema import IMAGE_NUM_BYTES, IMAGE_OFFSET, KEY, LOCATION_COLUMNS, SHARD, STATUS
from spark_nsfw.storage import RetryingFile

__all__ = ["read_image", "read_located"]

#: Of a name in a tar's header; longer ones stand in a header of their own.
_MAX_NAME_BYTES = 100


def read_image(
    row: Any,
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | ShardInputs,
) -> bytes:
    """Read the encoded image of one row of metadata, and nothing else of its shard.

    Args:
        row: with ``shard``, ``key``, ``image_offset`` and ``image_num_bytes``: a Row of
            Spark, a Series of pandas, or a mapping.
        shards: what the rows were made from, as it was given then: a directory, tar file, glob
            or brace range, or several.

    Returns:
        The bytes as they are in the shard, whatever the row's ``status``.

    Raises:
        InputError: the row does not say where its image is; or there is no such shard.
        ShardUnreadableError: the shard has changed since: the image is not there.
        StorageError: it cannot be read now.
    """
    values = row.asDict() if hasattr(row, "asDict") else row
    missing = [name for name in (SHARD, KEY, *LOCATION_COLUMNS) if name not in values]
    if missing:
        raise InputError(
            f"the row has no {', '.join(missing)}: `spark-nsfw score` writes these columns for tar "
            "shards, but not into outputs that were begun with 0.1.0. A row of a folder or a table "
            "tells the file or the table's row by shard and key (docs/inputs.md)"
        )
    shard, key = values[SHARD], values[KEY]
    offset, num_bytes = values[IMAGE_OFFSET], values[IMAGE_NUM_BYTES]
    if pd.isna(offset) or pd.isna(num_bytes):
        status = values.get(STATUS)
        raise InputError(
            f"{shard}/{key} has no image in its shard" + (f": {status}" if status else "")
        )
    inputs = shards if isinstance(shards, ShardInputs) else ShardInputs.parse(shards)
    url = inputs.place_of(shard)
    try:
        file = RetryingFile(url)
    except FileNotFoundError as exc:
        raise InputError(f"{url} does not exist: give what was scored as shards") from exc
    with closing(file):
        return read_located(file, key, int(offset), int(num_bytes))


def read_located(file: RetryingFile, key: str, offset: int, num_bytes: int) -> bytes:
    """The content of a member of a tar.

    Args:
        file: the tar.
        key: of the member's sample.
        offset: where its content begins.
        num_bytes: of its content.

    Raises:
        ShardUnreadableError: the tar has no such member there.
        StorageError: it cannot be read now.
    """
    start = offset - tarfile.BLOCKSIZE
    if start >= 0 and offset + num_bytes <= file.size:
        content = file.read_at(start, tarfile.BLOCKSIZE + num_bytes)
        if _is_header_of(content[: tarfile.BLOCKSIZE], key, num_bytes):
            return content[tarfile.BLOCKSIZE :]
    raise ShardUnreadableError(
        f"{file.url} has no image of {num_bytes:,} bytes of sample {key!r} at byte {offset:,}: it "
        "has changed since it was scored"
    )


def _is_header_of(block: bytes, key: str, num_bytes: int) -> bool:
    """Whether a block is the header of a member of this size, of this key as far as it tells."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.TarError:
        return False
    # A size beyond 8 GiB, and a name that is long or not ASCII, stand in an earlier header.
    if info.size != num_bytes:
        return False
    is_told = key.isascii() and len(key) < _MAX_NAME_BYTES - 40
    return not is_told or (split_name(info.name) or ("",))[0] == key
