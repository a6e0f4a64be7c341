"""Stored embeddings → metadata rows with scores, no image read.

Three layouts of a directory are known::

    shard=00042/part-….parquet                            # ours, a partition per shard
    00042.parquet                                         # NeMo Curator's, a sidecar per shard
    img_emb/img_emb_7.npy, metadata/metadata_7.parquet    # clip-retrieval's, row by row
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from spark_nsfw.errors import EmbeddingWidthError, InputError, ShardUnreadableError
from spark_nsfw.note import note_in
from spark_nsfw.read.columns import output_name, spark_type
from spark_nsfw.schema import (
    ERROR_MESSAGE,
    IMAGE,
    KEY,
    SHARD,
    STATUS,
    Status,
    metadata_schema,
    result_fields,
    sample_schema,
)
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.storage import list_files, open_input, resolve

__all__ = ["EmbeddingFile", "StoredEmbeddings", "embedding_matrix", "score_column"]

#: Rows in an Arrow batch: 6 MiB of embeddings of width 768. More fall out of a core's cache.
_BATCH_ROWS = 2048

_PARTITION = re.compile(rf"(?:.*/)?{SHARD}=([^/]*)/", re.DOTALL)
_NPY = re.compile(r"(.*)img_emb/(img_emb_(\w+))\.npy\Z", re.DOTALL)


def embedding_matrix(column: pa.Array, width: int) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
    """The rows of a list column that are embeddings: of the given width, and finite.

    Args:
        column: N lists of any float type; float32 is not copied.
        width: D.

    Returns:
        float32 (K, D), the usable rows in order; bool (N,), which these are.
    """
    lengths = pc.fill_null(pc.list_value_length(column), -1)
    usable: npt.NDArray[np.bool_] = lengths.to_numpy(zero_copy_only=False) == width
    if not usable.all():
        column = column.filter(pa.array(usable))
    values = column.flatten()
    if values.null_count:
        values = pc.fill_null(values, float("nan"))
    matrix = torch.utils.dlpack.from_dlpack(values).to(torch.float32).reshape(-1, width)
    # A sum is a cheap look at every value: it is finite only where all of them are.
    if not torch.isfinite(matrix.sum(dim=1)).all():
        finite = torch.isfinite(matrix).all(dim=1)
        usable[np.flatnonzero(usable)[~finite.numpy()]] = False
        matrix = matrix[finite]
    return matrix, usable


def score_column(
    column: pa.Array, width: int | None, classifiers: Sequence[ImageClassifier], device: str
) -> tuple[list[pa.Array], npt.NDArray[np.bool_]]:
    """Score a list column of embeddings as the pipeline scores fresh ones.

    Args:
        column: N lists of any float type.
        width: of an embedding; None takes the classifiers' own, else the commonest that
            they take.
        classifiers: each gives one column.
        device: a torch device.

    Returns:
        A float32 array (N,) per classifier, null where a row is no embedding;
        bool (N,), where it is one.

    Raises:
        EmbeddingWidthError: a classifier takes none of several embeddings.
    """
    if width is None:
        width = _common_width(column, classifiers)
    matrix, usable = embedding_matrix(column, width)
    embeddings = matrix.to(device)
    arrays = []
    for classifier in classifiers:
        scores = np.zeros(len(column), np.float32)
        if len(matrix):
            with torch.inference_mode():
                scores[usable] = classifier.score(embeddings).cpu().numpy()
        arrays.append(pa.array(scores, mask=~usable))
    return arrays, usable


def _common_width(column: pa.Array, classifiers: Sequence[ImageClassifier]) -> int:
    """The commonest width of a list column's rows that the classifiers take.

    Raises:
        EmbeddingWidthError: they take none. A single row is merely no embedding, since the
            last batch of a partition may have no other.
    """
    lengths = pc.drop_null(pc.list_value_length(column)).to_pylist()
    widths = Counter(length for length in lengths if length).most_common()
    refusal = None
    for width, _ in widths:
        try:
            for classifier in classifiers:
                classifier.for_embedding_size(width)
            return int(width)
        except EmbeddingWidthError as exc:
            refusal = refusal or exc
    if refusal is not None and sum(count for _, count in widths) > 1:
        raise refusal
    return int(max(lengths, default=0)) + 1  # which no row has


@dataclass(frozen=True)
class EmbeddingFile:
    """One file of stored embeddings.

    Attributes:
        shard: the name of the shard that its rows are of.
        parquet: path or URL of the rows.
        npy: of their embeddings, (N, D) in the order of the rows; None where the rows
            have a column of them.
    """

    shard: str
    parquet: str
    npy: str | None = None


def _embedding_files(metadata: str) -> list[EmbeddingFile]:
    """The files of a directory, in whichever layout it has, or one Parquet file.

    Raises:
        InputError: there are none, or an ``.npy`` without its Parquet.
    """
    root, names = list_files(metadata)
    parquet = {name for name in names if name.endswith(".parquet")}
    arrays = [match for match in map(_NPY.match, names) if match]
    files = []
    for match in arrays:
        rows = f"{match[1]}metadata/metadata_{match[3]}.parquet"
        if rows not in parquet:
            raise InputError(
                f"{root}{match[0]} has no {rows} beside it, which clip-retrieval writes: "
                "without it nobody knows what the embeddings are of"
            )
        files.append(EmbeddingFile(match[1] + match[2], root + rows, root + match[0]))
    if not arrays:
        for name in sorted(parquet):
            partition = _PARTITION.match(root + name)  # the input may be one partition
            shard = unquote(partition[1]) if partition else name.removesuffix(".parquet")
            files.append(EmbeddingFile(shard, root + name))
    if not files:
        raise InputError(f"{metadata}: there are no Parquet files")
    return files


@dataclass(frozen=True)
class StoredEmbeddings:
    """Embeddings that lie in files, and what is to be known before they are read.

    Attributes:
        files: in the order of their names.
        width: D of the embeddings.
        embedding_column: the column that holds them; in the output for ``.npy``, too.
        id_col: the column that holds the sample's key.
        columns: source name → name in the output, of the columns that go along.
        schema: of a sample's row, without the embedding.
        has_status: whether the rows already have the columns ``status`` and ``error_message``.
        embedder: what made the embeddings, as their provenance has it; empty if unknown.
    """

    files: tuple[EmbeddingFile, ...]
    width: int
    embedding_column: str
    id_col: str
    columns: dict[str, str]
    schema: pa.Schema
    has_status: bool
    embedder: dict[str, Any]

    @classmethod
    def open(
        cls, metadata: str, embedding_column: str = "image_embedding", id_col: str | None = None
    ) -> StoredEmbeddings:
        """Read every file's footer, and the first embedding.

        Args:
            metadata: a directory in a known layout, or one Parquet file; a path or URL.
            embedding_column: holds the embeddings.
            id_col: holds the samples' keys; None takes ``key``, and ``image_path`` for
                clip-retrieval.

        Raises:
            InputError: no files, no such column, no embedding, or a column whose types
                in two files have none in common.
        """
        files = _embedding_files(metadata)
        if id_col is None:
            id_col = KEY if files[0].npy is None else "image_path"
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(_footer, (file.parquet for file in files)))
        footers = [footer for footer in found if footer is not None]
        if not footers:
            raise InputError(f"{metadata}: none of its Parquet files can be read")
        merged = _merged_schema(files, found)
        for name in (id_col, *([] if files[0].npy else [embedding_column])):
            if name not in merged.names:
                raise InputError(
                    f"{metadata} has no column {name!r}; there are {', '.join(merged.names)}"
                )
        notes = [note_in(footer.metadata or {}) for footer in footers]
        # img2dataset's sidecars have columns of these names, too, with another meaning.
        ours = {KEY, STATUS, ERROR_MESSAGE} <= set(merged.names) and (
            notes[0] is not None or _PARTITION.match(files[0].parquet) is not None
        )
        columns = {}
        for name in merged.names:
            if name == embedding_column or (ours and name in (SHARD, KEY, STATUS, ERROR_MESSAGE)):
                continue
            output = name if ours else output_name(name, id_col)
            if output is not None:
                columns[name] = output
        passthrough = [
            pa.field(output, spark_type(merged.field(name).type))
            for name, output in columns.items()
        ]
        schema = sample_schema(passthrough=passthrough)
        towers = {json.dumps((note or {}).get("embedder", {}), sort_keys=True) for note in notes}
        return cls(
            files=tuple(files),
            width=_first_width(files, embedding_column, metadata),
            embedding_column=embedding_column,
            id_col=id_col,
            columns=columns,
            schema=schema.remove(schema.get_field_index(IMAGE)),
            has_status=ours,
            embedder=json.loads(towers.pop()) if len(towers) == 1 else {},
        )

    def output_schema(
        self, classifiers: Sequence[ImageClassifier], keep_embeddings: bool
    ) -> pa.Schema:
        """The columns that `score_files` gives."""
        results = result_fields(
            self.embedding_column if keep_embeddings else None,
            [classifier.pred_column for classifier in classifiers],
        )
        return metadata_schema(self.schema, results)

    def score_files(
        self,
        files: Iterable[EmbeddingFile],
        classifiers: Sequence[ImageClassifier],
        device: str,
        keep_embeddings: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """Score the rows of some files, in order, one metadata row for each.

        A row whose embedding cannot be used has no score and status
        ``embedding_invalid``; a file that cannot be read (on) gives the rows that can be
        read and one row that stands for it.
        """
        schema = self.output_schema(classifiers, keep_embeddings)
        for file in files:
            try:
                for rows, embeddings in self._read(file):
                    results, usable = score_column(embeddings, self.width, classifiers, device)
                    if keep_embeddings:
                        kept = embeddings.cast(pa.list_(pa.float32()))
                        results.insert(0, pc.if_else(pa.array(usable), kept, None))
                    arrays = self._own_columns(file, rows, embeddings, usable)
                    names = schema.names[-len(results) :]
                    arrays |= dict(zip(names, results, strict=True))
                    yield pa.RecordBatch.from_arrays(
                        [arrays[n] for n in schema.names], schema=schema
                    )
            except (OSError, pa.ArrowException, ShardUnreadableError) as exc:
                yield _fault(file, exc, schema)

    def _read(self, file: EmbeddingFile) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
        """Rows, and their embeddings as lists of any float type."""
        filesystem, path = resolve(file.parquet)
        with filesystem.open_input_file(path) as stream:  # no Python between Parquet and bytes
            parquet = pq.ParquetFile(stream)
            needed = {self.id_col, *([self.embedding_column] if file.npy is None else [])}
            missing = needed - set(parquet.schema_arrow.names)
            if missing:
                raise ShardUnreadableError(f"it has no column {', '.join(sorted(missing))}")
            if file.npy is None:
                wanted = needed | {*self.columns, STATUS, ERROR_MESSAGE}
                for rows in parquet.iter_batches(
                    _BATCH_ROWS, columns=[n for n in parquet.schema_arrow.names if n in wanted]
                ):
                    yield rows, rows.column(self.embedding_column)
                return
            with open_input(file.npy) as npy:
                shape, dtype = _npy_header(npy, file.npy)
                if shape[0] != parquet.metadata.num_rows:
                    raise ShardUnreadableError(
                        f"{file.npy} has {shape[0]:,} embeddings, {file.parquet} "
                        f"{parquet.metadata.num_rows:,} rows: they do not belong together"
                    )
                for rows in parquet.iter_batches(_BATCH_ROWS):
                    content = npy.read(rows.num_rows * shape[1] * dtype.itemsize)
                    if len(content) < rows.num_rows * shape[1] * dtype.itemsize:
                        raise ShardUnreadableError(f"{file.npy} is cut off")
                    values = pa.array(np.frombuffer(content, dtype))
                    yield rows, pa.FixedSizeListArray.from_arrays(values, shape[1])

    def _own_columns(
        self,
        file: EmbeddingFile,
        rows: pa.RecordBatch,
        embeddings: pa.Array,
        usable: npt.NDArray[np.bool_],
    ) -> dict[str, pa.Array]:
        """The columns of a sample's row, by name."""
        count = rows.num_rows
        fields = {field.name: field for field in self.schema}
        arrays = {
            output: _widened(rows.column(name), fields[output].type)
            if name in rows.schema.names
            else pa.nulls(count, fields[output].type)
            for name, output in self.columns.items()
        }
        arrays[SHARD] = pa.repeat(pa.scalar(file.shard, pa.string()), count)
        arrays[KEY] = rows.column(self.id_col).cast(pa.string())
        bad = pa.array(~usable)
        statuses = pa.repeat(pa.scalar(Status.OK.value), count)
        messages = pa.nulls(count, pa.string())
        if self.has_status:
            if STATUS in rows.schema.names:
                statuses = rows.column(STATUS)
            if ERROR_MESSAGE in rows.schema.names:
                messages = rows.column(ERROR_MESSAGE)
            bad = pc.and_(bad, pc.equal(statuses, Status.OK.value))
        if pc.any(bad).as_py():
            reasons = [
                _reason(length, self.width) if is_bad else None
                for length, is_bad in zip(
                    pc.list_value_length(embeddings).to_pylist(), bad.to_pylist(), strict=True
                )
            ]
            statuses = pc.if_else(bad, Status.EMBEDDING_INVALID.value, statuses)
            messages = pc.coalesce(pa.array(reasons, pa.string()), messages)
        arrays[STATUS], arrays[ERROR_MESSAGE] = statuses, messages
        return arrays


