"""What made these numbers: the note that every output file carries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spark_nsfw.errors import InputError, JobError
from spark_nsfw.files import list_files
from spark_nsfw.storage import open_input

__all__ = [
    "PROVENANCE",
    "Footer",
    "inspect_output",
    "merged_note",
    "note_in",
    "package_version",
    "read_footers",
    "refuse_another_note",
    "same_note",
]

#: The key under which the columns' metadata holds the note.
PROVENANCE = "spark_nsfw"

_UNREADABLE = "unreadable"


def package_version() -> str:
    """The installed version; ``0+unknown`` when the package runs from a plain folder."""
    try:
        return version("spark-nsfw")
    except PackageNotFoundError:
        return "0+unknown"


def merged_note(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Several notes as one; entries of the same name are merged key by key."""
    note: dict[str, Any] = {"version": package_version()}
    for part in parts:
        for name, value in part.items():
            note[name] = note[name] | value if name in note else value
    return note


@dataclass(frozen=True)
class Footer:
    """What the footer of one Parquet file tells.

    Attributes:
        file: its path or URL.
        num_rows: that it holds; 0 if it cannot be read.
        note: what made them; None if that is not noted.
        problem: why there is no note; empty if there is one.
    """

    file: str
    num_rows: int
    note: dict[str, Any] | None
    problem: str = ""

    @property
    def is_readable(self) -> bool:
        """Whether it is the footer of a Parquet file."""
        return not self.problem.startswith(_UNREADABLE)


def read_footers(output: str) -> list[Footer]:
    """The footers of an output's Parquet files; no row is read.

    Args:
        output: directory of Parquet files, or one file; a path or URL.

    Raises:
        InputError: there are no Parquet files.
    """
    root, names = list_files(output)
    files = [root + name for name in names if name.endswith(".parquet")]
    if not files:
        raise InputError(f"{output} does not exist, or has no Parquet files: it is no output")
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_footer, files))


def inspect_output(output: str) -> dict[str, list[Footer]]:
    """The notes of an output's Parquet files: note as indented JSON → the files' footers.

    Args:
        output: directory of Parquet files, or one file; a path or URL.

    Raises:
        InputError: there are no Parquet files.
    """
    notes: dict[str, list[Footer]] = {}
    for footer in read_footers(output):
        note = footer.problem or json.dumps(footer.note, indent=2, sort_keys=True)
        notes.setdefault(note, []).append(footer)
    return notes


def _footer(path: str) -> Footer:
    try:
        with open_input(path) as stream:
            metadata = pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as exc:
        return Footer(path, 0, None, f"{_UNREADABLE}: {exc}")
    note = note_in(metadata.metadata or {})
    problem = "no note: not written by spark_nsfw" if note is None else ""
    return Footer(path, metadata.num_rows, note, problem)


def note_in(footer: Mapping[bytes, bytes]) -> dict[str, Any] | None:
    """The note in the footer of a Parquet file; None if there is none that parses.

    Spark keeps it in a column's metadata, an exported sidecar in the footer itself.
    """
    try:
        if PROVENANCE.encode() in footer:
            return dict(json.loads(footer[PROVENANCE.encode()]))
        columns = json.loads(footer.get(b"org.apache.spark.sql.parquet.row.metadata", b"{}"))
        for column in columns.get("fields", []):
            if PROVENANCE in column["metadata"]:
                return dict(json.loads(column["metadata"][PROVENANCE]))
    except (ValueError, TypeError, AttributeError, KeyError):
        pass  # another program uses the same names
    return None


def same_note(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether rows with these notes may share an output."""
    return not any(_differences(before, now, ""))


def refuse_another_note(
    output: str,
    before: dict[str, Any],
    now: dict[str, Any],
    remedy: str = "or delete this one to start anew",
) -> None:
    """Refuse to mix rows that were made with different settings in one output.

    Args:
        output: where it is.
        before, now: the notes of the rows that are there and of those to be added.
        remedy: what the user can do instead of giving another output.

    Raises:
        JobError: names both sides of every difference. The path of a weight file and the
            version of this package do not count: what changes scores is noted separately.
    """
    changed = sorted(_differences(before, now, ""))
    if changed:
        raise JobError(
            f"{output} was made with different settings: {'; '.join(changed)}. "
            f"Give another output, {remedy}"
        )


def _differences(before: Any, now: Any, name: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for position, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{name}.{position}")
    elif before != now and name != "version" and not name.endswith(".source"):
        yield f"{name.removeprefix('rows.')} was {json.dumps(before)}, is now {json.dumps(now)}"
