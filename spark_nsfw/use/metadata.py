"""The files of an output: which units are done, which files are ours. No Spark needed.

::

    metadata/
    ├── shard=00000/part-00000-….zstd.parquet     # a unit's rows: a unit that has them is done
    ├── shard=__schema__/part-….parquet           # no rows: columns, note, shard names are strings
    └── _spark_nsfw/summary.json                  # what the last run printed at its end
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from spark_nsfw.errors import InputError, JobError, StorageError
from spark_nsfw.files import (
    FileEntry,
    delete_empty_directories,
    delete_files,
    find_file,
    is_hidden,
    iter_files,
    write_file,
)
from spark_nsfw.note import note_in, same_note
from spark_nsfw.ownership import STATE
from spark_nsfw.read.source import Source, Unit
from spark_nsfw.schema import KEY, SCHEMA_PARTITION, SHARD, STATUS, Status
from spark_nsfw.storage import absolute, hadoop_path, ignores_case, open_input, resolve

__all__ = [
    "MetadataFiles",
    "refuse_foreign_files",
    "refuse_names",
    "refuse_place",
]

_log = logging.getLogger(__name__)

_SCHEMA_FILE = f"{SHARD}={SCHEMA_PARTITION}/part-00000-schema.zstd.parquet"

#: Files that are read at a time.
_NUM_READERS = 16

#: How often an output is listed whose files vanish before they are looked at.
_MAX_LISTINGS = 10

_SPARK_SCHEMA_KEY = "org.apache.spark.sql.parquet.row.metadata"

_DATA_FILE = re.compile(rf"{SHARD}=([^/]+)/([^/._][^/]*\.parquet)\Z")

#: One write's files of a partition have one UUID; ``c001`` and more where a session's
#: ``maxRecordsPerFile`` cut the first, another number in front where several tasks wrote.
_SPARK_FILE = re.compile(r"part-(\d+)-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")

#: Everything that a run, of this version or an earlier one, leaves in an output.
_OURS = re.compile(
    rf"""
    (?: {SHARD}=[^/]+/\.?part-[^/]*
      | (?:{SHARD}=[^/]+/)?(?:_SUCCESS|\._SUCCESS\.crc)
      | {STATE}/(?:summary\.json|checkpoint/.+)
      | _temporary/.+
      | \.spark-staging-[^/]+/.+
      | __magic[^/]*/.+
    )\Z""",
    re.VERBOSE,
)

#: Bytes in the name of a file or directory, on every file system in use.
_MAX_NAME_BYTES = 255

#: What Spark escapes in a partition's name with three characters each.
_ESCAPED = re.compile(r"""[\x00-\x1f"#%'*/:=?\\\x7f{\[\]^]""")


def _is_skipped(name: str) -> bool:
    """Directories of writes under way, which need not be walked."""
    return name.startswith(("_temporary", ".spark-staging-", "__magic"))


