"""A local SparkSession for those who have none."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ClassVar

from pyspark import SparkConf, SparkContext
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from spark_nsfw.errors import InputError
from spark_nsfw.spark.early import start_daemon
from spark_nsfw.spark.jvm import local_jvm_options

__all__ = ["active_or_local_session", "session_settings", "start_session"]

#: Of sessions that are started here.
_LOCAL = {
    "spark.app.name": "spark-nsfw",
    "spark.driver.memory": "4g",
    "spark.ui.showConsoleProgress": "false",  # we have our own line
    "spark.python.daemon.module": "spark_nsfw.spark.daemon",
}


_lock = threading.Lock()

#: The local session that was started last.
_started: Future[None] | None = None


def active_or_local_session() -> SparkSession:
    """The active SparkSession, else one for this machine or for spark-submit's cluster.

    Raises:
        InputError: there is no Java to run Spark with.
    """
    return _session(_start_local)()


def start_session(scores: bool = False) -> Callable[[], SparkSession]:
    """Begin to start what `active_or_local_session` gives; call the result to wait for it.

    A local JVM takes seconds to start, in which there is other work to do. Ctrl-C does not cancel
    Spark's jobs then, as it does where a session is started by the main thread.

    Args:
        scores: workers will need torch, and a local session has them import it meanwhile.

    Raises:
        InputError: there is no Java to run Spark with.
    """

    def begin(started: Future[None]) -> None:
        if scores:
            start_daemon()
        threading.Thread(target=_start_local, args=[started], daemon=True).start()

    return _session(begin)


def _session(begin: Callable[[Future[None]], None]) -> Callable[[], SparkSession]:
    """What waits for a session, which is there, is being started, or is started by ``begin``."""
    global _started  # noqa: PLW0603  # of a process, as Spark's own
    active = SparkSession.getActiveSession()
    if active is not None:
        return lambda: active
    for name in ("SQLQueryContextLogger", "py4j.clientserver"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log is raised, too
    if "PYSPARK_GATEWAY_PORT" in os.environ or os.environ.get("SPARK_REMOTE"):
        return SparkSession.builder.appName("spark-nsfw").getOrCreate
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise InputError(
            "Spark needs Java 17 or 21 and there is none on the PATH: install it, "
            "on Debian and Ubuntu with `apt-get install openjdk-17-jre-headless`, "
            "or set JAVA_HOME"
        )
    # Spark's own default is whatever `python3` is on the PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if "MASTER" in os.environ:
        return SparkSession.builder.appName("spark-nsfw").getOrCreate
    with _lock:
        started = _started
        if started is None or started.done():
            if SparkContext._active_spark_context is not None:  # sessions are active in one thread
                return SparkSession.builder.getOrCreate
            started = _started = Future()
            begin(started)

    def session() -> SparkSession:
        started.result()
        return SparkSession.builder.getOrCreate()

    return session


def _start_local(started: Future[None]) -> None:
    conf = SparkConf().setMaster("local[*]").setAll(list(_LOCAL.items()))
    given = os.environ.get("SPARK_SUBMIT_OPTS", "")
    os.environ["SPARK_SUBMIT_OPTS"] = " ".join([*local_jvm_options(), given])  # the last counts
    try:
        # Ctrl-C and SIGTERM go to all processes of a session; this one decides when its JVM ends.
        gateway = launch_gateway(conf, {"start_new_session": True})
        SparkContext(conf=conf, gateway=gateway)
        SparkSession.builder.getOrCreate()
    except BaseException as exc:
        started.set_exception(exc)
    else:
        started.set_result(None)
    finally:
        os.environ["SPARK_SUBMIT_OPTS"] = given


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
