"""Stored embeddings, row by row: the source that reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spark_nsfw.errors import InputError, NothingToReadError, ShardUnreadableError, StorageError
from spark_nsfw.note import note_in
from spark_nsfw.read.layouts import PARTITION, EmbeddingFile, embedding_files, files_of
from spark_nsfw.read.naming import output_name, spark_type
from spark_nsfw.read.parquet import (
    footer,
    iter_batches,
    merged_schema,
    open_parquet,
    stand_in,
    with_own_columns,
)
from spark_nsfw.read.source import Rows, Unit
from spark_nsfw.schema import (
    ERROR_MESSAGE,
    KEY,
    SCHEMA_PARTITION,
    SHARD,
    STATUS,
    Status,
    sample_schema,
    without_image,
)
from spark_nsfw.storage import absolute, is_below, open_input

__all__ = ["EmbeddingSource"]

#: Of a row that stands for a shard.
_NO_EMBEDDING = pa.nulls(1, pa.list_(pa.float32()))

#: Rows in an Arrow batch: 6 MiB of embeddings of width 768. More fall out of a core's cache.
_BATCH_ROWS = 2048


@dataclass(frozen=True)
class EmbeddingSource:
    """Embeddings that lie in files; a `spark_nsfw.read.source.Source` with a unit per shard.

    Attributes:
        metadata: the directory, or one Parquet file.
        width: D of the embeddings.
        embedding_column: the column that holds them; in the output for ``.npy``, too.
        id_col: the column that holds the sample's key.
        columns: source name → name in the output, of the columns that go along.
        own: these columns, as their files' types have them in common.
        has_status: whether the rows already have the columns ``status`` and ``error_message``.
        embedder: what made the embeddings, as their provenance has it; empty if unknown.
    """

    metadata: str
    width: int
    embedding_column: str
    id_col: str
    columns: dict[str, str]
    own: tuple[pa.Field, ...]
    has_status: bool
    embedder: dict[str, Any]

    @classmethod
    def open(
        cls, metadata: str, embedding_column: str = "image_embedding", id_col: str | None = None
    ) -> EmbeddingSource:
        """Read every file's footer, and the first embedding.

        Args:
            metadata: a directory in a known layout, or one Parquet file; a path or URL.
            embedding_column: holds the embeddings.
            id_col: holds the samples' keys; None takes ``key``, and ``image_path`` for
                clip-retrieval.

        Raises:
            NothingToReadError: there are no files.
            InputError: no such column, no embedding, or a column whose types
                in two files have none in common.
            StorageError: a file cannot be read now.
        """
        metadata = absolute(metadata)
        files = embedding_files(metadata)
        if id_col is None:
            id_col = KEY if files[0].npy is None else "image_path"
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(footer, (file.parquet for file in files)))
        footers = [each for each in found if each is not None]
        if not footers:
            raise InputError(f"{metadata}: none of its Parquet files can be read")
        merged = merged_schema([file.parquet for file in files], found)
        for name in (id_col, *([] if files[0].npy else [embedding_column])):
            if name not in merged.names:
                raise InputError(
                    f"{metadata} has no column {name!r}; there are {', '.join(merged.names)}. "
                    "`spark-nsfw score --model …` writes embeddings; --embedding-column and "
                    "--id-col name other columns"
                )
        notes = [note_in(each.metadata or {}) for each in footers]
        # img2dataset's sidecars have columns of these names, too, with another meaning.
        ours = {KEY, STATUS, ERROR_MESSAGE} <= set(merged.names) and (
            notes[0] is not None or PARTITION.match(files[0].parquet) is not None
        )
        columns = {}
        for name in merged.names:
            if name == embedding_column or (ours and name in (SHARD, KEY, STATUS, ERROR_MESSAGE)):
                continue
            output = name if ours else output_name(name, id_col)
            if output is not None:
                columns[name] = output
        towers = {json.dumps((note or {}).get("embedder", {}), sort_keys=True) for note in notes}
        return cls(
            metadata=metadata,
            width=_first_width(files, embedding_column, metadata),
            embedding_column=embedding_column,
            id_col=id_col,
            columns=columns,
            own=tuple(
                pa.field(output, spark_type(merged.field(name).type))
                for name, output in columns.items()
            ),
            has_status=ours,
            embedder=json.loads(towers.pop()) if len(towers) == 1 else {},
        )

    def describe(self) -> dict[str, Any]:
        """Kind and root of the input, what made the embeddings, and which columns go along."""
        return {
            "inputs": {"kind": "embeddings", "root": self.metadata},
            "embedder": self.embedder,
            "rows": {"columns": list(self.columns)},
        }

    def covers(self, url: str) -> bool:
        """Whether an output there would be read as input, or holds the input."""
        return is_below(url, self.metadata) or is_below(self.metadata, url)

    def units(self) -> list[Unit]:
        """A unit for each shard that has embeddings now, sorted by name.

        Raises:
            NothingToReadError: there are none.
            InputError: two files of different places are of one shard.
        """
        units: dict[str, Unit] = {}
        for file in embedding_files(self.metadata):
            unit = Unit(file.shard, file.place)
            other = units.setdefault(unit.name, unit)
            if other != unit:
                raise InputError(
                    f"{other.place} and {unit.place} would both be shard {unit.name!r}: "
                    "classify them in two runs"
                )
        units.pop(SCHEMA_PARTITION, None)
        if not units:
            raise NothingToReadError(f"{self.metadata}: there are no Parquet files with rows")
        return sorted(units.values(), key=lambda unit: unit.name)

    def schema(
        self, own: Sequence[pa.Field] | None = None, units: Sequence[Unit] | None = None
    ) -> pa.Schema:
        """The columns of its rows, without the embedding."""
        own = self.own if own is None else own
        return without_image(sample_schema(passthrough=own, locations=False))

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[Rows]:
        """The rows of a shard, each batch with a list array (N,) of its embeddings.

        A file that is damaged gives the rows that can be read and one row that stands for it.

        Raises:
            FileNotFoundError: the files are gone.
            StorageError: they cannot be read now.
        """
        num_rows = 0
        for file in files_of(unit):
            try:
                for rows, embeddings in self._read(file):
                    num_rows += rows.num_rows
                    yield self._batch(file, rows, schema), embeddings
            except (StorageError, FileNotFoundError):
                raise
            except (OSError, pa.ArrowException, ShardUnreadableError) as exc:
                num_rows += 1
                message = str(exc) if file.parquet in str(exc) else f"{file.parquet}: {exc}"
                yield stand_in(unit.name, Status.SHARD_UNREADABLE, message, schema), _NO_EMBEDDING
        if not num_rows:
            message = f"{unit.place} has no rows"
            yield stand_in(unit.name, Status.SHARD_EMPTY, message, schema), _NO_EMBEDDING

    def _read(self, file: EmbeddingFile) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
        """Rows, and their embeddings as lists of any float type."""
        with open_input(file.parquet) as stream:
            parquet = open_parquet(stream)
            needed = {self.id_col, *([self.embedding_column] if file.npy is None else [])}
            missing = needed - set(parquet.schema_arrow.names)
            if missing:
                raise ShardUnreadableError(f"it has no column {', '.join(sorted(missing))}")
            if file.npy is None:
                wanted = needed | {*self.columns, STATUS, ERROR_MESSAGE}
                columns = [name for name in parquet.schema_arrow.names if name in wanted]
                for rows in iter_batches(parquet, _BATCH_ROWS, columns):
                    yield rows, rows.column(self.embedding_column)
                return
            with open_input(file.npy) as npy:
                shape, dtype = _npy_header(npy, file.npy)
                if shape[0] != parquet.metadata.num_rows:
                    raise ShardUnreadableError(
                        f"{file.npy} has {shape[0]:,} embeddings, {file.parquet} "
                        f"{parquet.metadata.num_rows:,} rows: they do not belong together"
                    )
                for rows in iter_batches(parquet, _BATCH_ROWS):
                    content = npy.read(rows.num_rows * shape[1] * dtype.itemsize)
                    if len(content) < rows.num_rows * shape[1] * dtype.itemsize:
                        raise ShardUnreadableError(f"{file.npy} is cut off")
                    values = pa.array(np.frombuffer(content, dtype))
                    yield rows, pa.FixedSizeListArray.from_arrays(values, shape[1])

    def _batch(
        self, file: EmbeddingFile, rows: pa.RecordBatch, schema: pa.Schema
    ) -> pa.RecordBatch:
        """The columns of rows, in the order and of the types of the schema."""
        arrays: dict[str, pa.Array] = {
            SHARD: pa.repeat(pa.scalar(file.shard, pa.string()), rows.num_rows),
            KEY: rows.column(self.id_col).cast(pa.string()),
            STATUS: pa.repeat(pa.scalar(Status.OK.value), rows.num_rows),
        }
        if self.has_status:
            for name in (STATUS, ERROR_MESSAGE):
                if name in rows.schema.names:
                    arrays[name] = rows.column(name).cast(pa.string())
            arrays[STATUS] = pc.fill_null(arrays[STATUS], Status.OK.value)
        return with_own_columns(arrays, rows, self.columns, schema)


def _npy_header(stream: BinaryIO, url: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an ``.npy`` file; the stream stands at the first value then.

    Raises:
        ShardUnreadableError: it is no array of embeddings.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read_header(stream)
    except ValueError as exc:
        raise ShardUnreadableError(f"{url} is no .npy file: {exc}") from exc
    if len(shape) != 2 or dtype.kind != "f" or fortran_order:
        raise ShardUnreadableError(
            f"{url} is no array of embeddings (N, D) row by row: {dtype}, shape {shape}"
        )
    return shape, dtype


def _first_width(files: Sequence[EmbeddingFile], embedding_column: str, metadata: str) -> int:
    for file in files:
        try:
            if file.npy is not None:
                with open_input(file.npy) as stream:
                    return int(_npy_header(stream, file.npy)[0][1])
            with open_input(file.parquet) as stream:
                for rows in iter_batches(open_parquet(stream), 64, [embedding_column]):
                    lengths = pc.drop_null(pc.list_value_length(rows.column(0)))
                    if len(lengths):
                        return int(lengths[0].as_py())
        except StorageError:
            raise
        except (OSError, pa.ArrowException, ShardUnreadableError):
            continue  # it becomes a row of its own when it is read
    raise InputError(f"{metadata} holds no embedding in column {embedding_column!r}")
