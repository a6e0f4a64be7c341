"""Samples → thumbnails of their images, read from the shards by Spark's tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.spark.stores import on_workers
from spark_nsfw.use.thumbnails import iter_thumbnails, samples_by_shard

__all__ = ["draw_thumbnails"]


def draw_thumbnails(
    spark: SparkSession, samples: Iterable[tuple[str, str]], inputs: ShardInputs
) -> dict[tuple[str, str], bytes]:
    """JPEGs of those images that can still be read, by shard and key; a shard is read once.

    Args:
        spark: classic or Connect.
        samples: shard and key of each.
        inputs: where the shards are.

    Raises:
        InputError: a shard is not among the inputs.
    """
    shards = samples_by_shard(samples, inputs)
    tasks = spark.createDataFrame(shards, "shard string, url string, keys array<string>")
    found = tasks.repartition(max(1, len(shards))).mapInArrow(
        on_workers(_draw), "shard string, key string, jpeg binary"
    )
    return {(row.shard, row.key): bytes(row.jpeg) for row in found.collect()}


def _draw(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Shards and keys → thumbnails of those images that can still be read."""
    for batch in batches:
        for row in batch.to_pylist():
            found = dict(iter_thumbnails(row["url"], row["keys"]))
            arrays = [
                pa.array([row["shard"]] * len(found), pa.string()),
                pa.array(found.keys(), pa.string()),
                pa.array(found.values(), pa.binary()),
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=["shard", "key", "jpeg"])
