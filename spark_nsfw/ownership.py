"""Which files are ours: nothing that spark_nsfw did not write is overwritten or deleted.

No check needs Spark, so a command refuses a wrong output before a session starts.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from pyarrow import fs

from spark_nsfw.errors import InputError, StorageError
from spark_nsfw.schema import SHARD
from spark_nsfw.storage import is_below, move_file, resolve

__all__ = [
    "delete_our_files",
    "refuse_foreign_entries",
    "refuse_foreign_metadata",
    "refuse_overlap",
    "write_whole",
]

#: What a metadata output has at its top besides its partitions; Spark and Databricks add some.
_METADATA_ENTRIES = (
    "_spark_nsfw", "_SUCCESS", "._SUCCESS.crc", "_temporary", ".spark-staging-", "_committed_",
    "_started_",
)  # fmt: skip
_PARTITION = f"{SHARD}="
_SCHEMA_PARTITION = f"{_PARTITION}__schema__"

_NUM_THREADS = 32


def refuse_overlap(output: str, places: Sequence[str]) -> None:
    """Refuse an output that is, lies in, or holds a place that is read.

    Args:
        output: path or URL.
        places: paths or URLs of directories or files.

    Raises:
        InputError: names both.
    """
    for place in places:
        inside, around = is_below(output, place), is_below(place, output)
        if inside or around:
            how = "is" if inside and around else "is in" if inside else "holds"
            raise InputError(f"{output} {how} {place}, which is read: give a directory of its own")


def refuse_foreign_entries(directory: str, is_ours: Callable[[str], bool], maker: str) -> list[str]:
    """Refuse an output directory that has something in it that is not ours.

    Args:
        directory: path or URL; it need not exist.
        is_ours: told the name of an entry directly below it, says whether it is ours.
        maker: who writes such entries, for the message.

    Returns:
        The names of its entries.

    Raises:
        InputError: names an entry that is not ours; or the directory is a file.
        StorageError: it cannot be listed now.
    """
    with _storage_errors(directory):
        filesystem, path = resolve(directory)
        if filesystem.get_file_info(path).type is fs.FileType.File:
            raise InputError(f"{directory} is a file: give a directory of its own")
        selector = fs.FileSelector(path, allow_not_found=True)
        names = sorted(info.base_name for info in filesystem.get_file_info(selector))
    for name in names:
        if not is_ours(name):
            raise InputError(
                f"{directory} has {name} in it, which {maker} did not write: give a directory of "
                "its own"
            )
    return names


def refuse_foreign_metadata(output: str) -> None:
    """Refuse a directory that is neither empty nor an output of ``score`` or ``classify``.

    Raises:
        InputError: names an entry that is not ours; or the output is a file.
        StorageError: it cannot be listed now.
    """
    maker = "`spark-nsfw score` or `classify`"
    entries = (_PARTITION, *_METADATA_ENTRIES)
    names = refuse_foreign_entries(output, lambda name: name.startswith(entries), maker)
    if _SCHEMA_PARTITION not in names:  # written before any other partition of ours
        refuse_foreign_entries(output, lambda name: not name.startswith(_PARTITION), maker)


def delete_our_files(directory: str, is_ours: Callable[[str], bool]) -> None:
    """Delete the files below a directory that are ours, then the directories left empty.

    Whatever else lies there stays, and the directories that hold it.

    Args:
        directory: path or URL; it need not exist, and goes, too, once it is empty.
        is_ours: told a file's path below the directory, says whether it is ours.

    Raises:
        StorageError: something cannot be listed or deleted now.
    """
    with _storage_errors(directory):
        filesystem, root = resolve(directory)
        root = root.rstrip("/")
        files, directories = _walk(filesystem, root)
        ours = [path for path in files if is_ours(path[len(root) + 1 :])]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(filesystem.delete_file, ours))
        if isinstance(filesystem, fs.LocalFileSystem):
            for path in sorted([root, *directories], key=len, reverse=True):
                with suppress(OSError):  # not empty
                    os.rmdir(path)
            return
        # pyarrow deletes trees only, so look again whether a file is left. On object stores this
        # deletes nothing but the markers of directories.
        is_there = filesystem.get_file_info(root).type is fs.FileType.Directory
        if is_there and not _walk(filesystem, root)[0]:
            filesystem.delete_dir(root)


def _walk(filesystem: fs.FileSystem, root: str) -> tuple[list[str], list[str]]:
    """The paths of the files and of the directories below a directory."""
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [info.path for info in infos if info.type is not fs.FileType.Directory]
    return files, [info.path for info in infos if info.type is fs.FileType.Directory]


def write_whole(url: str, content: bytes) -> None:
    """Write a small file that appears under its name once it is whole, replacing an older one.

    Args:
        url: path or URL; its directory must exist.
        content: all of it: pyarrow would publish a file half written when an exception leaves
            the block around its stream.

    Raises:
        StorageError: it cannot be written now. What was there before is unchanged.
        InputError: no filesystem for this kind of URL.
    """
    directory, slash, name = url.rpartition("/")
    partial_url = f"{directory}{slash}.{name}.{uuid.uuid4()}.partial"
    with _storage_errors(url):
        filesystem, partial = resolve(partial_url)
        try:
            with filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            move_file(partial_url, url)
        except BaseException:
            with suppress(OSError):
                filesystem.delete_file(partial)
            raise


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as exc:
        raise StorageError(f"{url}: {exc}") from exc
