"""Selected samples → a WebDataset shard, copied as they are.

The selection of a shard is Parquet: its metadata rows in the order of the tar, each with
whether it is kept. A tar appears under its name once it is whole, and its sidecar Parquet
after that: an output shard that has its sidecar is done.
"""

from __future__ import annotations

import copy
import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spark_nsfw.errors import JobError, ShardError, StorageError
from spark_nsfw.read.tar import Member, iter_runs
from spark_nsfw.schema import KEY, SHARD, STATUS, Status
from spark_nsfw.storage import open_input
from spark_nsfw.use.export_output import new_file
from spark_nsfw.use.regroup import ExportOptions, OutputShard, Piece

__all__ = ["KEPT", "SOURCE_SHARD", "Written", "write_output_shard"]

#: The sidecars' column that says which shard a sample was in before shards were regrouped.
SOURCE_SHARD = "source_shard"

#: The column of a selection that says whether a row is to be exported.
KEPT = "_kept"

_COPY_BYTES = 1 << 20


@dataclass
class Written:
    """What became of an output shard.

    Attributes:
        num_samples: in the tar and in the sidecar.
        num_bytes: of the tar.
        problems: why selected samples are not among them, for a person.
    """

    num_samples: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def write_output_shard(
    shard: OutputShard,
    shard_urls: Mapping[str, str],
    selection_urls: Mapping[str, Sequence[str]],
    output: str,
    options: ExportOptions,
    footer: Mapping[str, str],
) -> Written:
    """Write the tar and the sidecar of an output shard.

    Args:
        shard: what it consists of.
        shard_urls: where the tar of each of its pieces' shards is.
        selection_urls: the Parquet files of each one's selection.
        output: directory, a path or URL.
        options: as for `plan_shards`.
        footer: key-value metadata of the sidecar.

    Raises:
        JobError: two samples from different shards have one key, and are not renumbered.
        FileNotFoundError: a shard is gone.
        OSError: something cannot be read or written now, as a `StorageError` where it is a
            shard. Nothing is left under a final name.
    """
    written = Written()
    shard_of: dict[str, str] = {}  # key of a sample written → the shard it came from
    base = f"{output.rstrip('/')}/{shard.name}"
    with (
        new_file(f"{base}.parquet", output) as sidecar_file,  # left last, so it appears last
        new_file(f"{base}.tar", output) as tar_file,
        ExitStack() as sidecar_writer,
    ):
        tar = _TarWriter(tar_file)
        sidecar: pq.ParquetWriter | None = None
        for piece in shard.pieces:
            rows = _read_selection(selection_urls[piece.shard])
            found: list[int] = []
            new_keys: list[str] = []
            with open_input(shard_urls[piece.shard]) as source:
                for row, key, run in _iter_selected(source, rows, piece, written.problems):
                    new_key = key
                    if options.renumber:
                        new_key = options.new_key(shard.number, len(shard_of))
                    elif key in shard_of:
                        if shard_of[key] != piece.shard:
                            raise JobError(
                                f"shards {shard_of[key]} and {piece.shard} both have a sample "
                                f"{key!r}, and both would be in {shard.name}.tar: export into "
                                "another output with new keys (--renumber)"
                            )
                        written.problems.append(
                            f"{piece.shard}: a second sample {key!r} is left out, which "
                            "without new keys (--renumber) could not be told from the first"
                        )
                        continue
                    shard_of[new_key] = piece.shard
                    found.append(row)
                    new_keys.append(new_key)
                    for member in run:
                        tar.copy(source, member, new_key + member.name[len(key) :])
            table = _sidecar_rows(
                rows.take(pa.array(found, pa.int64())), new_keys, piece.shard, shard.name, options
            )
            if sidecar is None:
                schema = table.schema.with_metadata(dict(footer))
                sidecar = sidecar_writer.enter_context(
                    pq.ParquetWriter(sidecar_file, schema, compression="zstd")
                )
            sidecar.write_table(table)
        tar.finish()
    written.num_samples, written.num_bytes = len(shard_of), tar.num_bytes
    return written


