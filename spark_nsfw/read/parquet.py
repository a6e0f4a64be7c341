"""Parquet files as others wrote them: one schema for many, batches that are not a whole file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_nsfw.errors import InputError, StorageError
from spark_nsfw.schema import ERROR_MESSAGE, SHARD, STATUS, Status
from spark_nsfw.storage import open_input

__all__ = [
    "footer",
    "iter_batches",
    "merged_schema",
    "open_parquet",
    "stand_in",
    "with_own_columns",
]

#: Of a column that is read at a time; without it a column of a whole row group would be in memory.
_BUFFER_BYTES = 8 << 20


def footer(url: str) -> pa.Schema | None:
    """The columns of a file; None if it is damaged.

    Raises:
        StorageError: it cannot be read now.
    """
    try:
        with open_input(url) as stream:
            return pq.read_schema(stream)
    except StorageError:
        raise
    except (OSError, pa.ArrowException):
        return None  # it becomes a row of its own when it is read


def merged_schema(files: Sequence[str], footers: Sequence[pa.Schema | None]) -> pa.Schema:
    """One schema for all files that can be read.

    Raises:
        InputError: names the column, both types and both files.
    """
    readable = [
        (file, found) for file, found in zip(files, footers, strict=True) if found is not None
    ]
    schemas = [found for _, found in readable]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException:
        pass  # rare: find out which
    first: dict[str, tuple[str, pa.Field]] = {}
    for file, found in readable:
        for field in found:
            before, earlier = first.setdefault(field.name, (file, field))
            try:
                pa.unify_schemas(
                    [pa.schema([earlier]), pa.schema([field])], promote_options="permissive"
                )
            except pa.ArrowException as exc:
                raise InputError(
                    f"column {field.name!r} is {earlier.type} in {before} and "
                    f"{field.type} in {file}: write one of them anew, in the other's type"
                ) from exc
    return pa.unify_schemas(schemas, promote_options="permissive")


def _widened(column: pa.Array, data_type: pa.DataType) -> pa.Array:
    """A column in a type of Spark's. Nanoseconds, and the digits that a float lacks, are cut."""
    options = pc.CastOptions(data_type, allow_time_truncate=True, allow_float_truncate=True)
    return pc.cast(column, options=options)


def with_own_columns(
    ours: Mapping[str, pa.Array],
    rows: pa.RecordBatch,
    columns: Mapping[str, str],
    schema: pa.Schema,
) -> pa.RecordBatch:
    """Rows with the columns of a schema, in its order and types.

    Args:
        ours: the columns that a source makes, by name.
        rows: what its file has.
        columns: source name → name in the output, of the columns that go along; one that the file
            lacks is null.
        schema: of the result.
    """
    source_name = {output: name for name, output in columns.items()}

    def column(field: pa.Field) -> pa.Array:
        if field.name in ours:
            return ours[field.name]
        name = source_name.get(field.name)
        if name in rows.schema.names:
            return _widened(rows.column(name), field.type)
        return pa.nulls(rows.num_rows, field.type)

    return pa.RecordBatch.from_arrays([column(field) for field in schema], schema=schema)


def stand_in(shard: str, status: Status, message: str, schema: pa.Schema) -> pa.RecordBatch:
    """A row that stands for a shard."""
    values = {SHARD: shard, STATUS: status.value, ERROR_MESSAGE: message}
    return pa.RecordBatch.from_pylist([values], schema)


def open_parquet(stream: BinaryIO) -> pq.ParquetFile:
    """A file that is read in pieces. Buffered in advance, all of it would be in memory."""
    return pq.ParquetFile(
        stream, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER_BYTES
    )


def iter_batches(
    parquet: pq.ParquetFile, num_rows: int, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Its rows, so many at a time."""
    # Threads would read the columns out of order, back and forth in one stream.
    yield from parquet.iter_batches(num_rows, columns=columns, use_threads=False)
