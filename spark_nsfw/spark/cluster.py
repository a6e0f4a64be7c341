"""What a session's cluster has: slots, executors, and pools of Python workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["is_reader", "num_executors", "num_slots", "reader_workers"]

#: Slots where nobody tells how many there are, as through Spark Connect.
_SLOTS_UNKNOWN = 16

_ROLE_VARIABLE, _READER = "SPARK_NSFW_ROLE", "reader"

#: The environment is the context's, and threads share that.
_lock = threading.RLock()


def num_slots(spark: SparkSession) -> int:
    """Tasks that run at a time: what the cores allow, or the GPUs if those are fewer.

    Counts executors that have registered; with dynamic allocation there may be more later.
    """
    if not hasattr(spark, "_jsparkSession"):
        return _SLOTS_UNKNOWN
    context, conf = spark.sparkContext, spark.sparkContext.getConf()
    slots = context.defaultParallelism // int(conf.get("spark.task.cpus", "1"))
    gpus = int(conf.get("spark.executor.resource.gpu.amount", "0"))
    per_task = float(conf.get("spark.task.resource.gpu.amount", "0"))
    if gpus and per_task:
        # Tasks may share a GPU; none has parts of two.
        per_executor = gpus * int(1 / per_task) if per_task < 1 else int(gpus / per_task)
        slots = min(slots, max(1, num_executors(spark)) * per_executor)
    return max(1, slots)


def num_executors(spark: SparkSession) -> int:
    """Executors that have registered, or as many as were asked for if those are more."""
    context: Any = spark.sparkContext
    registered = len(context._jsc.sc().statusTracker().getExecutorInfos()) - 1  # and the driver
    return max(registered, int(context.getConf().get("spark.executor.instances", "0")))


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
        context.environment[_ROLE_VARIABLE] = _READER
        try:
            yield
        finally:
            del context.environment[_ROLE_VARIABLE]


def is_reader() -> bool:
    """Whether this process is a Python worker of `reader_workers`, or starts such workers."""
    return os.environ.get(_ROLE_VARIABLE) == _READER
