"""WebDataset shards → DataFrame of samples with image bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyspark.sql import DataFrame, SparkSession

from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS, SampleOptions, ShardSource
from spark_nsfw.read.tar import MAX_MEMBER_BYTES
from spark_nsfw.spark.stores import adopt_stores
from spark_nsfw.spark.units import sample_rows

__all__ = ["read_webdataset"]


def read_webdataset(
    spark: SparkSession,
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    id_col: str = "key",
    columns: Sequence[str] | None = None,
    captions: bool = False,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
    max_image_bytes: int = MAX_MEMBER_BYTES,
) -> DataFrame:
    """Read WebDataset shards: one row per sample, with its encoded image.

    Args:
        spark: classic or Connect.
        path: directory, tar file, glob or brace range such as ``{00000..00099}.tar``,
            or several of them.
        id_col: the column of sidecar Parquet and JSON that holds the sample id.
        columns: which of the dataset's own columns to keep; None keeps all, () none.
        captions: keep the ``.txt`` member as column ``caption``.
        image_extensions: which members are images; the first that a sample has wins.
        max_image_bytes: larger members give a row with status ``member_oversized``.

    Returns:
        Columns ``shard``, ``key``, [``caption``], the dataset's own columns, ``image_offset`` and
        ``image_num_bytes`` (bigint, where in its shard the encoded image lies), ``status``,
        ``error_message``, ``image`` (binary, null unless ``status`` is ``ok``).

    Raises:
        InputError: no shards, a missing shard or column, or two shards of one name.
        StorageError: a shard cannot be read now.
    """
    adopt_stores(spark)
    options = SampleOptions(
        image_extensions=tuple(image_extensions),
        captions=captions,
        id_col=id_col,
        max_image_bytes=max_image_bytes,
    )
    source = ShardSource(ShardInputs.parse(path), options, columns)
    units = source.units()
    return sample_rows(spark, units, source, source.schema(units=units))
