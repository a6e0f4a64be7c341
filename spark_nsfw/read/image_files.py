"""A directory of image files: the source that reads them.

A unit is a leaf directory, or a part of a large one. Its name is the directory's path below the
input root, and after an ``@`` a digest of its files' names: files that come later are another unit,
and those that are in the output already never move to a new one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from spark_nsfw.errors import InputError, NothingToReadError
from spark_nsfw.files import FileEntry, exists
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS
from spark_nsfw.read.source import Rows, Unit
from spark_nsfw.read.tar import MAX_MEMBER_BYTES
from spark_nsfw.schema import (
    ERROR_MESSAGE,
    KEY,
    SHARD,
    STATUS,
    Status,
    sample_schema,
    without_image,
)
from spark_nsfw.storage import RetryingFile

__all__ = ["FilesSource", "ReadFile", "read_files", "suffixes_of"]

#: Files in a unit, at most about twice as many on average in the parts of a large directory.
_FILES_PER_UNIT = 1_000

#: Of a file's name, on every file system in use.
_MAX_NAME_BYTES = 255

#: Files that are read at a time: a store answers after tens of milliseconds.
_NUM_READERS = 16

#: Rows in an Arrow batch, and the bytes of images after which it is closed.
_BATCH_ROWS, _BATCH_BYTES = 256, 32 << 20

_Files = Mapping[str, FileEntry]

#: Between a directory's path and the digest of a unit's files.
_MARK = "@"


def suffixes_of(extensions: Iterable[str]) -> tuple[str, ...]:
    """``jpg`` → how the names of such files end: ``.jpg``, ``.JPG``, ``.Jpg``."""
    written = ((e.lower(), e.upper(), e.capitalize()) for e in extensions)
    return tuple(dict.fromkeys(f".{each}" for spellings in written for each in spellings))


@dataclass(frozen=True)
class ReadFile:
    """A file that was read.

    Attributes:
        content: None where the status is not ``ok``.
        status: ``image_missing`` if there is none, ``member_oversized`` if it is too large.
        error_message: why, for a person.
        is_gone: there is no such file.
    """

    content: bytes | None
    status: Status = Status.OK
    error_message: str | None = None
    is_gone: bool = False


def read_files(urls: Iterable[str | None], max_bytes: int = MAX_MEMBER_BYTES) -> Iterator[ReadFile]:
    """Read files, in order, several at a time.

    Args:
        urls: paths or URLs; None has no file.
        max_bytes: larger files are not read.

    Raises:
        StorageError: one cannot be read now.
    """

    def read(url: str | None) -> ReadFile:
        if url is None:
            return ReadFile(None, Status.IMAGE_MISSING, "there is no path")
        if len(os.fsencode(url.rpartition("/")[2])) > _MAX_NAME_BYTES or "\0" in url:
            return ReadFile(None, Status.IMAGE_MISSING, f"{url[:80]!r}… can be the name of no file")
        try:
            with closing(RetryingFile(url)) as file:
                if file.size <= max_bytes:
                    return ReadFile(file.read_at(0, file.size))
                message = f"{url} has {file.size:,} bytes, the limit is {max_bytes:,}"
                return ReadFile(None, Status.MEMBER_OVERSIZED, message)
        except UnicodeEncodeError:  # pyarrow opens no such file
            message = f"{_key(url)} is no name in UTF-8: rename the file"
            return ReadFile(None, Status.IMAGE_MISSING, message)
        except (InputError, ValueError) as exc:
            return ReadFile(
                None, Status.IMAGE_MISSING, f"{url!r} is no file that can be read: {exc}"
            )
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            message = f"{url} does not exist, or is no file"
            return ReadFile(None, Status.IMAGE_MISSING, message, is_gone=True)

    waiting = iter(urls)
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="image-files") as pool:
        under_way = deque(pool.submit(read, url) for url in islice(waiting, 2 * _NUM_READERS))
        try:
            while under_way:
                yield under_way.popleft().result()
                under_way.extend(pool.submit(read, url) for url in islice(waiting, 1))
        finally:
            for future in under_way:
                future.cancel()


@dataclass(frozen=True)
class FilesSource:
    """Image files; a `spark_nsfw.read.source.GrowingSource` with units of up to 1,000 or so.

    The key of a sample is its file's name; so `shard` up to the ``@`` and the key are the file's
    path below the input root.

    Attributes:
        inputs: where the files are.
        max_image_bytes: larger files make a row with status ``member_oversized``.
        settle_seconds: files that changed since are not there yet.
    """

    inputs: ShardInputs
    max_image_bytes: int = MAX_MEMBER_BYTES
    settle_seconds: float = 0

    @classmethod
    def of(
        cls, paths: Any, extensions: Sequence[str] = IMAGE_EXTENSIONS, settle_seconds: float = 0
    ) -> FilesSource:
        """Of directories, files, globs or ranges; files of other extensions are no images."""
        inputs = ShardInputs.parse(paths, suffixes_of(extensions))
        return cls(inputs, settle_seconds=settle_seconds)

    def describe(self) -> dict[str, Any]:
        """Kind and roots of the input, and what decides which rows come out."""
        return {
            "inputs": self.inputs.describe("files"),
            "rows": {
                "suffixes": sorted({suffix.lower() for suffix in self.inputs.suffixes}),
                "max_image_bytes": self.max_image_bytes,
            },
        }

    def covers(self, url: str) -> bool:
        """Whether an output there would be read as input, or holds the input."""
        return self.inputs.covers(url)

    def units(self) -> list[Unit]:
        """Units of the files that are there now, sorted by name.

        Raises:
            NothingToReadError: there are none, or one that was named is missing.
            InputError: two directories would have one name, or one has a name that is not UTF-8.
        """
        directories: dict[str, dict[str, FileEntry]] = {}
        latest = time.time() - self.settle_seconds if self.settle_seconds else float("inf")
        for path, entry in self.inputs.list_files().items():
            if entry.modified_seconds > latest:
                continue
            place, _, base = path.rpartition("/")
            directories.setdefault(place, {})[base] = entry
        if not directories:
            raise NothingToReadError(f"{', '.join(self.inputs.patterns)}: no file has settled yet")
        place_of: dict[str, str] = {}
        units: list[Unit] = []
        for place, files in directories.items():
            name = self._directory_name(place)
            if name != _key(name):
                raise InputError(f"{_key(place)} is no name in UTF-8: rename this folder")
            other = place_of.setdefault(name, place)
            if other != place:
                raise InputError(
                    f"{other} and {place} would both be directory {name or '.'!r}; score them in "
                    "two runs, or from a directory above both"
                )
            units += [_unit(name, place, part, files) for part in _parts(files)]
        return sorted(units, key=lambda unit: unit.name)

    def _directory_name(self, place: str) -> str:
        return self.inputs.shard_name(f"{place}/x").removesuffix("x").rstrip("/")

    def remaining(
        self,
        units: Sequence[Unit],
        done: Iterable[str],
        keys_of: Callable[[Iterable[str]], Mapping[str, set[str]]],
    ) -> tuple[list[Unit], list[str]]:
        """As `GrowingSource.remaining`; keys are asked of directories that have changed since."""
        done = set(done)
        planned: dict[str, list[Unit]] = {}
        for unit in units:
            planned.setdefault(_directory(unit.name), []).append(unit)
        changed = {_directory(name) for name in done - {unit.name for unit in units}}
        done_of: dict[str, list[str]] = {directory: [] for directory in changed & planned.keys()}
        for name in sorted(done):
            if _directory(name) in done_of:
                done_of[_directory(name)].append(name)
        keys = keys_of([name for names in done_of.values() for name in names])
        left: list[Unit] = []
        doubled: list[str] = []
        for directory, parts in planned.items():
            if directory not in done_of:
                left += parts
                continue
            # A unit that was set aside has no keys, and nobody else's files.
            aside = [part for part in parts if part.name in done and not keys[part.name]]
            names = {name: keys[name] for name in done_of[directory]}
            for part in aside:
                del names[part.name]
            listed = {_key(name) for part in parts for name in part.members}
            taken, superfluous = _kept(names, listed)
            doubled += superfluous
            taken |= {_key(name) for part in aside for name in part.members}
            new = [name for part in parts for name in part.members if _key(name) not in taken]
            left += [
                replace(parts[0], name=_name(directory, part), members=part) for part in _parts(new)
            ]
        return left, doubled

    def unit_named(self, name: str) -> Unit:
        """The unit of a name that an output has, without listing any; its files are not known."""
        directory = _directory(name)
        roots = [self.inputs.filesystem + root for root in self.inputs.roots]
        places = [f"{root}{directory}".rstrip("/") for root in roots]
        fitting = [place for place in places if self._directory_name(place) == directory]
        if len(fitting) == 1:
            return Unit(name, fitting[0])
        return Unit(name, next((place for place in fitting if exists(place)), places[0]))

    def schema(
        self, own: Sequence[pa.Field] | None = None, units: Sequence[Unit] | None = None
    ) -> pa.Schema:
        """The columns of its rows, without the image; files bring none of their own."""
        return without_image(sample_schema(locations=False))

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[Rows]:
        """The files of a unit, in order of their names; one that is gone meanwhile is missing.

        Raises:
            FileNotFoundError: all of them are gone.
            StorageError: one cannot be read now.
        """
        urls = [f"{unit.place}/{name}" for name in unit.members]
        keys: list[str] = []
        read: list[ReadFile] = []
        num_bytes, is_there = 0, False
        for name, file in zip(unit.members, read_files(urls, self.max_image_bytes), strict=True):
            is_there = is_there or not file.is_gone
            keys.append(_key(name))
            read.append(file)
            num_bytes += len(file.content or b"")
            if is_there and (len(keys) >= _BATCH_ROWS or num_bytes >= _BATCH_BYTES):
                yield _rows(unit.name, keys, read, schema)
                keys, read, num_bytes = [], [], 0
        if not is_there:
            raise FileNotFoundError(f"{unit.place} has none of its {len(urls)} files any more")
        if keys:
            yield _rows(unit.name, keys, read, schema)


def _key(name: str) -> str:
    r"""A file's name as text: what is not UTF-8 in it as ``\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _directory(name: str) -> str:
    """Of a unit."""
    return name.rpartition(_MARK)[0]


