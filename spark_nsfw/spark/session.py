"""A local SparkSession for those who have none."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pyspark.sql import SparkSession

from spark_nsfw.errors import InputError

__all__ = ["active_or_local_session", "session_settings"]


def active_or_local_session() -> SparkSession:
    """The active SparkSession, else one for this machine or for spark-submit's cluster.

    Raises:
        InputError: there is no Java to run Spark with.
    """
    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    for name in ("SQLQueryContextLogger", "py4j.clientserver"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log is raised, too
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if not submitted and not os.environ.get("SPARK_REMOTE"):
        if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
            raise InputError(
                "Spark needs Java 17 or 21 and there is none on the PATH: install it, "
                "on Debian and Ubuntu with `apt-get install openjdk-17-jre-headless`, "
                "or set JAVA_HOME"
            )
        # Spark's own default is whatever `python3` is on the PATH.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("spark-nsfw")
    if not submitted and "MASTER" not in os.environ and not os.environ.get("SPARK_REMOTE"):
        builder = builder.master("local[*]").config("spark.driver.memory", "4g")
        builder = builder.config("spark.ui.showConsoleProgress", "false")  # we have our own line
        builder = builder.config("spark.python.daemon.module", "spark_nsfw.spark.daemon")
        with _terminations_ignored():
            session = builder.getOrCreate()
        session.sparkContext.setLogLevel("FATAL")  # errors are raised, and told in one line
        return session
    return builder.getOrCreate()


@contextmanager
def _terminations_ignored() -> Iterator[None]:
    """A process that is started inside ignores SIGTERM, as pyspark has it ignore Ctrl-C.

    Both go to a whole process group; this process decides when its JVM ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class session_settings:  # noqa: N801  # reads as a verb at its call sites
    """Runtime settings of a session for the length of a with block.

    Threads may share a session: the last block that ends puts back what was set before.

    Args:
        spark: the session.
        settings: values by name; names that this Spark lacks are fine.
    """

    #: Session and name → how many blocks have it set, and what it was before the first.
    _held: ClassVar[dict[tuple[int, str], tuple[int, str | None]]] = {}
    _lock = threading.RLock()

    def __init__(self, spark: SparkSession, settings: dict[str, str]) -> None:
        self._spark = spark
        self._settings = settings

    def __enter__(self) -> None:
        with self._lock:
            for name, value in self._settings.items():
                number, before = self._held.get(
                    (id(self._spark), name), (0, self._spark.conf.get(name, None))
                )
                self._held[id(self._spark), name] = number + 1, before
                self._spark.conf.set(name, value)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for name in self._settings:
                number, before = self._held.pop((id(self._spark), name))
                if number > 1:
                    self._held[id(self._spark), name] = number - 1, before
                elif before is None:
                    self._spark.conf.unset(name)
                else:
                    self._spark.conf.set(name, before)
