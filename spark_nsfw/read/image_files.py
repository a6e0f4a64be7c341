"""A directory of image files: the source that reads them.

A unit is a leaf directory, or a part of a large one. Its name is the directory's path below the
input root, and after an ``@`` a digest of its files' names: files that come later are another unit,
and those that are in the output already never move to a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from spark_nsfw.errors import InputError
from spark_nsfw.files import FileEntry
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS
from spark_nsfw.read.source import Rows, Unit
from spark_nsfw.read.tar import MAX_MEMBER_BYTES
from spark_nsfw.schema import IMAGE, KEY, SHARD, STATUS, Status, sample_schema
from spark_nsfw.storage import RetryingFile

__all__ = ["FilesSource", "ReadFile", "read_files", "suffixes_of"]

#: Files in a unit, at most about twice as many on average in the parts of a large directory.
_FILES_PER_UNIT = 1_000

#: Files that are read at a time: a store answers after tens of milliseconds.
_NUM_READERS = 16

#: Rows in an Arrow batch, and the bytes of images after which it is closed.
_BATCH_ROWS, _BATCH_BYTES = 256, 32 << 20

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
    """

    content: bytes | None
    status: Status = Status.OK
    error_message: str | None = None


def read_files(urls: Iterable[str | None], max_bytes: int = MAX_MEMBER_BYTES) -> Iterator[ReadFile]:
    """Read files, in order, several at a time.

    Args:
        urls: paths or URLs; None has no file.
        max_bytes: larger files are not read.

    Raises:
        StorageError: one cannot be read now.
        InputError: no filesystem for this kind of URL.
    """

    def read(url: str | None) -> ReadFile:
        if url is None:
            return ReadFile(None, Status.IMAGE_MISSING, "there is no path")
        try:
            with closing(RetryingFile(url)) as file:
                if file.size <= max_bytes:
                    return ReadFile(file.read_at(0, file.size))
                message = f"{url} has {file.size:,} bytes, the limit is {max_bytes:,}"
                return ReadFile(None, Status.MEMBER_OVERSIZED, message)
        except UnicodeEncodeError:  # pyarrow opens no such file
            message = f"{_key(url)} is no name in UTF-8: rename the file"
            return ReadFile(None, Status.IMAGE_MISSING, message)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return ReadFile(None, Status.IMAGE_MISSING, f"{url} does not exist, or is no file")

    waiting = iter(urls)
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="image-files") as pool:
        under_way: list[Future[ReadFile]] = []
        try:
            while under_way or (first := list(islice(waiting, 1))):
                if not under_way:
                    under_way.append(pool.submit(read, first[0]))
                under_way += [
                    pool.submit(read, url)
                    for url in islice(waiting, 2 * _NUM_READERS - len(under_way))
                ]
                yield under_way.pop(0).result()
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
    """

    inputs: ShardInputs
    max_image_bytes: int = MAX_MEMBER_BYTES

    @classmethod
    def of(cls, paths: Any, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> FilesSource:
        """Of directories, files, globs or ranges; files of other extensions are no images."""
        return cls(ShardInputs.parse(paths, suffixes_of(extensions)))

    def describe(self) -> dict[str, Any]:
        """Kind and roots of the input, and what decides which rows come out."""
        return {
            "inputs": {
                "kind": "files",
                "filesystem": self.inputs.filesystem,
                "roots": list(self.inputs.roots),
            },
            "rows": {
                "suffixes": list(self.inputs.suffixes),
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
        for path, entry in self.inputs.list_files().items():
            place, _, base = path.rpartition("/")
            directories.setdefault(place, {})[base] = entry
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
            units += [_unit(name, place, part) for part in _parts(files)]
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
        stale: dict[str, list[str]] = {}
        for name in sorted(done - {unit.name for unit in units}):
            if _directory(name) in planned:
                stale.setdefault(_directory(name), []).append(name)
        keys = keys_of([name for names in stale.values() for name in names])
        left: list[Unit] = []
        doubled: list[str] = []
        for directory, parts in planned.items():
            taken = {_key(name) for part in parts if part.name in done for name in part.members}
            for name in stale.get(directory, ()):
                if keys[name].isdisjoint(taken):
                    taken |= keys[name]
                else:  # two runs saw different files at the same time
                    doubled.append(name)
            for part in parts:
                members = tuple(name for name in part.members if _key(name) not in taken)
                if part.name in done or len(members) == len(part.members):
                    left.append(part)
                elif members:
                    left.append(replace(part, name=_name(directory, members), members=members))
        return left, doubled

    def unit_named(self, name: str) -> Unit:
        """The unit of a name that an output has, without listing any; its files are not known."""
        directory = _directory(name)
        place = self.inputs.place_of(f"{directory}/x" if directory else "x")
        return Unit(name, place.rpartition("/")[0])

    def schema(
        self, own: Sequence[pa.Field] | None = None, units: Sequence[Unit] | None = None
    ) -> pa.Schema:
        """The columns of its rows, without the image; files bring none of their own."""
        schema = sample_schema(locations=False)
        return schema.remove(schema.get_field_index(IMAGE))

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[Rows]:
        """The files of a unit, in order of their names.

        Raises:
            StorageError: one cannot be read now.
        """
        urls = [f"{unit.place}/{name}" for name in unit.members]
        keys: list[str] = []
        read: list[ReadFile] = []
        num_bytes = 0
        for name, file in zip(unit.members, read_files(urls, self.max_image_bytes), strict=True):
            keys.append(_key(name))
            read.append(file)
            num_bytes += len(file.content or b"")
            if len(keys) >= _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
                yield _rows(unit.name, keys, read, schema)
                keys, read, num_bytes = [], [], 0
        if keys:
            yield _rows(unit.name, keys, read, schema)


def _key(name: str) -> str:
    r"""A file's name as text: what is not UTF-8 in it as ``\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _directory(name: str) -> str:
    """Of a unit."""
    return name.rpartition(_MARK)[0]


def _rows(shard: str, keys: list[str], read: list[ReadFile], schema: pa.Schema) -> Rows:
    values = {
        SHARD: [shard] * len(keys),
        KEY: keys,
        STATUS: [file.status.value for file in read],
        "error_message": [file.error_message for file in read],
    }
    arrays = [pa.array(values[name], pa.string()) for name in schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=schema), [file.content for file in read]


def _parts(files: Mapping[str, FileEntry]) -> Iterator[dict[str, FileEntry]]:
    """A directory's files in parts; a file stays in its part while their number is the same.

    The number is a power of two, and a file's part follows from its name alone.
    """
    number = 1
    while len(files) > number * _FILES_PER_UNIT:
        number *= 2
    parts: list[dict[str, FileEntry]] = [{} for _ in range(number)]
    for name in sorted(files):
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4)
        parts[int.from_bytes(digest.digest(), "little") % number][name] = files[name]
    yield from (part for part in parts if part)


def _unit(directory: str, place: str, files: Mapping[str, FileEntry]) -> Unit:
    return Unit(
        _name(directory, files),
        place,
        max(entry.modified_seconds for entry in files.values()),
        sum(entry.size for entry in files.values()),
        tuple(files),
    )


def _name(directory: str, members: Iterable[str]) -> str:
    listed = "\0".join(members).encode("utf-8", "surrogateescape")
    return f"{directory}{_MARK}{hashlib.blake2b(listed, digest_size=6).hexdigest()}"
