"""Spark's settings of object stores, for the Python that reads and writes beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from spark_nsfw.hadoop import PREFIXES, SECRETS, HadoopSettings
from spark_nsfw.storage import settings, use_settings

__all__ = ["adopt_stores", "on_workers"]

#: Where Hadoop keeps what nobody may read in a configuration.
_SECRET_STORE = "hadoop.security.credential.provider.path"

_S3A = "org.apache.hadoop.fs.s3a.S3AFileSystem"

_Task = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def adopt_stores(spark: SparkSession) -> None:
    """From now on, reach stores as this session does.

    Called before files are touched, and before each wave, since session tokens are renewed.
    Through Spark Connect nothing is known of the server's settings: the environment counts.
    """
    jvm: Any = getattr(spark, "_jvm", None) if hasattr(spark, "_jsparkSession") else None
    if jvm is None:
        return
    hadoop: Any = spark._jsparkSession.sessionState().newHadoopConf()
    values = {
        prefix + name: value
        for prefix in PREFIXES
        for name, value in dict(hadoop.getPropsWithPrefix(prefix)).items()
    }
    if hadoop.get(_SECRET_STORE) is not None:
        for name in SECRETS:
            secret = hadoop.getPassword(name)
            if secret is not None:
                values[name] = str(jvm.java.lang.String(secret))
    if hadoop.get("fs.s3.impl") is None:  # outside of EMR, s3:// is s3a:// under another name
        spark._jsparkSession.sparkContext().hadoopConfiguration().set("fs.s3.impl", _S3A)
    use_settings(HadoopSettings(values))


def on_workers(task: _Task) -> _Task:
    """A function of `DataFrame.mapInArrow` that reaches stores as this process does now."""
    adopted = settings()

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        use_settings(adopted)
        return task(batches)

    return run
