"""Parquet files with a column of images, as Hugging Face and img2dataset write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_nsfw.errors import InputError, ShardUnreadableError, StorageError
from spark_nsfw.read.image_files import ReadFile, read_files
from spark_nsfw.read.naming import output_name, spark_type
from spark_nsfw.read.parquet import (
    footer,
    iter_batches,
    merged_schema,
    open_parquet,
    stand_in,
    with_own_columns,
)
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.source import Rows, Unit
from spark_nsfw.read.tar import MAX_MEMBER_BYTES
from spark_nsfw.schema import (
    ERROR_MESSAGE,
    KEY,
    SHARD,
    STATUS,
    Status,
    sample_schema,
    without_image,
)
from spark_nsfw.storage import open_input

__all__ = ["ParquetSource", "has_images"]

#: Rows in an Arrow batch, at most, and the bytes of images that it has on average.
_BATCH_ROWS, _BATCH_BYTES = 256, 32 << 20

#: Names that a column of images has where there are several columns of bytes.
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files of images; a `spark_nsfw.read.source.Source` with a unit for each file.

    Attributes:
        inputs: where the files are.
        image_column: holds encoded images as binary, as Hugging Face's ``struct<bytes, path>``,
            or as paths or URLs of files.
        id_col: holds the samples' keys, ``#`` and the number of the row in its file where one is
            null; None takes that number alone.
        columns: source name → name in the output, of the columns that go along.
        own: these columns, as their files' types have them in common.
        max_image_bytes: larger images make a row with status ``member_oversized``.
        asked: the columns that were asked for; None asks for all.
    """

    inputs: ShardInputs
    image_column: str
    id_col: str | None
    columns: dict[str, str]
    own: tuple[pa.Field, ...]
    max_image_bytes: int = MAX_MEMBER_BYTES
    asked: tuple[str, ...] | None = None

    @classmethod
    def open(
        cls,
        paths: Any,
        *,
        image_column: str | None = None,
        id_col: str | None = None,
        columns: Sequence[str] | None = None,
        max_image_bytes: int = MAX_MEMBER_BYTES,
    ) -> ParquetSource:
        """Read the footer of every file.

        Args:
            paths: directories, Parquet files, globs or ranges.
            image_column: None takes the one column that can hold images.
            id_col: None takes ``key`` where there is one, else the number of a row.
            columns: which of the other columns to keep; None keeps all, () none.
            max_image_bytes: larger images are not read.

        Raises:
            NothingToReadError: there are no files.
            InputError: no column of images or several, a column that is not there, or one whose
                types in two files have none in common.
            StorageError: a file cannot be read now.
        """
        inputs = ShardInputs.parse(paths, (".parquet",))
        files = list(inputs.list_files())
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(footer, files))
        place = ", ".join(inputs.patterns)
        if all(found is None for found in footers):
            raise InputError(f"{place}: none of its Parquet files can be read")
        merged = merged_schema(files, footers)
        image_column = _image_column(merged, image_column, place)
        if id_col is not None and id_col not in merged.names:
            raise InputError(
                f"{place} has no column {id_col!r} for --id-col (id_col); "
                f"there are {', '.join(merged.names)}"
            )
        if id_col is not None and not _can_be_keys(merged.field(id_col).type):
            raise InputError(
                f"{place}: column {id_col!r} is {merged.field(id_col).type}, and keys are text or "
                "numbers: give another --id-col (id_col), or none to take the numbers of rows"
            )
        if id_col is None and all(_has_keys(found) for found in footers if found is not None):
            id_col = KEY
        wanted = merged.names if columns is None else columns
        missing = [name for name in wanted if name not in merged.names]
        if missing:
            raise InputError(
                f"{place} has no column {', '.join(missing)}; there are {', '.join(merged.names)}"
            )
        named = {
            name: output_name(name, id_col or "")
            for name in merged.names
            if name in wanted and name not in (image_column, KEY if id_col == KEY else None)
        }
        kept = {name: output for name, output in named.items() if output is not None}
        _refuse_one_name(kept, place)
        own = (pa.field(output, spark_type(merged.field(n).type)) for n, output in kept.items())
        asked = None if columns is None else tuple(columns)
        return cls(inputs, image_column, id_col, kept, tuple(own), max_image_bytes, asked)

    def describe(self) -> dict[str, Any]:
        """Kind and roots of the input, and what decides which rows come out."""
        return {
            "inputs": self.inputs.describe("parquet"),
            "rows": {
                "image_column": self.image_column,
                "id_col": self.id_col,
                "columns": None if self.asked is None else sorted(self.asked),
                "max_image_bytes": self.max_image_bytes,
            },
        }

    def covers(self, url: str) -> bool:
        """Whether an output there would be read as input, or holds the input."""
        return self.inputs.covers(url)

    def units(self) -> list[Unit]:
        """The files that are there now, sorted by name.

        Raises:
            NothingToReadError: there are none, or one that was named is missing.
            InputError: two files have one name.
        """
        return self.inputs.list_units()

    def unit_named(self, name: str) -> Unit:
        """The unit of a name that an output has, without listing any."""
        return Unit(name, self.inputs.place_of(name))

    def schema(
        self, own: Sequence[pa.Field] | None = None, units: Sequence[Unit] | None = None
    ) -> pa.Schema:
        """The columns of its rows, without the image."""
        own = self.own if own is None else own
        return without_image(sample_schema(passthrough=own, locations=False))

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[Rows]:
        """The rows of a file, each batch with its rows' encoded images.

        A file that is damaged gives the rows that can be read and one row that stands for it.

        Raises:
            FileNotFoundError: the file is gone.
            StorageError: it, or a file that a row names, cannot be read now.
        """
        num_rows = 0
        try:
            with open_input(unit.place) as stream:
                parquet = open_parquet(stream)
                for rows in iter_batches(parquet, _batch_rows(parquet), self._needed(parquet)):
                    images = self._images(rows.column(self.image_column), unit)
                    for some, held in _cut(rows, images):
                        yield self._batch(unit, some, held, num_rows, schema)
                        num_rows += some.num_rows
        except (StorageError, FileNotFoundError):
            raise
        except (OSError, pa.ArrowException, ShardUnreadableError) as exc:
            message = f"{unit.place}: {exc}"
            yield stand_in(unit.name, Status.SHARD_UNREADABLE, message, schema), [None]
        else:
            if not num_rows:
                message = f"{unit.place} has no rows"
                yield stand_in(unit.name, Status.SHARD_EMPTY, message, schema), [None]

    def _needed(self, parquet: pq.ParquetFile) -> list[str]:
        names = parquet.schema_arrow.names
        missing = [n for n in (self.image_column, self.id_col) if n and n not in names]
        if missing:
            raise ShardUnreadableError(f"it has no column {', '.join(missing)}")
        needed = {self.image_column, self.id_col, *self.columns}
        return [name for name in names if name in needed]

    def _images(self, column: pa.Array, unit: Unit) -> Iterator[ReadFile]:
        """The images of rows, whatever the column holds."""
        contents: list[bytes | None] = [None] * len(column)
        paths: list[str | None] = [None] * len(column)
        if pa.types.is_struct(column.type):
            names = [field.name for field in column.type]
            contents = pc.struct_field(column, "bytes").to_pylist()
            if "path" in names:
                paths = pc.struct_field(column, "path").to_pylist()
        elif _is_binary(column.type):
            contents = column.to_pylist()
        else:
            paths = column.to_pylist()
        # What a row holds comes first; the others are read side by side.
        named = [p for c, p in zip(contents, paths, strict=True) if c is None and p]
        found = read_files((_place(path, unit) for path in named), self.max_image_bytes)
        for content, path in zip(contents, paths, strict=True):
            if content is not None:
                yield self._held(content)
            else:
                yield next(found) if path else _MISSING

    def _held(self, content: bytes) -> ReadFile:
        if len(content) <= self.max_image_bytes:
            return ReadFile(content)
        message = f"the image has {len(content):,} bytes, the limit is {self.max_image_bytes:,}"
        return ReadFile(None, Status.MEMBER_OVERSIZED, message)

    def _batch(
        self,
        unit: Unit,
        rows: pa.RecordBatch,
        images: list[ReadFile],
        num_before: int,
        schema: pa.Schema,
    ) -> Rows:
        count = rows.num_rows
        numbers = pa.array(range(num_before, num_before + count)).cast(pa.string())
        arrays: dict[str, pa.Array] = {
            SHARD: pa.repeat(pa.scalar(unit.name, pa.string()), count),
            KEY: numbers,
            STATUS: pa.array([image.status.value for image in images], pa.string()),
            ERROR_MESSAGE: pa.array([image.error_message for image in images], pa.string()),
        }
        if self.id_col is not None:
            # A key is never null: a row without one would pass for a row that stands for the file.
            ids = rows.column(self.id_col).cast(pa.string())
            arrays[KEY] = pc.coalesce(ids, pc.binary_join_element_wise("#", numbers, ""))
        batch = with_own_columns(arrays, rows, self.columns, schema)
        return batch, [image.content for image in images]