@dataclass(frozen=True)
class MetadataFiles:
    """The files of one output.

    Attributes:
        url: its directory, a path or URL.
    """

    url: str

    @classmethod
    def at(cls, path: str) -> MetadataFiles:
        """Those of an output as a person gives it: a path, perhaps relative, or a URL."""
        return cls(absolute(hadoop_path(path)).rstrip("/"))

    def _url_of(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def _data_files(self) -> dict[str, list[FileEntry]]:
        """Unit name → its files with rows; one pass over names and sizes."""
        found: dict[str, list[FileEntry]] = {}
        for entry in iter_files(self.url, skip=_is_skipped):
            match = _DATA_FILE.match(entry.name)
            if match and entry.size:
                found.setdefault(unquote(match[1]), []).append(entry)
        return found

    def files(self) -> dict[str, list[str]]:
        """Unit name → paths or URLs of its files with rows, sorted."""
        return {
            unit: sorted(self._url_of(file.name) for file in files)
            for unit, files in self._data_files().items()
            if unit != SCHEMA_PARTITION
        }

    @property
    def has_files(self) -> bool:
        """Whether there is anything that a run has written."""
        return any(_OURS.match(entry.name) for entry in iter_files(self.url))

    @property
    def is_begun(self) -> bool:
        """Whether a run has written the columns of this output."""
        return self._schema_file() is not None

    def _schema_file(self) -> str | None:
        partition = self._url_of(f"{SHARD}={SCHEMA_PARTITION}")
        names = sorted(
            entry.name
            for entry in iter_files(partition)
            if entry.size and entry.name.endswith(".parquet") and entry.name[0] not in "._"
        )
        return f"{partition}/{names[0]}" if names else None

    def footer(self) -> dict[bytes, bytes] | None:
        """The key-value metadata of the file that has the columns; None if not begun."""
        url = self._schema_file()
        if url is None:
            return None
        try:
            with open_input(url) as stream:
                return dict(pq.read_metadata(pa.BufferReader(stream.read())).metadata or {})
        except pa.ArrowException as exc:
            raise JobError(f"{url} is damaged ({exc}): delete it and run again") from exc

    def note(self) -> dict[str, Any] | None:
        """What made the rows, empty if nothing was noted; None if not begun."""
        footer = self.footer()
        return None if footer is None else note_in(footer) or {}

    def spark_schema(self) -> str | None:
        """The columns as Spark's JSON, without ``shard``; None if not begun."""
        footer = self.footer()
        return None if footer is None else footer[_SPARK_SCHEMA_KEY.encode()].decode()

    def begin(self, schema: pa.Schema, spark_schema: str, footer: dict[str, str]) -> None:
        """Write the partition without rows.

        Args:
            schema: the columns without ``shard``.
            spark_schema: the same as Spark's JSON.
            footer: further key-value metadata.
        """
        metadata = {_SPARK_SCHEMA_KEY: spark_schema, **footer}
        sink = pa.BufferOutputStream()
        pq.write_table(schema.with_metadata(metadata).empty_table(), sink, compression="zstd")
        write_file(self._url_of(_SCHEMA_FILE), sink.getvalue().to_pybytes())

    def done(self) -> set[str]:
        """Names of the units whose rows are here, once.

        Where two writes left files of one unit, as two runs side by side do, those of
        the write with the smallest name stay and the others are deleted.

        Raises:
            JobError: two writes made a unit's rows with different settings.
            StorageError: files vanish as fast as they are listed.
        """
        for _ in range(_MAX_LISTINGS):
            try:
                return self._done()
            except FileNotFoundError as exc:  # a run beside this one has deleted a double
                _log.info("%s is listed again: %s", self.url, exc)
        raise StorageError(f"{self.url} cannot be listed: its files keep vanishing")

    def _done(self) -> set[str]:
        units = self._data_files()
        units.pop(SCHEMA_PARTITION, None)
        doubled = [
            name
            for unit, files in units.items()
            if len(files) > 1
            for name in self._doubled(unit, files)
        ]
        if doubled:
            self._delete(doubled)
        return set(units)

    def _delete(self, names: Iterable[str]) -> None:
        """Delete files, and the checksums that Hadoop keeps beside local ones."""
        crcs = [re.sub(r"([^/]+)\Z", r".\1.crc", name) for name in names]
        delete_files([self._url_of(name) for name in (*names, *crcs)])

    def keys(self, units: Iterable[str]) -> dict[str, set[str]]:
        """The keys of the rows of each of some units; none of a unit that has no rows.

        Raises:
            StorageError: a file cannot be read now.
        """
        names = list(units)
        for _ in range(_MAX_LISTINGS if names else 0):
            files = self._data_files()

            def keys_of(unit: str, files: dict[str, list[FileEntry]] = files) -> set[str]:
                return set().union(*(self._keys(file.name) for file in files.get(unit, ())))

            try:
                with ThreadPoolExecutor(_NUM_READERS) as pool:
                    return dict(zip(names, pool.map(keys_of, names), strict=True))
            except FileNotFoundError as exc:  # a run beside this one has deleted a double
                _log.info("%s is listed again: %s", self.url, exc)
        if names:
            raise StorageError(f"{self.url} cannot be listed: its files keep vanishing")
        return {}

    def forget(self, units: Iterable[str]) -> None:
        """Delete the files of the rows of units."""
        names = list(units)
        if names:
            files = self._data_files()
            self._delete([file.name for unit in names for file in files.get(unit, ())])

    def _doubled(self, unit: str, files: list[FileEntry]) -> Iterator[str]:
        """Of a unit's files, those that hold its rows a second time."""
        # That a unit crashed for one run gives way to the rows that another one made of it.
        names = sorted((file.name for file in files), key=lambda n: (self._is_set_aside(n), n))
        kept_write, kept_keys = "", None
        first = names[0]
        kept_splits: set[str] = set()
        for name in names:
            match = _SPARK_FILE.search(name)
            split, write = match.groups() if match else ("", name)
            if name == first:
                kept_write, kept_splits = write, {split}
            elif write != kept_write:
                self._refuse_other_note(unit, first, name)
                yield name
            elif split not in kept_splits:
                # Several tasks of one write; or a task that ran twice under two numbers.
                if kept_keys is None:
                    kept_keys = self._keys(first)
                keys = self._keys(name)
                if keys and keys <= kept_keys:
                    yield name
                else:
                    kept_keys |= keys
                    kept_splits.add(split)

    def _column(self, name: str, column: str) -> list[Any]:
        """The values of a column of a file; none if it has no such column."""
        with open_input(self._url_of(name)) as stream:
            file = pq.ParquetFile(stream)
            if column not in file.schema_arrow.names:
                return []
            return list(file.read([column])[column].to_pylist())

    def _keys(self, name: str) -> set[str]:
        return {key for key in self._column(name, KEY) if key is not None}

    def _is_set_aside(self, name: str) -> bool:
        return self._column(name, STATUS) == [Status.SHARD_CRASHED.value]

    def _refuse_other_note(self, unit: str, *names: str) -> None:
        notes = []
        for name in names:
            with open_input(self._url_of(name)) as stream:
                notes.append(note_in(pq.read_metadata(stream).metadata or {}) or {})
        if not same_note(*notes):
            raise JobError(
                f"shard {unit!r} has rows of two runs with different settings: "
                f"{self._url_of(names[0])} and {names[1]}. Delete one of the two and run again"
            )

    def delete_attempt(self, attempt: int) -> None:
        """Delete the temporary directory of one write of our own."""
        filesystem, path = resolve(self._url_of(f"_temporary/{attempt}"))
        try:
            if filesystem.get_file_info(path).type is fs.FileType.Directory:
                filesystem.delete_dir(path)
        except OSError as exc:  # a task that was cancelled may still be writing there
            _log.warning("%s/_temporary/%d was left behind: %s", self.url, attempt, exc)

    def delete(self) -> None:
        """Delete the files of ours by their names, and the directories that are empty then.

        Hidden files of others, such as a file manager's, stay.

        Raises:
            InputError: other files are there as well; nothing is deleted.
        """
        names = [entry.name for entry in iter_files(self.url)]
        ours = [name for name in names if _OURS.match(name)]
        for name in sorted({*names} - {*ours}):
            if not is_hidden(name):
                raise InputError(
                    f"{self.url} has files that spark-nsfw did not write, such as {name}: nothing "
                    "is deleted. Move them elsewhere first, or give another output"
                )
        # The columns go last: until then the rest can be told to be an output's.
        columns = [n for n in ours if n.startswith(f"{SHARD}={SCHEMA_PARTITION}/")]
        for some in (sorted({*ours} - {*columns}), columns):
            delete_files([self._url_of(name) for name in some])
        delete_empty_directories(self.url)


def refuse_place(output: str, source: Source) -> None:
    """Refuse an output that would mix with its input or with other people's files.

    Raises:
        InputError: the output is the input, lies in it or holds it; or see
            `refuse_foreign_files`.
    """
    if source.covers(output):
        raise InputError(
            f"the output {output} is the input, lies in it or holds it: give a directory of its own"
        )
    refuse_foreign_files(output)


def refuse_foreign_files(output: str) -> None:
    """Refuse an output with files that no run has written.

    Raises:
        InputError: it is a file, or a directory with such files that no run has begun.
    """
    if find_file(output) is not None:
        raise InputError(f"the output {output} is a file: give a directory of its own")
    if MetadataFiles(output).is_begun:
        return
    for entry in iter_files(output):
        if not is_hidden(entry.name) and not _OURS.match(entry.name):
            raise InputError(
                f"{output} contains files that spark-nsfw did not write, such as "
                f"{entry.name}: give a directory of its own"
            )


def refuse_names(units: Iterable[Unit], output: str) -> None:
    """Refuse units whose names cannot be partitions of one output.

    Raises:
        InputError: names both places of two names that are equal there, or the place of
            a name that is too long or ends in a dot where none may.
    """
    ignoring_case = ignores_case(output)
    no_dots = output.startswith(("abfs:", "abfss:"))
    place_of: dict[str, str] = {}
    for unit in units:
        try:
            name = f"{SHARD}={unit.name}".encode()
        except UnicodeEncodeError as exc:
            raise InputError(f"{unit.place!r}: its name is not UTF-8, rename it") from exc
        length = len(name) + 2 * len(_ESCAPED.findall(unit.name))
        if length > _MAX_NAME_BYTES:
            raise InputError(
                f"{unit.place}: its partition {SHARD}=… would have a name of {length} bytes, and "
                f"{_MAX_NAME_BYTES} is the limit: give an input closer to it, or rename it"
            )
        if no_dots and unit.name.endswith("."):
            raise InputError(
                f"{unit.place}: Azure takes no directory whose name ends in a dot: rename it"
            )
        if ignoring_case:
            other = place_of.setdefault(unit.name.casefold(), unit.place)
            if other != unit.place:
                raise InputError(
                    f"{other} and {unit.place} would be one partition of {output}, whose file "
                    "system ignores case: rename one, or score them into two outputs"
                )
