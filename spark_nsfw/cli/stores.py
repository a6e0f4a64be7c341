"""Object stores among a command's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

__all__ = ["reach_stores"]


#: Stores that Spark's settings may say something of.
_TOLD_BY_SPARK = ("s3", "webhdfs", "swebhdfs")


def reach_stores(options: argparse.Namespace) -> None:
    """Start Spark first where a place is on S3 or HDFS, and reach it by Spark's settings.

    Raises:
        InputError: there is no Java to run Spark with.
    """
    from spark_nsfw.storage import parts

    if not any(parts(text)[0] in _TOLD_BY_SPARK for text in _texts(vars(options).values())):
        return

    from spark_nsfw.spark.session import start_session
    from spark_nsfw.spark.stores import adopt_stores

    adopt_stores(start_session(scores="detector" in options)())


def _texts(values: object) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif hasattr(values, "__iter__"):
        for value in values:
            yield from _texts(value)