_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:/")

_MISSING = ReadFile(None, Status.IMAGE_MISSING, "the row has no image")


def _cut(
    rows: pa.RecordBatch, images: Iterable[ReadFile]
) -> Iterator[tuple[pa.RecordBatch, list[ReadFile]]]:
    """Rows and their images in pieces of about `_BATCH_BYTES`."""
    start, held, num_bytes = 0, list[ReadFile](), 0
    for image in images:
        held.append(image)
        num_bytes += len(image.content or b"")
        if num_bytes >= _BATCH_BYTES:
            yield rows.slice(start, len(held)), held
            start, held, num_bytes = start + len(held), [], 0
    if held:
        yield rows.slice(start, len(held)), held


def _can_be_keys(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return not (pa.types.is_nested(type_) or _is_binary(type_) or pa.types.is_null(type_))


def _has_keys(schema: pa.Schema) -> bool:
    return KEY in schema.names and _can_be_keys(schema.field(KEY).type)


def _refuse_one_name(columns: dict[str, str], place: str) -> None:
    """Refuse columns that Spark would take for one.

    Raises:
        InputError: names two.
    """
    source_of: dict[str, str] = {}
    for name, output in columns.items():
        other = source_of.setdefault(output.casefold(), name)
        if other != name:
            raise InputError(
                f"{place}: columns {other} and {name} would have one name in the output: leave one "
                "out with --columns (columns)"
            )


def _place(path: str, unit: Unit) -> str:
    """A path as a row has it; relative ones are below the directory of its file."""
    is_absolute = path.startswith("/") or _URL.match(path) is not None
    return path if is_absolute else f"{unit.place.rpartition('/')[0]}/{path}"


def _batch_rows(parquet: pq.ParquetFile) -> int:
    """So many rows that their images take about `_BATCH_BYTES`."""
    metadata = parquet.metadata
    num_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    per_row = num_bytes // max(1, metadata.num_rows)
    return int(max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, per_row))))


