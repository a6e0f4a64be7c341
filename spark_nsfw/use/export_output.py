"""The directory that an export writes to.

::

    clean/
    ├── 00000.tar, 00000.parquet          # an output shard and its sidecar
    └── _spark_nsfw/                      # readers skip names with an underscore
        ├── plan.json                     # what is exported: the selection is complete
        ├── selection/<uuid>/shard=…/     # which rows are kept; deleted in the end
        └── partial/<uuid>                # files that are being written
"""

from __future__ import annotations

import json
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spark_nsfw.errors import InputError
from spark_nsfw.files import list_files, move_file
from spark_nsfw.note import note_in
from spark_nsfw.ownership import (
    STATE,
    delete_our_files,
    refuse_foreign_entries,
    refuse_overlap,
)
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.schema import SCHEMA_PARTITION, SHARD
from spark_nsfw.storage import absolute, is_below, open_input, resolve

__all__ = [
    "delete_partial_files",
    "delete_selections",
    "finished_shards",
    "new_file",
    "read_plan",
    "refuse_export",
    "refuse_foreign_output",
    "selection_directory",
    "write_plan",
]

_PLAN = "plan.json"
_PLAN_KEYS = {"request", "selection", "num_rows", "num_selected", "num_selected_by_shard"}

_UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_PARTIAL_FILE = re.compile(_UUID)
#: What Spark writes, Databricks' markers and the checksums of local files included.
_SELECTION_FILE = re.compile(
    rf"{_UUID}/(.*/)?\.?(part-\d+-[^/]*\.parquet|_SUCCESS|_(started|committed)_\d+)(\.crc)?",
    re.DOTALL,
)


def refuse_export(
    metadata: str, output: str, inputs: ShardInputs, *, allow_moved: bool = False
) -> None:
    """Refuse an export that would read the wrong shards or write in the wrong place.

    Args:
        metadata: path or URL of what was scored.
        output: path or URL of the directory for the new shards.
        inputs: where the shards are that were scored.
        allow_moved: accept shards in another place than the one that was scored.

    Raises:
        InputError: the output is, lies in or holds the metadata or a shard's directory, or has
            files that no export wrote; the metadata does not exist, or is of other shards.
        StorageError: something cannot be read now.
    """
    metadata, output = absolute(metadata), absolute(output)
    refuse_overlap(output, [metadata, *_places(inputs)])
    prefix, names = list_files(metadata)
    files = [prefix + name for name in names if name.endswith(".parquet")]
    if not files:
        raise InputError(f"{metadata} does not exist, or has no metadata in it")
    refuse_foreign_output(output)
    _refuse_other_inputs(metadata, _note(files), inputs, allow_moved)


def _places(inputs: ShardInputs) -> list[str]:
    return [inputs.filesystem + root for root in inputs.roots]


def _note(files: list[str]) -> dict[str, Any]:
    """What made the metadata, by its partition without rows or else by any file."""
    file = next((file for file in files if f"{SHARD}={SCHEMA_PARTITION}/" in file), files[0])
    with open_input(file) as stream:
        try:
            return note_in(pq.read_metadata(stream).metadata or {}) or {}
        except pa.ArrowException:
            return {}  # Spark will say what is wrong with it


def _refuse_other_inputs(
    metadata: str, note: dict[str, Any], inputs: ShardInputs, allow_moved: bool
) -> None:
    scored = note.get("inputs", {})
    kind = scored.get("kind", "webdataset")
    if kind in ("parquet", "files"):
        raise InputError(
            f"{metadata} was made from {kind}, and export copies samples of shards: take the rows "
            "to keep from the metadata, by shard and key (docs/inputs.md)"
        )
    if allow_moved or "roots" not in scored or kind != "webdataset":
        return  # written before roots were noted, or of stored embeddings
    places = [scored.get("filesystem", "") + root for root in scored["roots"]]
    for given in _places(inputs):
        if not any(_is_same_place(given, place) for place in places):
            raise InputError(
                f"{metadata} is of the shards in {', '.join(places)}, not of those in {given}: "
                "give the input that was scored, or --allow-moved (allow_moved=True) if it is "
                "the same dataset in another place"
            )


