"""Copying selected samples from shard to shard: ``python -m benchmarks.export``.

One shard of 100 KB images with caption and JSON, in the page cache. The process's own time counts,
the kernel's for it included, not that of others nor of the disk; the ways take turns, and the
median of the rounds counts. Rates are of what is written.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.table import report
from examples.photographs import write_shard
from spark_nsfw.use.regroup import ExportOptions, OutputShard, Piece
from spark_nsfw.use.tar_writer import write_output_shard


def export(folder: Path, rows: int, options: ExportOptions) -> int:
    """Bytes of the tar that the core writes for the first ``rows`` of the selection."""
    shard = OutputShard("00000", 0, (Piece("s", 0, rows),))
    urls, selections = {"s": str(folder / "s.tar")}, {"s": [str(folder / "selection.parquet")]}
    return write_output_shard(shard, urls, selections, str(folder / "out"), options, {}).num_bytes


def read_and_add(folder: Path, keys: set[str]) -> int:
    """What NeMo Curator's ``to_webdataset`` does: all members into memory, then add each."""
    with tarfile.open(folder / "s.tar") as archive:
        kept = [
            (member, stream.read())
            for member in archive.getmembers()
            if member.name.partition(".")[0] in keys
            and (stream := archive.extractfile(member)) is not None
        ]
    with tarfile.open(folder / "added.tar", "w") as archive:
        for member, content in kept:
            archive.addfile(member, io.BytesIO(content))
    return (folder / "added.tar").stat().st_size


def copy_file(folder: Path) -> int:
    """The whole shard, by the operating system."""
    shutil.copyfile(folder / "s.tar", folder / "copy.tar")
    return (folder / "copy.tar").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = [f"{number:09}" for number in range(options.samples)]
        members = [("jpg", os.urandom(100_000)), ("txt", b"a caption"), ("json", b"{}")]
        write_shard(folder / "s.tar", ((key, members) for key in keys))
        halves = keys[::2] + keys[1::2]  # so that the first half is every other sample
        selection = pa.table({"key": halves, "status": ["ok"] * len(keys)})
        pq.write_table(selection, folder / "selection.parquet")
        half = len(keys) // 2
        renumbered = ExportOptions(samples_per_shard=10_000, renumber=True)
        ways: dict[str, Callable[[], int]] = {
            "copy of the file": lambda: copy_file(folder),
            "export, all": lambda: export(folder, len(keys), ExportOptions()),
            "export, every other": lambda: export(folder, half, ExportOptions()),
            "export, all, new keys": lambda: export(folder, len(keys), renumbered),
            "tarfile, read and add, all": lambda: read_and_add(folder, set(keys)),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                started = time.process_time()
                num_bytes = run()
                rates[way].append(num_bytes / 1e6 / (time.process_time() - started))
        assert (folder / "copy.tar").stat().st_size > 100_000 * options.samples
    first = statistics.median(rates["copy of the file"])
    report(
        "export",
        [
            {"way": way, "MB/CPU s": (rate := statistics.median(found)), "of a copy": rate / first}
            for way, found in rates.items()
        ],
    )


if __name__ == "__main__":
    main()
