"""Stored embeddings → scored Parquet, each file read and scored in one Python worker."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from spark_nsfw.errors import InputError
from spark_nsfw.note import inspect_output, package_version, refuse_another_note
from spark_nsfw.read.embeddings import EmbeddingFile, StoredEmbeddings
from spark_nsfw.schema import SHARD
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.spark.summary import Summary, summarize
from spark_nsfw.spark.types import spark_schema
from spark_nsfw.spark.workers import classifier_identity, worker_classifiers, worker_device
from spark_nsfw.spark.writer import (
    SCHEMA_PARTITION,
    with_provenance,
    write_metadata,
    write_schema,
)
from spark_nsfw.storage import absolute, is_below

__all__ = ["classify_metadata"]

#: Files share a task where there are more of them than this.
_MAX_TASKS = 1000


def classify_metadata(
    spark: SparkSession,
    metadata: str,
    output: str,
    classifiers: Sequence[ImageClassifier],
    *,
    embedding_column: str = "image_embedding",
    id_col: str | None = None,
    keep_embeddings: bool = False,
    device: str | None = None,
    report: Callable[[str], None] | None = None,
) -> Summary:
    """Score embeddings that lie in Parquet or ``.npy`` files.

    Started again, it writes the same rows over those that are there.

    Args:
        spark: any session.
        metadata: in any layout of `spark_nsfw.read.embeddings`.
        output: directory of the Parquet metadata, partitioned by shard.
        classifiers: each gives one column.
        embedding_column: holds the embeddings.
        id_col: holds the samples' keys; by default ``key``, for clip-retrieval ``image_path``.
        keep_embeddings: copy the embeddings to the output.
        device: a torch device; by default the task's GPU if there is one.
        report: is given a line of progress; by default it goes to stderr.

    Returns:
        What the output holds.

    Raises:
        InputError: there is no embedding to be found, or output and input are one.
        JobError: the output was made with other weights or columns.
        EmbeddingWidthError: a classifier takes embeddings of another width.
    """
    metadata, output = absolute(metadata), absolute(output)
    stored = StoredEmbeddings.open(metadata, embedding_column, id_col)
    if is_below(output, metadata):
        raise InputError(f"{output} is in {metadata}, which is read: give another output")
    chosen = [classifier.for_embedding_size(stored.width) for classifier in classifiers]
    note = {
        "version": package_version(),
        "embedder": stored.embedder,
        "classifiers": [classifier.describe() for classifier in chosen],
        "rows": {"columns": list(stored.columns), "keep_embeddings": keep_embeddings},
    }
    _refuse_another_output(output, note)
    schema = stored.output_schema(chosen, keep_embeddings)
    identities = [classifier_identity(classifier) for classifier in chosen]
    reader = replace(stored, files=())  # a task needs to know of its own files only

    def score(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        files = (EmbeddingFile(**row) for batch in batches for row in batch.to_pylist())
        loaded = worker_classifiers(chosen, identities)
        return reader.score_files(files, loaded, worker_device(device), keep_embeddings)

    rows = [tuple(asdict(file).values()) for file in stored.files]
    files = spark.createDataFrame(rows, "shard string, parquet string, npy string")
    tasks = files.repartition(min(len(rows), _MAX_TASKS))
    scored = with_provenance(
        tasks.mapInArrow(score, spark_schema(schema)),
        schema.names[-len(chosen) - keep_embeddings :],
        note,
    )
    started = time.monotonic()
    write_schema(scored, output)
    write_metadata(scored, output)
    seconds = time.monotonic() - started
    columns = [classifier.pred_column for classifier in chosen]
    summary = summarize(spark.read.parquet(output), output, columns)
    (report or partial(print, file=sys.stderr))(
        f"{summary.num_scored:,} embeddings of {len(rows):,} files in {seconds:,.1f} s"
    )
    return summary


def _refuse_another_output(output: str, note: dict[str, Any]) -> None:
    try:
        (before,) = inspect_output(f"{output.rstrip('/')}/{SHARD}={SCHEMA_PARTITION}")
    except InputError:
        return  # there is none yet
    refuse_another_note(output, json.loads(before), note)
