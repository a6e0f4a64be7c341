"""`ImageTextPairDataset`, the face that NeMo Curator's users know."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nsfw.errors import InputError
from spark_nsfw.files import files_digest
from spark_nsfw.note import merged_note, refuse_another_note, same_note
from spark_nsfw.ownership import STATE
from spark_nsfw.read.image_files import FilesSource
from spark_nsfw.read.image_tables import ParquetSource
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import SampleOptions, ShardSource
from spark_nsfw.read.source import ImageSource, Unit
from spark_nsfw.schema import KEY, SHARD
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.detector import Detector
from spark_nsfw.score.embedder import ImageEmbedder
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.cluster import num_slots
from spark_nsfw.spark.export import ExportSummary, export_rows, plan_digest
from spark_nsfw.spark.job import JobOptions, write_units
from spark_nsfw.spark.output import ParquetOutput, noted_schema, num_tasks_for, with_note
from spark_nsfw.spark.plans import metadata_rows
from spark_nsfw.spark.session import active_or_local_session
from spark_nsfw.spark.stored import score_embeddings
from spark_nsfw.spark.stores import adopt_stores
from spark_nsfw.spark.types import quoted
from spark_nsfw.spark.units import sample_rows, tasks_of
from spark_nsfw.spark.worker import device_kind
from spark_nsfw.use.metadata import refuse_names, refuse_place
from spark_nsfw.use.regroup import ExportOptions
from spark_nsfw.use.sidecars import move_beside_shards
from spark_nsfw.use.summary import counted

__all__ = ["ImageTextPairDataset"]

#: Where rows grow before they become sidecars; readers skip names with an underscore.
_STAGING = f"{STATE}_sidecars"

#: Tasks that the shards are sliced into, more if a task would write too many of them.
_TASKS = 1024


class ImageTextPairDataset:
    """Images in shards, files or tables, with metadata that embedders and classifiers add to.

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
        embedder: ImageEmbedder | None = None,
        classifiers: Sequence[Detector[Any]] = (),
        source: ImageSource | None = None,
    ) -> None:
        self.path = path
        self.id_col = id_col
        self.spark = spark
        self.captions = captions
        self.embedder = embedder
        self.classifiers = tuple(classifiers)
        adopt_stores(spark)
        self._other_source = source  # of what is not shards
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

    @classmethod
    def from_files(
        cls,
        path: str | os.PathLike[str] | Sequence[str],
        *,
        spark: SparkSession | None = None,
    ) -> ImageTextPairDataset:
        """A dataset of image files; the key is the file's name, `spark_nsfw.read.image_files`.

        Args:
            path: directory, file, glob or brace range, or several of them.
            spark: by default the active session, or a local one.

        Raises:
            InputError: there is no image file.
        """
        session = spark or active_or_local_session()
        adopt_stores(session)
        return cls._of(FilesSource.of(path), path, session)

    @classmethod
    def from_parquet(
        cls,
        path: str | os.PathLike[str] | Sequence[str],
        id_col: str | None = None,
        *,
        image_column: str | None = None,
        columns: Sequence[str] | None = None,
        spark: SparkSession | None = None,
    ) -> ImageTextPairDataset:
        """A dataset of Parquet files with a column of images.

        Args:
            path: directory, Parquet file, glob or brace range, or several of them.
            id_col: the column of the samples' keys; None takes ``key`` where there is one, else
                the number of a row in its file.
            image_column: encoded images, ``struct<bytes, path>``, or paths of files; None takes
                the one column that holds images.
            columns: which of the other columns to keep; None keeps all, () none.
            spark: by default the active session, or a local one.

        Raises:
            InputError: there is no such file or column.
        """
        session = spark or active_or_local_session()
        adopt_stores(session)
        source = ParquetSource.open(path, image_column=image_column, id_col=id_col, columns=columns)
        return cls._of(source, path, session)

    @classmethod
    def _of(cls, source: ImageSource, path: Any, spark: SparkSession) -> ImageTextPairDataset:
        dataset = cls(path, KEY, spark, source=source)
        dataset._units  # noqa: B018  # a wrong path is refused here, not at the first action
        return dataset

    @property
    def tar_files(self) -> list[str]:
        """The paths of the shards, sorted."""
        return [unit.place for unit in self._units]

    def _refuse_other_than_shards(self, what: str) -> None:
        if self._other_source is not None:
            raise InputError(f"{what} is for datasets of shards: {self.path} is none")

    @cached_property
    def _units(self) -> list[Unit]:
        return self._source.units()

    @cached_property
    def _source(self) -> ImageSource:
        if self._other_source is not None:
            return self._other_source
        images = Recipe(self.embedder, self.classifiers).reads_images
        options = SampleOptions(captions=self.captions, id_col=self.id_col, images=images)
        return ShardSource(ShardInputs.parse(self.path), options)

    @cached_property
    def _recipe(self) -> Recipe:
        """What is computed, ready; without an embedder only what is known of the classifiers."""
        recipe = Recipe(self.embedder, self.classifiers)
        return recipe.ready(device=device_kind(self.spark)) if recipe.reads_images else recipe

    @property
    def metadata(self) -> DataFrame:
        """One row per sample: the dataset's own columns and those added so far, not yet computed.

        See `spark_nsfw.schema` for the columns. May be set to itself with more columns or
        fewer rows.
        """
        return self._rows(self._units) if self._metadata is None else self._metadata

    @metadata.setter
    def metadata(self, metadata: DataFrame) -> None:
        self._metadata = metadata

    def _rows(self, units: Sequence[Unit]) -> DataFrame:
        schema = self._source.schema(units=self._units)
        wanted = tasks_of(units, num_slots(self.spark), _TASKS)
        num_tasks = num_tasks_for(len(units), wanted)
        if not self._recipe.reads_images:
            rows = sample_rows(
                self.spark, units, self._source, schema, images=False, num_tasks=num_tasks
            )
            return score_embeddings(rows, self._recipe.heads) if self.classifiers else rows
        rows = metadata_rows(
            self.spark, units, self._source, self._recipe, schema, num_tasks=num_tasks
        )
        return with_note(rows, self._recipe.result_columns, self._note)

    @property
    def _note(self) -> dict[str, Any]:
        return merged_note(self._recipe.describe(), self._source.describe())

    def with_embedder(self, embedder: ImageEmbedder) -> ImageTextPairDataset:
        """The same dataset, embedded, and scored by the embedder's classifiers.

        Raises:
            InputError: its metadata has been set already, and would be lost.
        """
        if self._metadata is not None:
            raise InputError("embed the dataset first, then set its metadata")
        pixel_classifiers = Recipe(None, self.classifiers).pixel_classifiers
        return self._with(embedder, (*pixel_classifiers, *embedder.classifiers))

    def _with(
        self, embedder: ImageEmbedder | None, classifiers: Sequence[Detector[Any]]
    ) -> ImageTextPairDataset:
        return ImageTextPairDataset(
            self.path,
            self.id_col,
            self.spark,
            self.captions,
            embedder,
            classifiers,
            self._other_source,
        )

    def with_classifier(self, classifier: Detector[Any]) -> ImageTextPairDataset:
        """The same dataset, scored.

        Embeddings that are yet to be computed are classified in the same pass; without
        an embedder the classifier reads the dataset's column of stored embeddings.
        """
        dataset = self._with(self.embedder, (*self.classifiers, classifier))
        if self._metadata is not None:
            if not isinstance(classifier, ImageClassifier):
                raise InputError(
                    f"{type(classifier).__name__} looks at images: call it before the dataset's "
                    "metadata is set"
                )
            dataset.metadata = score_embeddings(self._metadata, [classifier])
        return dataset

    def save_metadata(self, path: str | None = None, columns: Sequence[str] | None = None) -> None:
        """Compute the metadata and write it as Parquet.

        Called again after it was stopped, it goes on where it was. `metadata` that was set,
        or a choice of columns, is computed in one go; what was noted of the query tells
        whether an output may be gone on with.

        Args:
            path: a directory that gets one partition ``shard=…`` per shard. None writes
                one Parquet file beside each shard, ``00042.parquet`` beside ``00042.tar``,
                and replaces the one that is there, as NeMo Curator does; one that is not
                ours goes to ``_spark_nsfw_replaced`` beside it.
            columns: the columns to save; None saves all of them.

        Raises:
            InputError: there is no such column, or ``path`` is no place to write to.
            JobError: the output was made with different settings, or Spark failed.
        """
        if columns is not None:
            there = self.metadata.columns
            unknown = [name for name in columns if name not in there]
            if unknown:
                raise InputError(f"no column {', '.join(unknown)}; there are {', '.join(there)}")
        if path is not None:
            output = ParquetOutput(self.spark, path)
            refuse_place(output.url, self._source)
            self._write(output, columns)
            return
        self._refuse_other_than_shards("save_metadata() without a path")
        # The directory of one input, whatever file system that is on.
        first = self._units[0]
        staging = ParquetOutput(
            self.spark, first.place.removesuffix(f"{first.name}.tar") + _STAGING
        )
        note = staging.note()
        if note is None or not same_note(note, self._saved_note(columns)):
            staging.delete()  # of another run, that was stopped
        self._write(staging, columns)
        unknown = sorted(staging.done() - {unit.name for unit in self._units})
        if unknown:
            staging.delete()
            raise InputError(
                f"the metadata has rows of {counted(len(unknown), 'shard')} that the dataset "
                f"does not have, such as {unknown[0]!r}: nothing was saved"
            )
        move_beside_shards(staging.url, self._units)
        staging.delete()

    def _saved_note(self, columns: Sequence[str] | None) -> dict[str, Any]:
        """What tells one output of `save_metadata` from another."""
        note = self._note
        if columns is not None:
            note["saved_columns"] = list(columns)
        if self._metadata is not None:
            note["query_sha256"] = plan_digest(self._metadata)
        return note

    def _write(self, output: ParquetOutput, columns: Sequence[str] | None) -> None:
        if self._metadata is None and self._recipe.reads_images and columns is None:
            options = JobOptions(plan="fused")
            write_units(self.spark, self._source, self._recipe, output, options)
            return
        note, rows = self._saved_note(columns), self.metadata
        kept = rows.columns if columns is None else [SHARD, *(c for c in columns if c != SHARD)]
        if output.note() is None:
            refuse_names(self._units, output.url)
            schema = rows.select(*map(quoted, kept)).schema
            output.begin(noted_schema(schema, self._recipe.result_columns, note), note)
        refuse_another_note(
            output.url, output.note() or {}, note, "or delete this one to start anew"
        )
        done = output.done()
        if self._metadata is None:
            rows = self._rows([unit for unit in self._units if unit.name not in done])
        else:
            # A shard's rows go to one task, which writes them whole, in the order they have.
            rows = rows.where(~F.col(SHARD).isin(list(done))) if done else rows
            rows = rows.withColumn("_order", F.monotonically_increasing_id())
            rows = rows.repartition(F.col(SHARD)).sortWithinPartitions(SHARD, "_order")
        rows = rows.select(*map(quoted, kept))
        output.append(with_note(rows, self._recipe.result_columns, note))

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
            JobError: the output was made with different settings, or the run failed.
        """
        self._refuse_other_than_shards("to_webdataset")
        metadata = self.metadata
        made_by = {n: v for n, v in self._recipe.describe().items() if n != "rows"}
        if dict(metadata.dtypes).get(filter_column) != "boolean":
            raise InputError(f"metadata has no column {filter_column!r} of booleans")
        return export_rows(
            metadata,
            F.col(quoted(filter_column)),
            ShardInputs.parse(self.path),
            os.fspath(path),
            {
                "filter_column": filter_column,
                "query_sha256": plan_digest(metadata),
                "shards_sha256": files_digest(self.tar_files),
                **made_by,
            },
            options=ExportOptions(
                samples_per_shard=samples_per_shard,
                renumber=True,
                shard_digits=max_shards,
                id_col=self.id_col if self.id_col in metadata.columns else KEY,
                old_id_col=old_id_col or "source_key",
            ),
        )