class _TarWriter:
    """Appends members of other tars to a stream, as they are.

    Args:
        stream: is left open.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = io.BufferedWriter(stream, _COPY_BYTES)
        self.num_bytes = 0

    def copy(self, source: BinaryIO, member: Member, name: str) -> None:
        """Copy a member: to the bit where it keeps its name, else with the name changed.

        Raises:
            StorageError: the source cannot be read now.
            OSError: the stream cannot be written now.
        """
        header = member.header
        start = header.offset
        if name != member.name:
            renamed = copy.copy(header)
            renamed.name = name
            renamed.pax_headers = {k: v for k, v in header.pax_headers.items() if k != "path"}
            self._write(renamed.tobuf(tarfile.PAX_FORMAT))
            start = header.offset_data
        for content in _iter_content(source, member, start):
            self._write(content)
        self._write(b"\0" * (-self.num_bytes % tarfile.BLOCKSIZE))

    def finish(self) -> None:
        """Write the end-of-archive marker."""
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._write(b"\0" * (-self.num_bytes % tarfile.RECORDSIZE))
        self._stream.flush()
        self._stream.detach()

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self.num_bytes += len(content)


def _iter_content(source: BinaryIO, member: Member, start: int) -> Iterator[bytes]:
    """The bytes of a member from ``start``, a header's offset or its data's, to its end.

    Raises:
        StorageError: they cannot be read now.
    """
    remaining = _data_end(member) - start
    try:
        source.seek(start)
        while remaining:
            content = source.read(min(remaining, _COPY_BYTES))
            if not content:  # it was whole when the shard was opened
                raise StorageError(f"{member.name} was cut off while it was copied")
            yield content
            remaining -= len(content)
    except StorageError:
        raise
    except OSError as exc:
        raise StorageError(f"{member.name} cannot be read: {exc}") from exc


def _data_end(member: Member) -> int:
    """Where the content of a member ends; links have none, whatever size they state."""
    header = member.header
    return header.offset_data + (header.size if header.isreg() else 0)


def _read_selection(urls: Sequence[str]) -> pa.Table:
    """The rows to keep."""
    tables = []
    for url in urls:
        with open_input(url) as stream:
            tables.append(pq.ParquetFile(stream).read())
    rows = pa.concat_tables(tables)
    return rows.filter(rows[KEPT]).drop_columns([KEPT])


def _iter_selected(
    source: BinaryIO, rows: pa.Table, piece: Piece, problems: list[str]
) -> Iterator[tuple[int, str, list[Member]]]:
    """Find a piece's samples in its shard: row, key and members, in the order of the tar.

    What cannot be found or copied whole is added to ``problems``.
    """
    wanted = _wanted(rows, piece)
    keys = {key for key, _ in wanted}
    num_seen: Counter[str] = Counter()
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    fault = ""
    try:
        for key, run in iter_runs(source):
            if key not in keys:
                continue
            row = wanted.pop((key, num_seen[key]), None)
            num_seen[key] += 1
            if row is None:
                continue
            bad = [m.name for m in run if _data_end(m) > size or m.header.issparse()]
            if bad:
                problems.append(f"{piece.shard}: {bad[0]} is cut off, or a sparse file")
            else:
                yield row, key, run
            if not wanted:
                return
    except ShardError as exc:
        if isinstance(exc.__cause__, OSError):  # cannot be read now: another attempt may
            raise StorageError(f"{piece.shard}: {exc}") from exc
        fault = f" ({exc})"
    if wanted:
        key, _ = next(iter(wanted))
        problems.append(
            f"{piece.shard}: {len(wanted):,} selected samples are not in it, such as {key!r}{fault}"
        )


def _wanted(rows: pa.Table, piece: Piece) -> dict[tuple[str, int], int]:
    """(key, how many samples of that key come before it in the shard) → row."""
    num_repeats: Counter[str] = Counter()
    wanted = {}
    identities = zip(rows[KEY].to_pylist(), rows[STATUS].to_pylist(), strict=True)
    for row, (key, status) in enumerate(identities):
        if status == Status.KEY_REPEATED.value:
            num_repeats[key] += 1
        if piece.start <= row < piece.stop:
            repeated = status == Status.KEY_REPEATED.value
            wanted[key, num_repeats[key] if repeated else 0] = row
    return wanted


def _sidecar_rows(
    rows: pa.Table, keys: Sequence[str], shard: str, output_shard: str, options: ExportOptions
) -> pa.Table:
    """The metadata of samples as it stands beside them in their new shard."""
    count = rows.num_rows
    columns = {SHARD: pa.repeat(pa.scalar(output_shard), count)}
    columns |= {name: rows[name] for name in rows.column_names}
    if options.samples_per_shard is not None:
        columns.setdefault(SOURCE_SHARD, pa.repeat(pa.scalar(shard), count))
    if options.renumber:
        columns[options.old_id_col] = rows[options.id_col]
        columns[options.id_col] = columns[KEY] = pa.array(keys, pa.string())
    return pa.table(columns)
