"""URL → open file, for every place that pyarrow's filesystems reach."""

from __future__ import annotations

import errno
import io
import os
import random
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

from pyarrow import fs

from spark_nsfw.ahead import PositionedFile, read_ahead
from spark_nsfw.errors import InputError, StorageError
from spark_nsfw.hadoop import HadoopSettings
from spark_nsfw.webhdfs import webhdfs

__all__ = [
    "RetryingFile",
    "absolute",
    "hadoop_path",
    "ignores_case",
    "is_below",
    "on_store",
    "open_input",
    "parts",
    "path_below",
    "resolve",
    "settings",
    "use_settings",
]

_T = TypeVar("_T")

#: Hadoop's names for filesystems that pyarrow knows by another one.
_SCHEME_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "wasb": "abfs", "wasbs": "abfss"}

#: Pauses before a file that could not be read is tried again, in seconds.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)

#: What S3 says of faults that no other try mends. An expired token is not among them: it may be
#: renewed.
_LASTING = re.compile(
    r"AWS Error (?:ACCESS_DENIED|NO_SUCH_\w+|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH)"
    r"|HTTP status (?:301|401|403|404|405)"
)

#: One request to an object store, one read(2) of a local file.
_REMOTE_BUFFER_BYTES = 8 << 20
_LOCAL_BUFFER_BYTES = 1 << 20

#: Requests at a time for a file that is read through: with 30 ms each and 50 MB/s, 8 MiB at a time,
#: they bring 200 MB/s.
_NUM_AHEAD = 4


#: What Spark was told of object stores, in this process.
_settings = HadoopSettings()


def settings() -> HadoopSettings:
    """What `use_settings` was told last."""
    return _settings


def use_settings(adopted: HadoopSettings) -> None:
    """From now on, reach stores by these settings."""
    global _settings  # noqa: PLW0603  # of a process, as the environment is
    if adopted != _settings:
        _settings = adopted
        _filesystem.cache_clear()


@lru_cache(maxsize=64)
def _filesystem(scheme: str, authority: str) -> tuple[fs.FileSystem, str]:
    if scheme in ("abfs", "abfss") and "@" in authority:
        # Azure has two names for an account; only after this one pyarrow sees the container.
        authority = authority.replace(".blob.", ".dfs.", 1)
    uri = f"{scheme}://{authority}"
    arguments = _settings.s3_arguments(authority) if scheme == "s3" else {}
    try:
        if arguments and authority:
            if "region" not in arguments:
                arguments["region"] = fs.resolve_s3_region(authority)
            return fs.S3FileSystem(**arguments), authority
        if scheme in ("webhdfs", "swebhdfs"):
            return _name_node(scheme, authority), "/"
        if uri == "hdfs://":  # the namenode of Hadoop's own configuration
            return fs.HadoopFileSystem("default", port=0), "/"
        return cast("tuple[fs.FileSystem, str]", fs.FileSystem.from_uri(uri))
    except (ValueError, NotImplementedError) as exc:
        raise InputError(
            f"{uri}: pyarrow has no filesystem for this URL ({exc}); "
            "use a local path, s3, gs, abfs or hdfs"
        ) from exc
    except OSError as exc:  # it asks S3 for the bucket's region
        if scheme in ("hdfs", "viewfs") and "lib" in str(exc):
            raise InputError(
                f"{uri}: pyarrow finds no {'libjvm.so' if 'libjvm' in str(exc) else 'libhdfs.so'} "
                "here: set ARROW_LIBHDFS_DIR and CLASSPATH as docs/stores.md says, on the workers "
                "too; or give the same place as webhdfs://NAMENODE:9870/…, which needs no library"
            ) from exc
        raise StorageError(f"{uri} cannot be reached: {exc}") from exc


def _name_node(scheme: str, authority: str) -> fs.FileSystem:
    return webhdfs(scheme, authority, user=_settings.user, kerberos=_settings.has_kerberos)


