"""Which of Spark's pools of Python workers a function runs in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import SparkSession

__all__ = ["reader_workers"]

_ROLE_VARIABLE = "SPARK_NSFW_ROLE"

#: The environment is the context's, and threads share that.
_lock = threading.RLock()


@contextmanager
def reader_workers(spark: SparkSession) -> Iterator[None]:
    """Functions that are handed to Spark inside run in Python workers of their own.

    Spark pools idle workers by environment, not by function: a worker that read shards
    could be given images to score next, and a second model would be loaded. Spark
    Connect cannot set a worker's environment; there this does nothing.
    """
    context = getattr(spark, "_sc", None)
    if context is None:
        yield
        return
    with _lock:
        context.environment[_ROLE_VARIABLE] = "reader"
        try:
            yield
        finally:
            del context.environment[_ROLE_VARIABLE]
