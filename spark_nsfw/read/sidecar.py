"""The Parquet file beside a shard."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from spark_nsfw.errors import ShardUnreadableError
from spark_nsfw.note import note_in
from spark_nsfw.read.naming import output_name
from spark_nsfw.schema import CONTRACT_COLUMNS, KEY
from spark_nsfw.storage import open_input

__all__ = ["Sidecar"]


class Sidecar:
    """The Parquet file beside a shard, its columns under their output names.

    Args:
        table: the file's rows.
        id_col: the column whose values are the samples' ids. A file that this package wrote
            has the samples' keys instead: after an export with new keys, a sample's JSON
            still names its old one.
        captions: the column ``caption`` is ours.

    Raises:
        ShardUnreadableError: the table has no such column.
    """

    def __init__(self, table: pa.Table, id_col: str, captions: bool = False) -> None:
        self.has_keys = note_in(table.schema.metadata or {}) is not None
        if self.has_keys:
            id_col = KEY
        if id_col not in table.column_names:
            raise ShardUnreadableError(
                f"the sidecar has no column {id_col!r} to match samples by; "
                f"its columns are {', '.join(table.column_names)}"
            )
        self._ids_are_integers = pa.types.is_integer(table[id_col].type)
        self._row_of = {str(value): row for row, value in enumerate(table[id_col].to_pylist())}
        columns = {}
        for source_name in table.column_names:
            name = output_name(source_name, id_col, captions)
            if name is None or (self.has_keys and source_name in CONTRACT_COLUMNS):
                continue
            columns[name] = table[source_name].combine_chunks()
        self.columns: dict[str, pa.Array] = columns

    @classmethod
    def read(cls, shard_url: str, id_col: str, captions: bool = False) -> Sidecar | None:
        """The sidecar of a shard, or None where there is none.

        Raises:
            ShardUnreadableError: there is one, but it is damaged or cannot be matched.
            StorageError: it cannot be read now.
        """
        url = shard_url.removesuffix(".tar") + ".parquet"
        try:
            with open_input(url) as stream:
                content = stream.read()
        except FileNotFoundError:
            return None
        try:  # from memory, where an OSError is pyarrow's word for a damaged file
            parquet = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
            return cls(parquet.read(), id_col, captions)
        except (OSError, ValueError, KeyError, pa.ArrowException, ShardUnreadableError) as exc:
            raise ShardUnreadableError(f"{url}: {exc}") from exc

    def row(self, sample_id: str) -> int | None:
        """The row of a sample, or None. Integer ids match keys with leading zeros."""
        if self._ids_are_integers and sample_id.isdecimal():
            sample_id = str(int(sample_id))
        return self._row_of.get(sample_id)
