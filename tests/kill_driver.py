"""A run that commits some tasks and then waits to be killed.

``python kill_driver.py SHARDS OUTPUT DETECTOR CALLS LIMIT ALGORITHM`` scores on one slot, a task
for each shard, and waits for ever in the one after LIMIT. CALLS is an empty directory of its own.
"""

import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

from scoring import score_into

import spark_nsfw.spark.output
from spark_nsfw import ImageClassifier, NsfwClassifier, TimmImageEmbedder


class Gate(ImageClassifier):
    """Leaves a file for each shard that it scores, and lets only so many pass."""

    def __init__(self, calls=None, limit=0):
        super().__init__("gate", pred_column="gate")
        self._calls = calls
        self._limit = limit

    def load_model(self, device):
        def score(embeddings):
            if self._calls is not None:
                (Path(self._calls) / str(uuid.uuid4())).touch()
                if len(list(Path(self._calls).iterdir())) > self._limit:
                    time.sleep(3600)
            return embeddings[:, 0]

        return score


def embedder(detector, gate):
    classifiers = [NsfwClassifier(model_path=detector), gate]
    return TimmImageEmbedder("test_vit", embedding_size=768, classifiers=classifiers)


def committing_by(algorithm):
    """Makes runs of this process commit by one algorithm of Hadoop's file committer."""
    original = spark_nsfw.spark.output.committer_of

    def committer_of(spark, url):
        committer = original(spark, url)
        version = {"mapreduce.fileoutputcommitter.algorithm.version": algorithm}
        return replace(committer, options=committer.options | version)

    return committer_of


def main(shards, output, detector, calls, limit, algorithm):
    from pyspark.sql import SparkSession

    spark = (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.session.timeZone", "UTC")
        .getOrCreate()
    )
    spark_nsfw.spark.output.committer_of = committing_by(algorithm)
    gated = embedder(detector, Gate(calls, int(limit)))
    score_into(spark, shards, output, gated, plan="fused", device="cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
