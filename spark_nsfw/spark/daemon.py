"""Spark's Python daemon with torch and timm imported before it forks workers.

``spark.python.daemon.module spark_nsfw.spark.daemon``: every worker would import them for
itself, which takes seconds, and holds their pages a second time. Nothing here touches CUDA,
which would not survive the fork.
"""

from __future__ import annotations

import pandas  # noqa: F401  # what Spark's own workers import
import pyarrow  # noqa: F401
from pyspark.daemon import manager

import spark_nsfw.spark.worker  # noqa: F401  # torch, timm and the scorers

__all__: list[str] = []

if __name__ == "__main__":
    manager()