def resolve(url: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of ``url`` and the path in it.

    Takes local paths, ``file:`` URLs, Databricks' ``dbfs:/`` (through its ``/dbfs``
    and ``/Volumes`` mounts) and any URL of `pyarrow.fs`. Paths are taken literally, never
    percent-decoded, except in ``file://`` URLs with three slashes, which are URIs.

    Raises:
        InputError: no filesystem for this kind of URL.
        StorageError: the store does not answer.
    """
    scheme, authority, path = parts(url)
    if not scheme:
        return fs.LocalFileSystem(), path
    filesystem, root = _filesystem(scheme, authority)
    return filesystem, f"{root.rstrip('/')}/{path}"


def on_store(url: str, operation: Callable[[fs.FileSystem, str], _T]) -> _T:
    """Do something with a URL's filesystem and path, again while its store has a bad moment.

    The pauses grow, `RETRY_SECONDS`. What cannot pass, such as a missing permission, is tried once.

    Raises:
        InputError: no filesystem for this kind of URL.
        OSError: the operation's own.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return operation(*resolve(url))
        except OSError as exc:
            if pause is None or not parts(url)[0] or not _may_pass(exc):
                raise
        _filesystem.cache_clear()  # credentials may have been renewed
        time.sleep(pause * random.uniform(0.75, 1.25))
    raise AssertionError("unreachable")


def _may_pass(error: OSError) -> bool:
    lasting = (
        FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError
    )  # fmt: skip
    return not isinstance(error, lasting) and not _LASTING.search(str(error))


def parts(url: str) -> tuple[str, str, str]:
    """URL → (scheme as pyarrow names it, authority, path in it); local paths have no scheme."""
    scheme, colon, rest = url.partition(":")
    if not colon or "/" in scheme or len(scheme) == 1:
        return "", "", str(Path(url).absolute())
    if scheme == "file":
        return "", "", unquote(rest[2:]) if rest.startswith("///") else rest
    if scheme == "dbfs":
        path = "/" + rest.lstrip("/")
        return "", "", path if path.startswith("/Volumes/") else "/dbfs" + path
    authority, path = "", rest
    if rest.startswith("//") and not rest.startswith("///"):
        authority, _, path = rest[2:].partition("/")
    return _SCHEME_ALIASES.get(scheme, scheme), authority, path.lstrip("/")


def hadoop_path(path: str) -> str:
    """The same place under the name that Spark has for it.

    They differ in Databricks' ``/dbfs`` mount: Spark there knows ``/dbfs/x`` as ``dbfs:/x``.
    """
    mounted = path == "/dbfs" or path.startswith("/dbfs/")
    if mounted and "DATABRICKS_RUNTIME_VERSION" in os.environ:
        return "dbfs:/" + path[len("/dbfs/") :]
    return path


def open_input(url: str, *, buffer_bytes: int | None = None, through: bool = False) -> BinaryIO:
    """Open ``url`` for buffered, seekable reading that survives a bad moment of its store.

    Where a read fails or ends early, the file is opened again after a pause and read on from
    there; the pauses grow, `RETRY_SECONDS`.

    Args:
        url: the file, a path or URL.
        buffer_bytes: read at a time; None takes what suits reading the file through.
        through: it will be read from its start to its end, so what comes next is fetched before
            it is asked for. Takes 40 MiB where the file is remote.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        StorageError: it cannot be opened or read now, network, permission or disk; raised
            by reads, too.
        InputError: no filesystem for this kind of URL.
    """
    raw = RetryingFile(url)
    if through and not raw.is_local:
        return read_ahead(raw.read_at, raw.size, _REMOTE_BUFFER_BYTES, _NUM_AHEAD)
    usual = _LOCAL_BUFFER_BYTES if raw.is_local else _REMOTE_BUFFER_BYTES
    return io.BufferedReader(raw, buffer_bytes or usual)