def _is_binary(type_: pa.DataType) -> bool:
    is_one = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(is_it(type_) for is_it in is_one)


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return any(field.name == "bytes" and _is_binary(field.type) for field in type_)
    return _is_binary(type_)


def has_images(url: str) -> bool:
    """Whether a Parquet file has a column that can hold encoded images.

    Raises:
        StorageError: it cannot be read now.
    """
    found = footer(url)
    return found is not None and any(_holds_images(field.type) for field in found)


def _image_column(schema: pa.Schema, wanted: str | None, place: str) -> str:
    """The column of images.

    Raises:
        InputError: there is none, or several, or it cannot hold images.
    """
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is not None:
        if wanted not in schema.names:
            raise InputError(
                f"{place} has no column {wanted!r} for --image-column; there are {there}"
            )
        type_ = schema.field(wanted).type
        if not (
            _holds_images(type_) or pa.types.is_string(type_) or pa.types.is_large_string(type_)
        ):
            raise InputError(
                f"{place}: column {wanted!r} is {type_}; images are binary, "
                "struct<bytes, path>, or strings that are paths or URLs of files"
            )
        return wanted
    candidates = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in candidates if name.lower() in _IMAGE_NAMES]
    chosen = named if len(named) == 1 else candidates
    if not chosen:
        raise InputError(
            f"{place} has no column of images; there are {there}. If one holds paths of "
            "image files, name it with --image-column"
        )
    if len(chosen) > 1:
        raise InputError(
            f"{place}: {' and '.join(chosen)} could each be the images; choose with --image-column"
        )
    return str(chosen[0])
