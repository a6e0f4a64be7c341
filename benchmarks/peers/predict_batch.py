"""Spark with a plain reader and its ``predict_batch_udf``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.functions import col
from pyspark.sql.types import ArrayType, FloatType, StructType

from benchmarks.peers.models import BATCH_SIZE, Models, Task, batches, cores, images


def main() -> None:
    """Run the task."""
    task = Task.given()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = (
        SparkSession.builder.master(f"local[{cores()}]")
        .config("spark.driver.memory", "4g")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "256")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )

    def read(shards: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for shard in shards:
            for path in shard.column("path").to_pylist():
                for samples in batches(images(path), 256):
                    keys, encoded = zip(*samples, strict=True)
                    columns = [pa.array(keys), pa.array(encoded, pa.binary())]
                    yield pa.RecordBatch.from_arrays(columns, ["key", "image"])

    def predict() -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        models = Models(task)

        def score(encoded: np.ndarray) -> dict[str, np.ndarray]:
            embeddings, scores = models.score([models.pixels(image) for image in encoded])
            return {"image_embedding": embeddings, "nsfw_score": scores}

        return score

    udf = predict_batch_udf(
        predict,
        return_type=StructType()
        .add("image_embedding", ArrayType(FloatType()))
        .add("nsfw_score", FloatType()),
        batch_size=BATCH_SIZE,
    )
    paths = spark.createDataFrame([(path,) for path in task.paths], "path string")
    samples = paths.repartition(cores()).mapInArrow(read, "key string, image binary")
    samples.select("key", udf(col("image")).alias("scored")).select(
        "key", "scored.*"
    ).write.parquet(task.output)


if __name__ == "__main__":
    main()
