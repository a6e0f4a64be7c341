"""Servers that stand for object stores: real ones, on this machine, for as long as a test."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["azurite", "fake_gcs", "free_port", "hdfs_cluster", "program", "served", "versitygw"]

STORES = Path(__file__).parents[1] / ".stores"

ACCESS_KEY, SECRET_KEY = "somebody", "a-secret-that-nobody-prints"


def program(*places: str) -> str | None:
    """The first of some programs that is there, below ``.stores`` or on the PATH."""
    for place in places:
        found = STORES / place if (STORES / place).exists() else shutil.which(Path(place).name)
        if found is not None:
            return str(found)
    return None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def served(
    command: Sequence[str], port: int, log: Path, env: dict[str, str] | None = None
) -> Iterator[str]:
    """A server until the block ends, or this process, however that ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
            preexec_fn=_die_with_parent,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError(f"no answer from {command[0]}: {log.read_text()[-2000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def versitygw(directory: Path, log: Path) -> Iterator[str]:
    """S3 on a directory."""
    port = free_port()
    command = program("bin/versitygw")
    assert command is not None
    directory.mkdir(parents=True, exist_ok=True)
    environment = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    arguments = ["--port", f"127.0.0.1:{port}", "--quiet", "posix", str(directory)]
    with served([command, *arguments], port, log, environment) as url:
        yield url


@contextmanager
def fake_gcs(log: Path) -> Iterator[str]:
    """Google Cloud Storage in memory."""
    port = free_port()
    command = program("bin/fake-gcs-server")
    assert command is not None
    arguments = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port),
                 "-backend", "memory", "-public-host", f"127.0.0.1:{port}"]  # fmt: skip
    with served([command, *arguments], port, log) as url:
        yield url


@contextmanager
def azurite(log: Path) -> Iterator[str]:
    """Azure's blob storage in memory."""
    port = free_port()
    command = program("node_modules/.bin/azurite-blob")
    assert command is not None
    arguments = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence",
                 "--skipApiVersionCheck", "--silent"]  # fmt: skip
    with served([command, *arguments], port, log) as url:
        yield url


@contextmanager
def hdfs_cluster(directory: Path, log: Path) -> Iterator[tuple[str, str]]:
    """HDFS with one data node; its URL for RPC and that for HTTP."""
    rpc, http = free_port(), free_port()
    java = f"{os.environ['JAVA_HOME']}/bin/java" if "JAVA_HOME" in os.environ else "java"
    command = [
        java, "-Xmx512m", f"-Dtest.build.data={directory}", "-cp", f"{STORES}/ivy/jars/*",
        "org.apache.hadoop.test.MiniDFSClusterManager",
        "-format", "-datanodes", "1", "-nnport", str(rpc), "-httpport", str(http),
    ]  # fmt: skip
    with served(command, http, log):
        yield f"hdfs://127.0.0.1:{rpc}", f"webhdfs://127.0.0.1:{http}"
