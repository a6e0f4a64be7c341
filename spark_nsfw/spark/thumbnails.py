"""Samples → thumbnails of their images, read from the shards by Spark's tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
from pyspark.sql import SparkSession

from spark_nsfw.spark.stores import on_workers
from spark_nsfw.use.thumbnails import ShardSamples, iter_thumbnails

__all__ = ["draw_thumbnails"]


def draw_thumbnails(
    spark: SparkSession, shards: Sequence[ShardSamples]
) -> dict[tuple[str, str], bytes]:
    """JPEGs of those images that can still be read, by shard and key.

    Args:
        spark: classic or Connect.
        shards: from `samples_by_shard`.
    """
    samples = "array<struct<key: string, offset: bigint, num_bytes: bigint>>"
    tasks = spark.createDataFrame(shards, f"shard string, url string, samples {samples}")
    found = tasks.repartition(max(1, len(shards))).mapInArrow(
        on_workers(_draw), "shard string, key string, jpeg binary"
    )
    return {(row.shard, row.key): bytes(row.jpeg) for row in found.collect()}


def _draw(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Shards and samples → thumbnails of those images that can still be read."""
    for batch in batches:
        for row in batch.to_pylist():
            samples = [(each["key"], each["offset"], each["num_bytes"]) for each in row["samples"]]
            found = dict(iter_thumbnails(row["url"], samples))
            arrays = [
                pa.array([row["shard"]] * len(found), pa.string()),
                pa.array(found.keys(), pa.string()),
                pa.array(found.values(), pa.binary()),
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=["shard", "key", "jpeg"])
