"""Spark's Python daemon with torch and timm imported before it forks workers.

``spark.python.daemon.module spark_nsfw.spark.daemon``: every worker would import them for
itself, which takes seconds, and holds their pages a second time. Nothing here touches CUDA,
which would not survive the fork.

What is imported is kept out of garbage collection: Spark's workers collect after every task,
which would take 0.2 s and copy the pages that they share. Readers have a daemon of their own,
without torch.
"""

from __future__ import annotations

import gc

import pandas  # noqa: F401  # what Spark's own workers import
import pyarrow  # noqa: F401
from pyspark.daemon import manager

from spark_nsfw.spark.cluster import is_reader

if is_reader():
    import spark_nsfw.spark.units
else:
    import spark_nsfw.spark.worker  # noqa: F401  # torch, timm and the scorers

__all__: list[str] = []

if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    manager()
