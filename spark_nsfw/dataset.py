"""`ImageTextPairDataset`, the face that NeMo Curator's users know."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nsfw.errors import InputError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import SampleOptions
from spark_nsfw.schema import IMAGE, KEY, SHARD
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.embedder import TimmImageEmbedder
from spark_nsfw.score.recipe import provenance
from spark_nsfw.spark.export import ExportSummary, export_rows, plan_digest
from spark_nsfw.spark.reader import list_shards, read_samples, settle_columns, shard_paths
from spark_nsfw.spark.session import active_or_local_session
from spark_nsfw.spark.udf import score_embeddings, score_shards, settled
from spark_nsfw.spark.workers import device_kind
from spark_nsfw.spark.writer import (
    session_settings,
    with_provenance,
    write_metadata,
    write_schema,
)
from spark_nsfw.storage import (
    delete_directory,
    hadoop_path,
    list_files,
    move_file,
    open_input,
    resolve,
)
from spark_nsfw.use.regroup import ExportOptions

__all__ = ["ImageTextPairDataset"]


class ImageTextPairDataset:
    """Shards of images, with metadata that embedders and classifiers add to.

    Nothing is computed before `metadata` is read or `save_metadata` called; an embedder
    and all classifiers that follow it share one pass over the images.

    Source: NVIDIA NeMo Curator, ``nemo_curator.datasets.ImageTextPairDataset``.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        id_col: str,
        spark: SparkSession,
        captions: bool = False,
        embedder: TimmImageEmbedder | None = None,
        classifiers: Sequence[ImageClassifier] = (),
    ) -> None:
        self.path = path
        self.id_col = id_col
        self.spark = spark
        self.captions = captions
        self.embedder = embedder
        self.classifiers = tuple(classifiers)
        self._inputs = ShardInputs.parse(path)
        self._metadata: DataFrame | None = None

    @classmethod
    def from_webdataset(
        cls,
        path: str | os.PathLike[str] | Sequence[str],
        id_col: str = "key",
        *,
        captions: bool = False,
        spark: SparkSession | None = None,
    ) -> ImageTextPairDataset:
        """A dataset of WebDataset shards.

        Args:
            path: directory, tar file, glob or brace range, or several of them.
            id_col: the column of sidecar Parquet and JSON that holds the sample id.
            captions: keep the ``.txt`` member as column ``caption``.
            spark: by default the active session, or a local one.

        Raises:
            InputError: there is no shard.
        """
        given = os.fspath(path) if isinstance(path, os.PathLike) else path
        dataset = cls(given, id_col, spark or active_or_local_session(), captions)
        dataset.tar_files  # noqa: B018  # a wrong path is refused here, not at the first action
        return dataset

    @cached_property
    def tar_files(self) -> list[str]:
        """The paths of the shards, sorted."""
        return list_shards(self.spark, self._inputs)

    @cached_property
    def _options(self) -> SampleOptions:
        columns = settle_columns(self.spark, self.tar_files, self.id_col, None, self.captions)
        return SampleOptions(
            captions=self.captions,
            id_col=self.id_col,
            passthrough=columns,
            images=self.embedder is not None,
        )

    @property
    def metadata(self) -> DataFrame:
        """One row per sample: the dataset's own columns and those added so far, not yet computed.

        See `spark_nsfw.schema` for the columns. May be set to itself with more columns or
        fewer rows.
        """
        if self._metadata is not None:
            return self._metadata
        paths = shard_paths(self.spark, self._inputs)
        if self.embedder is None:
            metadata = read_samples(paths, self._inputs, self._options).drop(IMAGE)
            return _with_stored_scores(metadata, self.classifiers) if self.classifiers else metadata
        kind = device_kind(self.spark)
        embedder = self.embedder.ready(kind)
        scored = score_shards(
            paths, self._inputs, self._options, embedder, self.classifiers, device=kind
        )
        note = provenance(embedder, settled(embedder, self.classifiers))
        return with_provenance(scored, self._result_columns, note)

    @metadata.setter
    def metadata(self, metadata: DataFrame) -> None:
        self._metadata = metadata

    @property
    def _result_columns(self) -> list[str]:
        embedding = [] if self.embedder is None else [self.embedder.image_embedding_column]
        return [*embedding, *(classifier.pred_column for classifier in self.classifiers)]

    @property
    def _made_by(self) -> dict[str, Any]:
        """The embedder and the classifiers as the output's provenance has them."""
        if self.embedder is None:
            return {"classifiers": [_describe_unsized(each) for each in self.classifiers]}
        embedder = self.embedder.ready(device_kind(self.spark))
        note = provenance(embedder, settled(embedder, self.classifiers))
        return {name: note[name] for name in ("embedder", "classifiers")}

    def with_embedder(self, embedder: TimmImageEmbedder) -> ImageTextPairDataset:
        """The same dataset, embedded, and scored by the embedder's classifiers.

        Raises:
            InputError: its metadata has been set already, and would be lost.
        """
        if self._metadata is not None:
            raise InputError("embed the dataset first, then set its metadata")
        return ImageTextPairDataset(
            self.path, self.id_col, self.spark, self.captions, embedder, embedder.classifiers
        )

    def with_classifier(self, classifier: ImageClassifier) -> ImageTextPairDataset:
        """The same dataset, scored.

        Embeddings that are yet to be computed are classified in the same pass; without
        an embedder the classifier reads the dataset's column of stored embeddings.
        """
        dataset = ImageTextPairDataset(
            self.path,
            self.id_col,
            self.spark,
            self.captions,
            self.embedder,
            (*self.classifiers, classifier),
        )
        if self._metadata is not None:
            dataset.metadata = _with_stored_scores(self._metadata, [classifier])
        return dataset

    def save_metadata(self, path: str | None = None, columns: Sequence[str] | None = None) -> None:
        """Compute the metadata and write it as Parquet.

        Args:
            path: a directory that gets one partition ``shard=…`` per shard. None writes
                one Parquet file beside each shard, ``00042.parquet`` beside ``00042.tar``,
                and replaces the one that is there, as NeMo Curator does.
            columns: the columns to save; None saves all of them.

        Raises:
            InputError: there is no such column.
        """
        metadata = self.metadata
        if columns is not None:
            unknown = [name for name in columns if name not in metadata.columns]
            if unknown:
                raise InputError(
                    f"no column {', '.join(unknown)}; there are {', '.join(metadata.columns)}"
                )
            metadata = metadata.select(SHARD, *(f"`{name}`" for name in columns if name != SHARD))
        if path is not None:
            path = hadoop_path(path)
            write_schema(metadata, path)
            write_metadata(metadata, path)
            return
        # The directory of one input, under Spark's own name for it, whatever filesystem that is.
        name = self._inputs.shard_name(self.tar_files[0])
        staging = self.tar_files[0].removesuffix(f"{name}.tar") + "_spark_nsfw_sidecars"
        delete_directory(staging)  # of a run that was stopped
        with session_settings(self.spark, {"spark.sql.files.maxRecordsPerFile": "0"}):
            write_metadata(metadata, staging)
        self._move_beside_shards(staging)
        delete_directory(staging)

    def to_webdataset(
        self,
        path: str,
        filter_column: str,
        samples_per_shard: int = 10_000,
        max_shards: int = 5,
        old_id_col: str | None = None,
    ) -> ExportSummary:
        """Write the samples that a column of booleans says to keep to new shards.

        All members of a sample are copied as they are under its new key, and every shard
        gets a sidecar Parquet with the metadata. Samples whose ``status`` is not ``ok``
        are left out. `spark_nsfw.spark.export.export_metadata` offers more.

        Called again, it goes on with what a run that was stopped had selected. Another
        selection into the same output is refused: by its query, input files, embedder and
        classifiers. What a UDF of your own does cannot be seen: after a change in one, give
        another output.

        Args:
            path: a directory of its own for the new shards.
            filter_column: of `metadata`, true for the samples to keep.
            samples_per_shard: of every shard but the last.
            max_shards: digits of the shards' numbers.
            old_id_col: the column that keeps the old ids; None takes ``source_key``.

        Raises:
            InputError: arguments that cannot work.
            JobError: the output was made in another way, or the run failed.
        """
        metadata = self.metadata
        if dict(metadata.dtypes).get(filter_column) != "boolean":
            raise InputError(f"metadata has no column {filter_column!r} of booleans")
        return export_rows(
            metadata,
            F.col(f"`{filter_column}`"),
            self._inputs,
            os.fspath(path),
            {
                "filter_column": filter_column,
                "query_sha256": plan_digest(metadata),
                **self._made_by,
            },
            options=ExportOptions(
                samples_per_shard=samples_per_shard,
                renumber=True,
                shard_digits=max_shards,
                id_col=self.id_col if self.id_col in metadata.columns else KEY,
                old_id_col=old_id_col or "source_key",
            ),
        )

    def _move_beside_shards(self, staging: str) -> None:
        """Give the rows of each shard the place and name of its sidecar.

        Nothing is moved before every sidecar is whole: rows that Spark had shuffled, as
        after a join, come in several files per shard.

        Raises:
            InputError: there are rows of a shard that the dataset does not have.
        """
        prefix, names = list_files(staging)
        files_of: dict[str, list[str]] = {}
        for name in names:
            partition, _, _ = name.partition("/")
            shard = unquote(partition.removeprefix(f"{SHARD}="))
            files_of.setdefault(shard, []).append(prefix + name)
        tar_of = {self._inputs.shard_name(path): path for path in self.tar_files}
        unknown = sorted(files_of.keys() - tar_of.keys())
        if unknown:
            delete_directory(staging)
            raise InputError(
                f"the metadata has rows of {len(unknown):,} shards that the dataset does not "
                f"have, such as {unknown[0]!r}: nothing was saved"
            )
        with ThreadPoolExecutor(16) as pool:
            whole = list(pool.map(_merge_files, files_of.values()))
            sidecars = [tar_of[shard].removesuffix(".tar") + ".parquet" for shard in files_of]
            list(pool.map(move_file, whole, sidecars))