def _is_same_place(one: str, other: str) -> bool:
    try:
        return is_below(one, other) and is_below(other, one)
    except InputError:  # noted on a machine with filesystems that this one lacks
        return one == other


def refuse_foreign_output(output: str) -> None:
    """Refuse a directory with files that no export wrote, unless an export began it.

    Raises:
        InputError: names such a file.
        StorageError: it cannot be listed now.
    """
    if read_plan(output) is not None:
        return
    maker = "`spark-nsfw export`"
    refuse_foreign_entries(output, lambda name: name == STATE, maker)
    state = f"{output.rstrip('/')}/{STATE}"
    refuse_foreign_entries(state, lambda name: name in ("selection", "partial"), maker)


def read_plan(output: str) -> dict[str, Any] | None:
    """The plan of an export; None where there is none, so that no selection is complete.

    Raises:
        InputError: there is a file in its place that is no plan.
        StorageError: it cannot be read now.
    """
    url = f"{output.rstrip('/')}/{STATE}/{_PLAN}"
    try:
        with open_input(url) as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        plan = json.loads(content)
    except ValueError:
        plan = None
    if not isinstance(plan, dict) or not plan.keys() >= _PLAN_KEYS:
        raise InputError(
            f"{url} is not from `spark-nsfw export`: give the export a directory of its own"
        )
    return plan


def write_plan(output: str, plan: dict[str, Any]) -> None:
    """Say that a selection is complete: later runs go on with it.

    Raises:
        OSError: it cannot be written now.
    """
    content = json.dumps(plan, indent=1).encode()
    with new_file(f"{output.rstrip('/')}/{STATE}/{_PLAN}", output) as file:
        file.write(content)


@contextmanager
def new_file(url: str, output: str) -> Iterator[BinaryIO]:
    """A file to write that appears under its name once it is whole.

    It grows under another name: where an exception leaves the block, pyarrow publishes on an
    object store what was written so far, and it is deleted.

    Args:
        url: its path or URL.
        output: the directory of the whole export.

    Raises:
        OSError: it cannot be written now.
    """
    filesystem, path = resolve(url)
    partial_url = f"{output.rstrip('/')}/{STATE}/partial/{uuid.uuid4()}"
    _, partial = resolve(partial_url)
    filesystem.create_dir(posixpath.dirname(partial))
    try:
        with filesystem.open_output_stream(partial) as stream:
            yield stream
        filesystem.create_dir(posixpath.dirname(path))
        move_file(partial_url, url)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(partial)
        raise


def selection_directory(output: str, plan: dict[str, Any]) -> str:
    """Where the selection of a plan is: in a directory that no other run writes to."""
    return f"{output.rstrip('/')}/{STATE}/selection/{plan['selection']}"


def finished_shards(output: str) -> set[str]:
    """The names of the output shards that are there with their sidecars."""
    _, names = list_files(output)
    there = set(names)
    return {
        name.removesuffix(".parquet")
        for name in names
        if name.endswith(".parquet") and name.removesuffix("parquet") + "tar" in there
    }


def delete_selections(output: str) -> None:
    """Delete which rows exports into this output selected, and nothing else.

    Raises:
        StorageError: something cannot be deleted now.
    """
    directory = f"{output.rstrip('/')}/{STATE}/selection"
    delete_our_files(directory, lambda name: _SELECTION_FILE.fullmatch(name) is not None)


def delete_partial_files(output: str) -> None:
    """Delete what runs that were stopped had begun to write, and nothing else.

    Raises:
        StorageError: something cannot be deleted now.
    """
    directory = f"{output.rstrip('/')}/{STATE}/partial"
    delete_our_files(directory, lambda name: _PARTIAL_FILE.fullmatch(name) is not None)
