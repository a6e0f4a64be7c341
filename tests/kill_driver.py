"""Runs that commit some tasks each and then wait to be killed with their driver.

``python kill_driver.py SHARDS DIRECTORY DETECTOR RUN…`` scores once for each RUN, all at the same
time. A RUN such as ``1-3`` writes to DIRECTORY/1-3/out by algorithm 1, a task for each shard, and
lets three tasks pass; the others wait forever.
"""

import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from scoring import score_into

import spark_nsfw.spark.output
from spark_nsfw import ImageClassifier, NsfwClassifier, TimmImageEmbedder


class Gate(ImageClassifier):
    """Takes a ticket for each shard that it scores, and lets only so many pass.

    Args:
        tickets: a directory with a file for each ticket that was taken; None lets all pass.
        limit: how many pass.
    """

    def __init__(self, tickets=None, limit=0):
        super().__init__("gate", pred_column="gate")
        self._tickets = tickets
        self._limit = limit

    def load_model(self, device):
        def score(embeddings):
            if self._tickets is not None and take(self._tickets) >= self._limit:
                time.sleep(3600)
            return embeddings[:, 0]

        return score


def take(tickets):
    """The number of a ticket that nobody else has."""
    number = 0
    while True:
        with suppress(FileExistsError):
            (tickets / str(number)).touch(exist_ok=False)
            return number
        number += 1


def embedder(detector, gate):
    classifiers = [NsfwClassifier(model_path=detector), gate]
    return TimmImageEmbedder("test_vit", embedding_size=768, classifiers=classifiers)


def committing_by(algorithm_of):
    """Makes runs of this process commit by algorithms of Hadoop's file committer.

    Args:
        algorithm_of: for all outputs, or a function of the output.
    """
    original = spark_nsfw.spark.output.committer_of

    def committer_of(spark, url):
        committer = original(spark, url)
        algorithm = algorithm_of(url) if callable(algorithm_of) else algorithm_of
        version = {"mapreduce.fileoutputcommitter.algorithm.version": algorithm}
        return replace(committer, options=committer.options | version)

    return committer_of


def main(shards, directory, detector, *runs):
    from pyspark.sql import SparkSession

    spark = (
        SparkSession.builder.master(f"local[{4 * len(runs)}]")  # a task that waits holds a slot
        .config("spark.ui.enabled", "false")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.python.daemon.module", "spark_nsfw.spark.daemon")
        .config("spark.driver.extraJavaOptions", "-XX:+UseSerialGC -XX:TieredStopAtLevel=1")
        .getOrCreate()
    )
    spark_nsfw.spark.output.committer_of = committing_by(lambda url: Path(url).parent.name[0])

    def run(name):
        place = Path(directory) / name
        gated = embedder(detector, Gate(place / "tickets", int(name[2:])))
        score_into(spark, shards, place / "out", gated, plan="fused", device="cpu")

    threads = [threading.Thread(target=run, args=[name]) for name in runs]
    for thread in threads:
        thread.start()
    for thread in threads:  # a script that ended has no code to be noted
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