class RetryingFile(PositionedFile):
    """A file, without a buffer, that is opened again, at the same place, when reading it fails.

    Args:
        url: a path or URL.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        StorageError: it cannot be opened or read now; raised by reads, too.
        InputError: no filesystem for this kind of URL.
    """

    def __init__(self, url: str) -> None:
        super().__init__(-1)  # until it is open
        self.url = url
        self.is_local = not parts(url)[0]
        self._file: Any = None
        self._retried(self._open)

    def _open(self) -> Any:
        filesystem, path = resolve(self.url)
        if self.is_local and os.path.isdir(path):  # pyarrow's error is one of any kind
            raise IsADirectoryError(errno.EISDIR, "it is a directory", path)
        file = filesystem.open_input_file(path)
        size = int(file.size())
        if self._size not in (-1, size):
            file.close()
            raise OSError(f"it changed while it was read, from {self._size:,} to {size:,} bytes")
        self._file, self._size = file, size
        return file

    @property
    def size(self) -> int:
        """In bytes, when it was opened first."""
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """So many bytes from there, whatever else reads at the same time."""

        def read() -> bytes:
            file = self._file or self._open()  # other threads may drop it meanwhile
            content = bytes(file.read_at(length, offset))
            if len(content) < length:
                raise OSError(f"it ended at byte {offset + len(content):,} of {self._size:,}")
            return content

        return self._retried(read)

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase.readinto`."""
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0

        def read() -> int:
            if self._file is None:
                self._open()
            if self._file.tell() != self._position:
                self._file.seek(self._position)
            count = int(self._file.readinto(memoryview(buffer)[:wanted]))
            if not count:
                raise OSError(f"it ended at byte {self._position:,} of {self._size:,}")
            return count

        count = self._retried(read)
        self._position += count
        return count

    def readall(self) -> bytes:
        """As `io.RawIOBase.readall`."""
        # Python's own asks for 8 KiB at a time, a request to the store each.
        content = bytearray(max(0, self._size - self._position))
        view, filled = memoryview(content), 0
        while count := self.readinto(view[filled:]):
            filled += count
        return bytes(content)

    def _retried(self, attempt: Callable[[], _T]) -> _T:
        for pause in (*RETRY_SECONDS, None):
            try:
                return attempt()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
                if self._size < 0:
                    raise
                raise StorageError(f"{self.url} vanished while it was read") from exc
            except OSError as exc:
                if pause is None:
                    raise StorageError(
                        f"{self.url} cannot be read now, after {len(RETRY_SECONDS) + 1} tries: "
                        f"{exc}"
                    ) from exc
                self._drop()
                # Credentials may have been renewed meanwhile: they belong to the filesystem.
                _filesystem.cache_clear()
                time.sleep(pause * random.uniform(0.75, 1.25))  # not all workers at once
        raise AssertionError("unreachable")

    def _drop(self) -> None:
        self._file = None  # and closed when nobody reads from it any more

    def close(self) -> None:
        """As `io.IOBase.close`."""
        self._drop()
        super().close()


def ignores_case(url: str) -> bool:
    """Whether the file system of a path takes ``A`` and ``a`` for one name."""
    filesystem, path = resolve(url)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return False
    there = Path(path)
    while there != there.parent:
        swapped = there.with_name(there.name.swapcase())
        if there.exists() and swapped.name != there.name:
            return swapped.exists() and swapped.samefile(there)
        there = there.parent
    return False


def absolute(url: str) -> str:
    """A path made absolute, a URL as it is: Spark's JVM may stand in another folder."""
    return url if ":" in url or url.startswith("/") else os.path.abspath(url)


def is_below(url: str, directory: str) -> bool:
    """Whether one path or URL is the other, or below it; links are followed."""
    return path_below(url, directory) is not None


def path_below(url: str, directory: str) -> str | None:
    """The path of one place below another, empty if they are one; None if it is not below.

    Links are followed; no store is asked.
    """
    place, root = _real(url), _real(directory)
    return place[len(root) :].rstrip("/") if place.startswith(root) else None


def _real(url: str) -> str:
    """One name for a place, with a slash at its end."""
    scheme, authority, path = parts(url)
    if scheme:
        return f"{scheme}://{authority}/{path}".rstrip("/") + "/"
    return str(Path(path).resolve()).rstrip("/") + "/"
