"""Shard URLs → DataFrame of samples with image bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import unquote

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from spark_nsfw.errors import InputError
from spark_nsfw.read.columns import SHARDS_FOR_COLUMNS, infer_from_first
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS, SampleOptions, iter_sample_batches
from spark_nsfw.read.tar import MAX_MEMBER_BYTES
from spark_nsfw.spark.pools import reader_workers
from spark_nsfw.spark.types import spark_schema

__all__ = ["SHARD_SOURCE_OPTIONS", "list_shards", "read_samples", "read_webdataset"]

#: Spark's binaryFile source lists shards, below directories too, and opens none of
#: them as long as only ``path`` is selected.
SHARD_SOURCE_OPTIONS = {"pathGlobFilter": "*.tar", "recursiveFileLookup": "true"}


def shard_paths(spark: SparkSession, inputs: ShardInputs) -> DataFrame:
    """One row per shard, column ``path``; small shards share a partition."""
    reader = spark.read.format("binaryFile").options(**SHARD_SOURCE_OPTIONS)
    return reader.load(inputs.glob).select("path")


def list_shards(spark: SparkSession, inputs: ShardInputs) -> list[str]:
    """The paths of all shards, sorted.

    Raises:
        InputError: there are none, one that was named is missing, or two have one name.
    """
    try:
        urls = shard_paths(spark, inputs).inputFiles()
    except Exception as exc:
        if "PATH_NOT_FOUND" not in str(exc):
            raise
        urls = []
    if not urls:
        raise InputError(
            f"{', '.join(inputs.patterns)} does not exist, or has no shard (*.tar) in it"
        )
    paths = sorted(unquote(url).replace("file:///", "file:/") for url in urls)
    inputs.check(paths)
    return paths


def settle_columns(
    spark: SparkSession,
    shards: Sequence[str],
    id_col: str,
    columns: Sequence[str] | None,
    captions: bool = False,
) -> tuple[pa.Field, ...]:
    """The dataset's own columns, found by an executor in the first shard that has any.

    Shards that are empty or damaged have none; a few are tried.

    Raises:
        InputError: a wanted column is not there, or no sidecar can be used.
    """
    if columns is not None and not columns:
        return ()
    tried = list(shards[:SHARDS_FOR_COLUMNS])

    def infer(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            try:
                fields = infer_from_first(tried, id_col, columns, captions)
                found, problem = pa.schema(fields).serialize().to_pybytes().hex(), None
            except Exception as exc:  # told by the driver, without a worker's traceback
                found, problem = None, str(exc)
            arrays = [pa.array([found], pa.string()), pa.array([problem], pa.string())]
            yield pa.RecordBatch.from_arrays(arrays, names=["schema", "problem"])

    with reader_workers(spark):
        row = spark.range(1, numPartitions=1).mapInArrow(infer, "schema string, problem string")
        answer = row.collect()[0]
    if answer["problem"] is not None:
        raise InputError(answer["problem"])
    return tuple(pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(answer["schema"]))))


def read_samples(paths: DataFrame, inputs: ShardInputs, options: SampleOptions) -> DataFrame:
    """Paths of shards → one row per sample with its image bytes."""
    with reader_workers(paths.sparkSession):
        return paths.mapInArrow(_sample_reader(inputs, options), spark_schema(options.schema))


def _sample_reader(
    inputs: ShardInputs, options: SampleOptions
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return iter_sample_batches(iter_shards(batches, inputs), options)

    return read


def iter_shards(
    batches: Iterable[pa.RecordBatch], inputs: ShardInputs
) -> Iterator[tuple[str, str]]:
    """Rows with a shard's ``path`` → (path, shard name)."""
    for batch in batches:
        for path in batch.column("path").to_pylist():
            yield path, inputs.shard_name(path)


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
        Columns ``shard``, ``key``, [``caption``], the dataset's own columns, ``status``,
        ``error_message``, ``image`` (binary, null unless ``status`` is ``ok``).

    Raises:
        InputError: no shards, a missing shard or column, or two shards of one name.
    """
    inputs = ShardInputs.parse(path)
    shards = list_shards(spark, inputs)
    options = SampleOptions(
        image_extensions=tuple(image_extensions),
        captions=captions,
        id_col=id_col,
        passthrough=settle_columns(spark, shards, id_col, columns, captions),
        max_image_bytes=max_image_bytes,
    )
    return read_samples(shard_paths(spark, inputs), inputs, options)
