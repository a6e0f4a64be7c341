"""Object stores among a command's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from spark_nsfw.errors import InputError

__all__ = ["reach_stores"]


#: Stores that Spark's settings may say something of.
_TOLD_BY_SPARK = ("s3", "webhdfs", "swebhdfs")


def reach_stores(options: argparse.Namespace) -> None:
    """Start Spark first where a place is on S3 or HDFS, and reach it by Spark's settings.

    Where there is no Java, the environment says how; a command that needs Spark will say so.
    """
    from spark_nsfw.storage import parts

    texts = list(_texts(vars(options).values()))
    places = texts + [text.partition("=")[2] for text in texts]  # such as NAME=URL
    if not any(parts(place)[0] in _TOLD_BY_SPARK for place in places):
        return

    from spark_nsfw.spark.session import start_session
    from spark_nsfw.spark.stores import adopt_stores

    try:
        session = start_session(scores="detector" in options)
    except InputError:
        return
    adopt_stores(session())


def _texts(values: object) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif hasattr(values, "__iter__"):
        for value in values:
            yield from _texts(value)
