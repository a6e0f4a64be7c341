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
import os
import sys

from spark_nsfw.spark.cluster import is_reader
from spark_nsfw.spark.early import EARLY, hand_over, take_over

__all__: list[str] = []


def _import_all() -> None:
    """Import what workers need."""
    gc.disable()  # looking at what was just imported would take 0.7 s
    import pandas  # noqa: F401  # what Spark's own workers import
    import pyarrow  # noqa: F401

    if is_reader():
        import spark_nsfw.spark.units
    else:
        import spark_nsfw.spark.worker  # noqa: F401  # torch, timm and the scorers
    gc.enable()
    gc.collect()
    gc.freeze()


def _is_the_daemon() -> bool:
    """Whether this process is to fork the workers, once it has imported all."""
    if sys.argv[1:2] == [EARLY]:
        return take_over(sys.argv[2], _import_all)
    if not is_reader() and hand_over():
        return False
    _import_all()
    return True


if __name__ == "__main__":
    if _is_the_daemon():
        from pyspark.daemon import manager

        manager()
    os._exit(0)  # libraries of torch would tell what they leave behind
