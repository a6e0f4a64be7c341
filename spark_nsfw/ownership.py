"""Which files are ours: nothing that spark_nsfw did not write is overwritten or deleted.

No check needs Spark, so a command refuses a wrong output before a session starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pyarrow import fs

from spark_nsfw.errors import InputError, StorageError
from spark_nsfw.files import delete_empty_directories, delete_files, file_info, iter_files
from spark_nsfw.storage import is_below, on_store

__all__ = ["STATE", "delete_our_files", "refuse_foreign_entries", "refuse_overlap"]

#: The directory in an output for what is not data; readers skip names with an underscore.
STATE = "_spark_nsfw"


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
            raise InputError(f"{output} {how} the input {place}: give a directory of its own")


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
        if file_info(directory).type is fs.FileType.File:
            raise InputError(f"{directory} is a file: give a directory of its own")
        infos = on_store(
            directory,
            lambda store, path: store.get_file_info(fs.FileSelector(path, allow_not_found=True)),
        )
        names = sorted(info.base_name for info in infos)
    for name in names:
        if not is_ours(name):
            raise InputError(
                f"{directory} has {name} in it, which {maker} did not write: give a directory of "
                "its own"
            )
    return names


def delete_our_files(directory: str, is_ours: Callable[[str], bool]) -> None:
    """Delete the files below a directory that are ours, then the directories left empty.

    Whatever else lies there stays, and the directories that hold it.

    Args:
        directory: path or URL; it need not exist, and goes, too, once it is empty.
        is_ours: told a file's path below the directory, says whether it is ours.

    Raises:
        StorageError: something cannot be listed or deleted now.
    """
    root = directory.rstrip("/")
    ours = [entry.name for entry in iter_files(root) if is_ours(entry.name)]
    delete_files([f"{root}/{name}" for name in ours])
    delete_empty_directories(root)


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as exc:
        raise StorageError(f"{url}: {exc}") from exc