def _kept(done: Mapping[str, set[str]], listed: set[str]) -> tuple[set[str], list[str]]:
    """The keys that are done in a directory, and the units that are superfluous.

    Two runs that see different files at the same time can leave units with files in common. Which
    of them stay follows from the output alone, and none goes whose files another one has not got.

    Args:
        done: keys of units.
        listed: keys of the files that are there now.
    """
    taken: set[str] = set()
    superfluous, crossing = [], []
    for name in sorted(done, key=lambda name: (-len(done[name]), name)):
        keys = done[name]
        if keys <= taken:  # as are those of a unit that was set aside, which has none
            superfluous.append(name)
        elif keys.isdisjoint(taken) or not keys - taken <= listed:
            taken |= keys
        else:  # its other files are scored anew, and then it is superfluous
            crossing.append(name)
    return taken, superfluous + [name for name in crossing if done[name] <= taken]


def _rows(shard: str, keys: list[str], read: list[ReadFile], schema: pa.Schema) -> Rows:
    values = {
        SHARD: [shard] * len(keys),
        KEY: keys,
        STATUS: [file.status.value for file in read],
        ERROR_MESSAGE: [file.error_message for file in read],
    }
    arrays = [pa.array(values[name], pa.string()) for name in schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=schema), [file.content for file in read]


def _parts(files: Collection[str]) -> Iterator[tuple[str, ...]]:
    """Files of a directory in parts; a file stays in its part while their number is the same.

    The number is a power of two, and a file's part follows from its name alone.
    """
    number = 1
    while len(files) > number * _FILES_PER_UNIT:
        number *= 2
    parts: list[list[str]] = [[] for _ in range(number)]
    for name in sorted(files):
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4)
        parts[int.from_bytes(digest.digest(), "little") % number].append(name)
    yield from (tuple(part) for part in parts if part)


def _unit(directory: str, place: str, members: tuple[str, ...], files: _Files) -> Unit:
    return Unit(
        _name(directory, members),
        place,
        max(files[name].modified_seconds for name in members),
        sum(files[name].size for name in members),
        members,
    )


def _name(directory: str, members: Iterable[str]) -> str:
    listed = "\0".join(members).encode("utf-8", "surrogateescape")
    return f"{directory}{_MARK}{hashlib.blake2b(listed, digest_size=6).hexdigest()}"
