"""Files by name: listed, written, moved and deleted, on every place that pyarrow reaches."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from stat import S_ISDIR, S_ISREG

from pyarrow import fs

from spark_nsfw.errors import InputError, StorageError
from spark_nsfw.storage import on_store, parts, resolve

__all__ = [
    "FileEntry",
    "delete_empty_directories",
    "delete_files",
    "exists",
    "file_info",
    "files_digest",
    "find_file",
    "is_hidden",
    "iter_files",
    "list_files",
    "move_file",
    "write_file",
    "write_text",
]


#: pyarrow's names for object stores, which have no directories.
_FLAT_STORES = ("s3", "gcs", "abfs")


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


def file_info(url: str) -> fs.FileInfo:
    """What pyarrow tells of a path or URL.

    Raises:
        StorageError: it cannot be looked at now.
    """
    try:
        return on_store(url, lambda filesystem, path: filesystem.get_file_info(path))
    except OSError as exc:
        raise StorageError(f"{url} cannot be looked at: {exc}") from exc


def find_file(url: str) -> FileEntry | None:
    """The file that ``url`` names, its entry's name empty; None if it names a directory or nothing.

    Raises:
        StorageError: it cannot be looked at now.
    """
    info = file_info(url)
    if info.type is not fs.FileType.File:
        return None
    return FileEntry("", info.size or 0, (info.mtime_ns or 0) / 1e9)


def exists(url: str) -> bool:
    """Whether there is a file or a directory of this name.

    Raises:
        StorageError: it cannot be looked at now.
    """
    return bool(file_info(url).type is not fs.FileType.NotFound)


def is_hidden(path: str) -> bool:
    """Whether readers skip a file or directory, for its name or that of a directory above it.

    As in Spark, ``.x`` and ``_x`` are hidden; ``_x=1``, which can be a partition, is not.
    """
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part)
        for part in path.split("/")
    )


def iter_files(
    url: str, *, skip: Callable[[str], bool] = lambda name: False, follow_links: bool = False
) -> Iterator[FileEntry]:
    """List all files below a directory, hidden ones too, in one pass and in no order.

    A directory that is not there has none; one that vanishes meanwhile has no more.

    Args:
        url: the directory, a path or URL.
        skip: given a directory's name below ``url``, says whether to leave it out. Object
            stores list everything in one pass and ask it for files.
        follow_links: list what is behind links to directories, too, if they do not lead back
            up; else such a link is an entry itself, so that who deletes or refuses sees it.

    Raises:
        StorageError: it cannot be listed now.
    """
    filesystem, path = resolve(url)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _iter_local_files(path, "", skip, follow_links, ())
        return
    root = path.rstrip("/") + "/"
    # Object stores list a prefix page by page; HDFS lists directory by directory in any case.
    one_pass = filesystem.type_name in _FLAT_STORES
    directories = [path]
    while directories:
        selector = fs.FileSelector(directories.pop(), recursive=one_pass, allow_not_found=True)
        try:
            infos = _selected(url, selector)
        except OSError as exc:
            raise StorageError(f"{url} cannot be listed: {exc}") from exc
        for info in infos:
            name = info.path[len(root) :]
            if info.type is fs.FileType.File and not (one_pass and skip(name)):
                yield FileEntry(name, info.size or 0, (info.mtime_ns or 0) / 1e9)
            elif info.type is fs.FileType.Directory and not one_pass and not skip(name):
                directories.append(info.path)


def _selected(url: str, selector: fs.FileSelector) -> list[fs.FileInfo]:
    return on_store(url, lambda filesystem, _: filesystem.get_file_info(selector))


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
                if not (S_ISREG(stat.st_mode) or S_ISDIR(stat.st_mode)):
                    continue  # such as a pipe, which nobody wants to open
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
    try:
        on_store(url, lambda filesystem, path: _write_file(filesystem, path, content))
    except OSError as exc:
        raise StorageError(f"{url} cannot be written: {exc}") from exc


def _write_file(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    directory, _, name = path.rpartition("/")
    partial = path
    if filesystem.type_name not in _FLAT_STORES:  # object stores publish when all is there
        partial = f"{directory}/.{name}.{uuid.uuid4()}"
        filesystem.create_dir(directory)
    try:
        with filesystem.open_output_stream(partial) as stream:
            stream.write(content)
        if partial != path:
            _replace(filesystem, partial, path)
    except BaseException:
        if partial != path:
            with suppress(OSError):
                filesystem.delete_file(partial)
        raise


def _replace(filesystem: fs.FileSystem, source: str, target: str) -> None:
    """Move a file, over one that is there."""
    moves_over_files = filesystem.type_name in ("local", *_FLAT_STORES)
    if not moves_over_files and filesystem.get_file_info(target).is_file:  # such as HDFS
        filesystem.delete_file(target)
    try:
        filesystem.move(source, target)
    except NotImplementedError:  # Azure without directories of its own
        filesystem.copy_file(source, target)
        filesystem.delete_file(source)


def write_text(url: str, text: str) -> None:
    """As `write_file`, for a text in UTF-8."""
    write_file(url, text.encode())


def delete_files(urls: Iterable[str]) -> None:
    """Delete files; those that are gone already are fine.

    Raises:
        StorageError: one cannot be deleted.
    """

    def delete(url: str) -> None:
        try:
            on_store(url, lambda filesystem, path: filesystem.delete_file(path))
        except FileNotFoundError:
            return
        except OSError as exc:
            if not exists(url):
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


def list_files(url: str) -> tuple[str, list[str]]:
    """The files below a directory, or the one file that ``url`` names.

    Hidden names are left out, with everything below them.

    Returns:
        A prefix, and the files' names, sorted; prefix + name is a path or URL for `open_input`.

    Raises:
        StorageError: they cannot be listed now.
        InputError: no filesystem for this kind of URL.
    """
    prefix = url if parts(url)[0] else parts(url)[2]
    if find_file(url) is not None:
        directory, _, name = prefix.rpartition("/")
        return f"{directory}/", [name]
    entries = iter_files(url, skip=is_hidden, follow_links=True)
    return prefix.rstrip("/") + "/", sorted(e.name for e in entries if not is_hidden(e.name))


def move_file(source: str, target: str) -> None:
    """Give a file another name on the same filesystem, in the place of one that has it.

    Raises:
        OSError: it cannot be moved.
    """
    filesystem, path = resolve(target)
    _replace(filesystem, resolve(source)[1], path)


def files_digest(urls: Iterable[str]) -> str:
    """A SHA-256 of file names, sizes and modification times.

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
