"""What made these numbers: the note that every output file carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from spark_nsfw.classifiers import ImageClassifier
from spark_nsfw.embedders import TimmImageEmbedder
from spark_nsfw.errors import InputError
from spark_nsfw.storage import resolve

__all__ = ["PROVENANCE", "inspect_output", "package_version", "provenance"]

#: The key under which the columns' metadata holds the note.
PROVENANCE = "spark_nsfw"


def package_version() -> str:
    """The installed version; ``0+unknown`` when the package runs from a plain folder."""
    try:
        return version("spark-nsfw")
    except PackageNotFoundError:
        return "0+unknown"


def provenance(
    embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier]
) -> dict[str, Any]:
    """Tower, detectors, their weights and the version of this package, as plain JSON types."""
    return {
        "version": package_version(),
        "embedder": embedder.describe(),
        "classifiers": [classifier.describe() for classifier in classifiers],
    }


def inspect_output(output: str) -> dict[str, list[str]]:
    """The notes of an output's Parquet files: note as indented JSON → the files that have it.

    Args:
        output: directory of Parquet files, or one file; a path or URL.

    Raises:
        InputError: there are no Parquet files.
    """
    filesystem, path = resolve(output)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        files = [path]
    else:
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        files = sorted(
            info.path
            for info in filesystem.get_file_info(selector)
            if info.base_name.endswith(".parquet") and not info.base_name.startswith((".", "_"))
        )
    if not files:
        raise InputError(f"{output}: there are no Parquet files")
    notes: dict[str, list[str]] = {}
    with ThreadPoolExecutor(16) as pool:
        for file, note in zip(files, pool.map(lambda f: _note(filesystem, f), files), strict=True):
            notes.setdefault(note, []).append(file)
    return notes


def _note(filesystem: fs.FileSystem, path: str) -> str:
    try:
        with filesystem.open_input_file(path) as stream:
            footer = pq.read_metadata(stream).metadata or {}
    except (OSError, pa.ArrowException) as exc:
        return f"unreadable: {exc}"
    columns = json.loads(footer.get(b"org.apache.spark.sql.parquet.row.metadata", b"{}"))
    for column in columns.get("fields", []):
        if PROVENANCE in column["metadata"]:
            note = json.loads(column["metadata"][PROVENANCE])
            return json.dumps(note, indent=2, sort_keys=True)
    return "no note: not written by spark_nsfw"