def _merge_files(files: Sequence[str]) -> str:
    """One Parquet file with the rows of several, a row group in memory at a time."""
    if len(files) == 1:
        return files[0]
    merged = f"{files[0]}.merged"
    with ExitStack() as stack:
        # Spark counts tasks with five digits or more: a longer name is a later task's.
        parts = [
            pq.ParquetFile(stack.enter_context(open_input(file)))
            for file in sorted(files, key=lambda name: (len(name), name))
        ]
        filesystem, path = resolve(merged)
        stream = stack.enter_context(filesystem.open_output_stream(path))
        schema = parts[0].schema_arrow  # with Spark's own schema and the provenance in its metadata
        writer = stack.enter_context(pq.ParquetWriter(stream, schema, compression="zstd"))
        for part in parts:
            for number in range(part.num_row_groups):
                writer.write_table(part.read_row_group(number))
    return merged


def _describe_unsized(classifier: ImageClassifier) -> dict[str, Any]:
    try:
        return classifier.describe()
    except InputError:  # the stored embeddings' width will say which of LAION's files it is
        variant = getattr(classifier, "variant", None)
        return {"classifier": type(classifier).__qualname__, "variant": variant}


def _with_stored_scores(metadata: DataFrame, classifiers: Sequence[ImageClassifier]) -> DataFrame:
    for column in {classifier.embedding_column for classifier in classifiers}:
        if column not in metadata.columns:
            raise InputError(
                f"the dataset has no column {column!r} of embeddings to classify: "
                "embed it first with TimmImageEmbedder"
            )
    return score_embeddings(metadata, classifiers)
