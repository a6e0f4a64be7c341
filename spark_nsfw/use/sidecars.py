"""Rows of shards → a sidecar Parquet beside each tar."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq

from spark_nsfw.files import exists, move_file
from spark_nsfw.note import note_in
from spark_nsfw.ownership import STATE
from spark_nsfw.read.source import Unit
from spark_nsfw.storage import open_input, resolve
from spark_nsfw.use.metadata import MetadataFiles

__all__ = ["move_beside_shards"]

#: Where a sidecar goes that we did not write; readers skip names with an underscore.
_REPLACED = f"{STATE}_replaced"


def move_beside_shards(staging: str, units: Sequence[Unit]) -> None:
    """Give the rows of each shard the place and name of its sidecar.

    Args:
        staging: an output that has rows of all of them, whole.
        units: the shards, each a tar.
    """
    files = MetadataFiles(staging).files()

    def move(unit: Unit) -> None:
        if unit.name not in files:
            return
        (file,) = files[unit.name]
        sidecar = unit.place.removesuffix(".tar") + ".parquet"
        directory, _, name = sidecar.rpartition("/")
        if not _is_ours_or_absent(sidecar):
            filesystem, path = resolve(f"{directory}/{_REPLACED}")
            filesystem.create_dir(path)
            copies = (f"{directory}/{_REPLACED}/{name}" + f".{n}" * (n > 0) for n in count())
            move_file(sidecar, next(copy for copy in copies if not exists(copy)))
        move_file(file, sidecar)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(move, units))


def _is_ours_or_absent(sidecar: str) -> bool:
    if not exists(sidecar):
        return True
    try:
        with open_input(sidecar) as stream:
            return note_in(pq.read_metadata(stream).metadata or {}) is not None
    except pa.ArrowException:
        return False
