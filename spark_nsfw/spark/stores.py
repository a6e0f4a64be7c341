"""Spark's settings of object stores, for the Python that reads and writes beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

from spark_nsfw.errors import InputError
from spark_nsfw.hadoop import AUTHENTICATION, S3A_NAMES, SECRETS, USER, HadoopSettings
from spark_nsfw.storage import settings, use_settings

__all__ = ["adopt_stores", "on_workers"]

#: Where Hadoop keeps what nobody may read in a configuration.
_SECRET_STORE = "hadoop.security.credential.provider.path"

_PROVIDER_PATH = "security.credential.provider.path"

_BUCKETS = "fs.s3a.bucket."

_S3A = "org.apache.hadoop.fs.s3a.S3AFileSystem"

_Task = Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def adopt_stores(spark: SparkSession) -> None:
    """From now on, reach stores as this session does.

    Called before files are touched, and again from time to time: credentials are renewed. Through
    Spark Connect nothing is known of the server's settings: the environment counts.

    Raises:
        InputError: a store of secrets cannot be read.
    """
    jvm: Any = getattr(spark, "_jvm", None) if hasattr(spark, "_jsparkSession") else None
    if jvm is None:
        use_settings(HadoopSettings())
        return
    hadoop: Any = spark._jsparkSession.sessionState().newHadoopConf()
    of_buckets = dict(hadoop.getPropsWithPrefix(_BUCKETS))
    endings = (*S3A_NAMES, _PROVIDER_PATH)
    prefixes = {"fs.s3a."} | {  # a bucket's name may have dots
        _BUCKETS + name.removesuffix(ending)
        for name in of_buckets
        for ending in endings
        if name.endswith(f".{ending}")
    }
    names = [prefix + name for prefix in prefixes for name in S3A_NAMES]
    values = {name: hadoop.get(name) for name in (*names, AUTHENTICATION)}
    places = [_SECRET_STORE, *(p + _PROVIDER_PATH for p in prefixes)]
    stores = [place for place in map(hadoop.get, places) if place]
    if stores:
        hadoop.set(_SECRET_STORE, ",".join(stores))  # this configuration is a copy
        try:
            for name in (prefix + name for prefix in prefixes for name in SECRETS):
                secret = hadoop.getPassword(name)
                values[name] = None if secret is None else str(jvm.java.lang.String(secret))
        except Py4JError as exc:
            raise InputError(
                f"{', '.join(stores)}: Hadoop cannot read this store of secrets"
            ) from exc
    values[USER] = (
        jvm.org.apache.hadoop.security.UserGroupInformation.getCurrentUser().getShortUserName()
    )
    if hadoop.get("fs.s3.impl") is None:  # outside of EMR, s3:// is s3a:// under another name
        spark._jsparkSession.sparkContext().hadoopConfiguration().set("fs.s3.impl", _S3A)
    use_settings(HadoopSettings({name: value for name, value in values.items() if value}))


def on_workers(task: _Task) -> _Task:
    """A function of `DataFrame.mapInArrow` that reaches stores as this process does now."""
    adopted = settings()

    @functools.wraps(task)  # its name is part of Spark's plan
    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        use_settings(adopted)
        return task(batches)

    return run
