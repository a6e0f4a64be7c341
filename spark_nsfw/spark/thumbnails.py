"""Samples → thumbnails of their images, read from the shards by Spark's tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
from pyspark.sql import SparkSession

from spark_nsfw.read.source import ImageSource
from spark_nsfw.spark.stores import on_workers
from spark_nsfw.use.thumbnails import UnitSamples, iter_thumbnails

__all__ = ["draw_thumbnails"]


def draw_thumbnails(
    spark: SparkSession, units: Sequence[UnitSamples], source: ImageSource
) -> dict[tuple[str, str], bytes]:
    """JPEGs of those images that can still be read, by shard and key.

    Args:
        spark: classic or Connect.
        units: from `spark_nsfw.use.thumbnails.samples_by_unit`.
        source: what was scored.
    """
    samples = "array<struct<key: string, offset: bigint, num_bytes: bigint>>"
    tasks = spark.createDataFrame(units, f"shard string, url string, samples {samples}")

    def draw(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                wanted = [(w["key"], w["offset"], w["num_bytes"]) for w in row["samples"]]
                found = dict(iter_thumbnails((row["shard"], row["url"], wanted), source))
                arrays = [
                    pa.array([row["shard"]] * len(found), pa.string()),
                    pa.array(found.keys(), pa.string()),
                    pa.array(found.values(), pa.binary()),
                ]
                yield pa.RecordBatch.from_arrays(arrays, names=["shard", "key", "jpeg"])

    found = tasks.repartition(max(1, len(units))).mapInArrow(
        on_workers(draw), "shard string, key string, jpeg binary"
    )
    return {(row.shard, row.key): bytes(row.jpeg) for row in found.collect()}
