"""A Python daemon that is ready when Spark asks for one.

Spark starts its daemon when the first task needs it, and importing torch takes that seconds. On
one machine the command line can begin before there is a JVM: `start_daemon` starts a process that
imports all. The daemon that Spark starts later hands it its pipes and waits (`hand_over`), and it
does the work (`take_over`). For Spark the two are one.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["EARLY", "hand_over", "start_daemon", "take_over"]

#: The argument of a daemon that is started early; the path of its socket follows.
EARLY = "--early"

#: The answer of a process that takes over.
_TAKEN = b"y"

#: Where the process listens that was started early, for the daemon that Spark starts.
_SOCKET_VARIABLE = "SPARK_NSFW_EARLY_DAEMON"

#: What must live as long as this process.
_started: list[subprocess.Popen[bytes]] = []
_handed_over: list[socket.socket] = []


def start_daemon() -> None:
    """Start a daemon for the workers that score; it ends with this process, or with Spark."""
    path = Path(tempfile.mkdtemp(prefix="spark-nsfw-"), "daemon")
    # As Spark's have them: a thread for each core of a task, and hashes that are the same in all.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | os.environ
    python = os.environ.get("PYSPARK_PYTHON", sys.executable)
    process = subprocess.Popen(
        [python, "-m", "spark_nsfw.spark.daemon", EARLY, path],
        stdin=subprocess.PIPE,  # ends with this process, which tells the other to end, too
        env=environment,
    )
    _started.append(process)
    os.environ[_SOCKET_VARIABLE] = str(path)


def hand_over() -> bool:
    """Let the process that was started early be the daemon in place of this one, if it can.

    Returns:
        Whether it was; it has ended then.
    """
    path = os.environ.pop(_SOCKET_VARIABLE, None)
    if path is None:
        return False
    with socket.socket(socket.AF_UNIX) as there:
        about = {
            "python": sys.executable,
            "environment": dict(os.environ),
            "path": sys.path,
            "directory": str(Path.cwd()),
        }
        try:
            there.connect(path)
            socket.send_fds(there, [b"\n"], [0, 1, 2])
            there.sendall(json.dumps(about).encode())
            there.shutdown(socket.SHUT_WR)
            if there.recv(1) != _TAKEN:
                return False
        except OSError:  # another daemon has it, it could not start, or it died
            return False
        there.recv(1)
    return True


def take_over(path: str, prepare: Callable[[], None]) -> bool:
    """Prepare, wait for a daemon that hands over, and have its pipes and environment.

    Args:
        path: where `hand_over` connects.
        prepare: what takes long.

    Returns:
        Whether one did; else the process that would have started it has ended.
    """
    os.setpgid(0, 0)  # as Spark's do; Ctrl-C would end it before Spark is done with it
    there = _called(path, prepare)
    with suppress(OSError):  # the directory was made for the socket; with more in it, it stays
        Path(path).parent.rmdir()
    if there is None:
        return False
    _, pipes, _, _ = socket.recv_fds(there, 1, 3)
    with there.makefile("rb") as stream:
        about = json.load(stream)
    if about["python"] != sys.executable:  # Spark was told of another one
        return False
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
        os.close(pipe)
    os.environ.clear()
    os.environ.update(about["environment"])
    sys.path[:] = about["path"]
    os.chdir(about["directory"])
    there.sendall(_TAKEN)
    _handed_over.append(there)  # the other waits until this process ends and closes it
    return True


def _called(path: str, prepare: Callable[[], None]) -> socket.socket | None:
    """Who wants to hand over; None where nobody will."""
    with socket.socket(socket.AF_UNIX) as listening:
        try:
            listening.bind(path)
        except OSError:  # such as a path that is too long for a socket
            return None
        try:
            listening.listen(1)
            prepare()
            ready, _, _ = select.select([listening.fileno(), 0], [], [])
        finally:
            Path(path).unlink()
        return listening.accept()[0] if listening.fileno() in ready else None
