"""URL → open file, for every place that pyarrow's filesystems reach."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from pyarrow import fs

from spark_nsfw.errors import InputError, StorageError

__all__ = [
    "FileEntry",
    "absolute",
    "delete_directory",
    "delete_empty_directories",
    "delete_files",
    "files_digest",
    "find_file",
    "hadoop_path",
    "ignores_case",
    "is_below",
    "iter_files",
    "last_change",
    "list_files",
    "move_file",
    "open_input",
    "path_below",
    "resolve",
    "write_file",
    "write_text",
]

#: Hadoop's names for filesystems that pyarrow knows by another one.
_SCHEME_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "wasb": "abfs", "wasbs": "abfss"}

#: Pauses before a file that could not be read is tried again, in seconds.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)

#: One request to an object store, one read(2) of a local file.
_REMOTE_BUFFER_BYTES = 8 << 20
_LOCAL_BUFFER_BYTES = 1 << 20


@lru_cache(maxsize=64)
def _filesystem(scheme: str, authority: str) -> tuple[fs.FileSystem, str]:
    if scheme in ("abfs", "abfss") and "@" in authority:
        # Azure has two names for an account; only after this one pyarrow sees the container.
        authority = authority.replace(".blob.", ".dfs.", 1)
    uri = f"{scheme}://{authority}"
    try:
        if uri == "hdfs://":  # the namenode of Hadoop's own configuration
            return fs.HadoopFileSystem("default", port=0), "/"
        return cast("tuple[fs.FileSystem, str]", fs.FileSystem.from_uri(uri))
    except (ValueError, NotImplementedError) as exc:
        raise InputError(
            f"{uri}: pyarrow has no filesystem for this URL ({exc}); "
            "use a local path, s3, gs, abfs or hdfs"
        ) from exc
    except OSError as exc:  # it asks S3 for the bucket's region
        raise StorageError(f"{uri} cannot be reached: {exc}") from exc


def resolve(url: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of ``url`` and the path in it.

    Takes local paths, ``file:`` URLs, Databricks' ``dbfs:/`` (through its ``/dbfs``
    and ``/Volumes`` mounts) and any URL of `pyarrow.fs`. Paths are taken literally, never
    percent-decoded, except in ``file://`` URLs with three slashes, which are URIs.

    Raises:
        InputError: no filesystem for this kind of URL.
        StorageError: the store does not answer.
    """
    scheme, authority, path = _parts(url)
    if not scheme:
        return fs.LocalFileSystem(), path
    filesystem, root = _filesystem(scheme, authority)
    return filesystem, f"{root.rstrip('/')}/{path}"


def _parts(url: str) -> tuple[str, str, str]:
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


def open_input(url: str) -> BinaryIO:
    """Open ``url`` for buffered, seekable reading that survives a bad moment of its store.

    Where a read fails or ends early, the file is opened again after a pause and read on from
    there; the pauses grow, `RETRY_SECONDS`.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        StorageError: it cannot be opened or read now, network, permission or disk; raised
            by reads, too.
        InputError: no filesystem for this kind of URL.
    """
    raw = _RetryingFile(url)
    return io.BufferedReader(raw, _LOCAL_BUFFER_BYTES if raw.is_local else _REMOTE_BUFFER_BYTES)