def _reason(length: int | None, width: int) -> str:
    if length is None:
        return "no embedding is stored"
    if length != width:
        return f"the stored embedding has width {length}, the first one has {width}"
    return "the stored embedding is not finite"


def _merged_schema(
    files: Sequence[EmbeddingFile], footers: Sequence[pa.Schema | None]
) -> pa.Schema:
    """One schema for all files that can be read.

    Raises:
        InputError: names the column, both types and both files.
    """
    readable = [
        (file, footer) for file, footer in zip(files, footers, strict=True) if footer is not None
    ]
    schemas = [footer for _, footer in readable]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException:
        pass  # rare: find out which
    first: dict[str, tuple[EmbeddingFile, pa.Field]] = {}
    for file, footer in readable:
        for field in footer:
            before, earlier = first.setdefault(field.name, (file, field))
            try:
                pa.unify_schemas(
                    [pa.schema([earlier]), pa.schema([field])], promote_options="permissive"
                )
            except pa.ArrowException as exc:
                raise InputError(
                    f"column {field.name!r} is {earlier.type} in {before.parquet} and "
                    f"{field.type} in {file.parquet}: write one of them anew, in the other's type"
                ) from exc
    return pa.unify_schemas(schemas, promote_options="permissive")


def _widened(column: pa.Array, data_type: pa.DataType) -> pa.Array:
    """A column in a type of Spark's. Nanoseconds, and the digits that a float lacks, are cut."""
    options = pc.CastOptions(data_type, allow_time_truncate=True, allow_float_truncate=True)
    return pc.cast(column, options=options)


def _footer(url: str) -> pa.Schema | None:
    try:
        with open_input(url) as stream:
            return pq.read_schema(stream)
    except (OSError, pa.ArrowException):
        return None  # it becomes a row of its own when it is read


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
                for rows in pq.ParquetFile(stream).iter_batches(64, columns=[embedding_column]):
                    lengths = pc.drop_null(pc.list_value_length(rows.column(0)))
                    if len(lengths):
                        return int(lengths[0].as_py())
        except (OSError, pa.ArrowException, ShardUnreadableError):
            continue  # it becomes a row of its own when it is read
    raise InputError(f"{metadata} holds no embedding in column {embedding_column!r}")


def _fault(file: EmbeddingFile, exc: Exception, schema: pa.Schema) -> pa.RecordBatch:
    values = {
        SHARD: file.shard,
        STATUS: Status.SHARD_UNREADABLE.value,
        ERROR_MESSAGE: str(exc) if file.parquet in str(exc) else f"{file.parquet}: {exc}",
    }
    return pa.RecordBatch.from_pylist([values], schema)