class _RetryingFile(io.RawIOBase):
    """A file that is opened again, at the same place, when reading it fails."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.is_local = not _parts(url)[0]
        self._file: Any = None
        self._position = 0
        self._size = -1
        self._retried(self._open)

    def _open(self) -> int:
        filesystem, path = resolve(self.url)
        if self.is_local and os.path.isdir(path):  # pyarrow's error is one of any kind
            raise IsADirectoryError(errno.EISDIR, "it is a directory", path)
        file = filesystem.open_input_file(path)
        size = int(file.size())
        if self._size not in (-1, size):
            file.close()
            raise OSError(f"it changed while it was read, from {self._size:,} to {size:,} bytes")
        self._file, self._size = file, size
        return size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)  # past the end, too, which pyarrow refuses
        return self._position

    def readinto(self, buffer: Any) -> int:
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
        # Python's own asks for 8 KiB at a time, a request to the store each.
        content = bytearray(max(0, self._size - self._position))
        view, filled = memoryview(content), 0
        while count := self.readinto(view[filled:]):
            filled += count
        return bytes(content)

    def _retried(self, attempt: Callable[[], int]) -> int:
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
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None

    def close(self) -> None:
        self._drop()
        super().close()


def last_change(urls: Sequence[str]) -> float:
    """When the newest of some files of one filesystem was changed, in Unix seconds.

    Files that are not there do not count.
    """
    filesystem, _ = resolve(urls[0])
    infos = filesystem.get_file_info([resolve(url)[1] for url in urls])
    return max((info.mtime_ns / 1e9 for info in infos if info.mtime_ns), default=0.0)


def files_digest(urls: Iterable[str]) -> str:
    """A sha256 that is another one when files are: by their names, sizes and times of change.

    Of a file that cannot be looked at from here, only the URL counts.
    """
    with ThreadPoolExecutor(16) as pool:
        states = set(pool.map(_file_state, set(urls)))
    return hashlib.sha256("\n".join(sorted(states)).encode()).hexdigest()


def _file_state(url: str) -> str:
    try:
        filesystem, path = resolve(url)
        info = filesystem.get_file_info(path)
    except (OSError, InputError):
        return url
    return f"{info.base_name} {info.size} {info.mtime_ns}"


@dataclass(frozen=True)
class FileEntry:
    """A file that a listing found.

    Attributes:
        name: its path below the directory that was listed.
        size: in bytes.
        modified_seconds: when it last changed, in Unix seconds; 0 if unknown.
    """

    name: str
    size: int
    modified_seconds: float


def find_file(url: str) -> FileEntry | None:
    """The file that ``url`` names, its entry's name empty; None if it names a directory or nothing.

    Raises:
        StorageError: it cannot be looked at now.
    """
    filesystem, path = resolve(url)
    try:
        info = filesystem.get_file_info(path)
    except OSError as exc:
        raise StorageError(f"{url} cannot be looked at: {exc}") from exc
    if info.type is not fs.FileType.File:
        return None
    return FileEntry("", info.size or 0, (info.mtime_ns or 0) / 1e9)


def iter_files(
    url: str, *, skip: Callable[[str], bool] = lambda name: False, follow_links: bool = False
) -> Iterator[FileEntry]:
    """List all files below a directory, hidden ones too, in one pass and in no order.

    A directory that is not there has none; one that vanishes meanwhile has no more.

    Args:
        url: the directory, a path or URL.
        skip: told a directory's name below ``url``, says whether to leave it out; stores
            without directories ask it for files.
        follow_links: list directories behind links, too, if they do not lead back up.

    Raises:
        StorageError: it cannot be listed now.
    """
    filesystem, path = resolve(url)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _iter_local_files(path, "", skip, follow_links, ())
        return
    root = path.rstrip("/") + "/"
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    try:
        infos = filesystem.get_file_info(selector)
    except OSError as exc:
        raise StorageError(f"{url} cannot be listed: {exc}") from exc
    for info in infos:
        name = info.path[len(root) :]
        if info.type is fs.FileType.File and not skip(name):
            yield FileEntry(name, info.size or 0, (info.mtime_ns or 0) / 1e9)


def _iter_local_files(
    root: str, below: str, skip: Callable[[str], bool], follow_links: bool, above: tuple[str, ...]
) -> Iterator[FileEntry]:
    here = os.path.join(root, below)
    if follow_links:
        real = os.path.realpath(here)
        if real in above:
            return  # a link that leads back up
        above = (*above, real)
    try:
        with os.scandir(here) as entries:
            for entry in entries:
                name = below + entry.name
                try:
                    if entry.is_dir(follow_symlinks=follow_links):
                        if not skip(name):
                            yield from _iter_local_files(
                                root, f"{name}/", skip, follow_links, above
                            )
                        continue
                    stat = entry.stat()
                except OSError as exc:
                    if exc.errno in (errno.ENOENT, errno.ELOOP):
                        continue  # gone, or a link that leads nowhere
                    raise
                if not S_ISREG(stat.st_mode):
                    continue  # a link to a directory, or a pipe, which nobody wants to open
                yield FileEntry(name, stat.st_size, stat.st_mtime)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        raise StorageError(f"{here} cannot be listed: {exc}") from exc


def write_file(url: str, content: bytes) -> None:
    """Write a file so that no reader ever sees a part of it; its directory is made.

    Raises:
        StorageError: it cannot be written.
        InputError: no filesystem for this kind of URL.
    """
    filesystem, path = resolve(url)
    directory, _, name = path.rpartition("/")
    partial = path
    if filesystem.type_name in ("local", "hdfs"):  # object stores publish when all is there
        partial = f"{directory}/.{name}.{uuid.uuid4()}"
    try:
        if partial != path:
            filesystem.create_dir(directory)
        try:
            with filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            if partial != path:
                if filesystem.type_name == "hdfs" and filesystem.get_file_info(path).is_file:
                    filesystem.delete_file(path)  # HDFS moves nothing over a file that is there
                filesystem.move(partial, path)
        except BaseException:
            if partial != path:
                with suppress(OSError):
                    filesystem.delete_file(partial)
            raise
    except OSError as exc:
        raise StorageError(f"{url} cannot be written: {exc}") from exc


def write_text(url: str, text: str) -> None:
    """As `write_file`, for a text in UTF-8."""
    write_file(url, text.encode())


def delete_files(urls: Iterable[str]) -> None:
    """Delete files; those that are gone already are fine.

    Raises:
        StorageError: one cannot be deleted.
    """

    def delete(url: str) -> None:
        filesystem, path = resolve(url)
        try:
            filesystem.delete_file(path)
        except FileNotFoundError:
            return
        except OSError as exc:
            if filesystem.get_file_info(path).type is fs.FileType.NotFound:
                return
            raise StorageError(f"{url} cannot be deleted: {exc}") from exc

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(delete, urls))


def delete_empty_directories(url: str) -> None:
    """Delete a directory and those below it as far as there is no file in them."""
    filesystem, path = resolve(url)
    if isinstance(filesystem, fs.LocalFileSystem):
        for directory, _, _ in os.walk(path, topdown=False):
            with suppress(OSError):  # it has files
                os.rmdir(directory)
        return
    root = path.rstrip("/")
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    holding = {root for info in infos if info.type is fs.FileType.File}
    for info in infos:
        if info.type is fs.FileType.File:
            parts = info.path[len(root) + 1 :].split("/")
            holding |= {"/".join([root, *parts[:count]]) for count in range(1, len(parts))}
    directories = {info.path for info in infos if info.type is fs.FileType.Directory} | {root}
    for directory in sorted(directories - holding, key=len, reverse=True):
        with suppress(OSError):
            filesystem.delete_dir(directory)


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


def move_file(source: str, target: str) -> None:
    """Give a file another name on the same filesystem, in the place of one that has it.

    Raises:
        OSError: it cannot be moved.
    """
    filesystem, path = resolve(target)
    if filesystem.type_name == "hdfs" and filesystem.get_file_info(path).is_file:
        filesystem.delete_file(path)  # HDFS moves nothing over a file that is there
    filesystem.move(resolve(source)[1], path)


def delete_directory(url: str) -> None:
    """Delete a directory with all that is in it, if it is there."""
    filesystem, path = resolve(url)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


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
    scheme, authority, path = _parts(url)
    if scheme:
        return f"{scheme}://{authority}/{path}".rstrip("/") + "/"
    return str(Path(path).resolve()).rstrip("/") + "/"


def list_files(url: str) -> tuple[str, list[str]]:
    """The files below a directory, or the one file that ``url`` names.

    Names that start with an underscore or a dot are no data and are left out, with all
    that is below them, as Spark does it.

    Returns:
        A prefix, and the files' names, sorted; prefix + name is a path or URL for `open_input`.

    Raises:
        StorageError: they cannot be listed now.
        InputError: no filesystem for this kind of URL.
    """
    prefix = url if _parts(url)[0] else _parts(url)[2]
    if find_file(url) is not None:
        directory, _, name = prefix.rpartition("/")
        return f"{directory}/", [name]
    names = sorted(entry.name for entry in iter_files(url, follow_links=True))
    hidden = ("_", ".")
    return prefix.rstrip("/") + "/", [
        name for name in names if not any(part.startswith(hidden) for part in name.split("/"))
    ]
