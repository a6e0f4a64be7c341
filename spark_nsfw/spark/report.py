"""Metadata → the counts and thumbnails that the report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from pyarrow import fs
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, FloatType, StructType
from pyspark.sql.window import Window

from spark_nsfw.errors import InputError
from spark_nsfw.note import PROVENANCE, inspect_output
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.schema import KEY, SHARD, STATUS, Status
from spark_nsfw.spark.agreement import collect_agreement
from spark_nsfw.spark.thresholds import label_threshold, share_thresholds
from spark_nsfw.spark.thumbnails import draw_thumbnails
from spark_nsfw.storage import absolute, resolve
from spark_nsfw.use.agreement import ContestedSample
from spark_nsfw.use.report import (
    NUM_BANDS,
    NUM_BINS,
    LabelCounts,
    ReportData,
    ScoreCounts,
    ShardCounts,
    Thumbnail,
)

__all__ = ["collect_report"]

_Sample = TypeVar("_Sample", Thumbnail, ContestedSample)

_SAMPLES_PER_BAND = 8

_DEFAULT_SCORE = "nsfw_score"

#: Columns that a run makes beside the scores.
_NOT_SCORES = frozenset({"embedding_norm"})


def collect_report(
    spark: SparkSession,
    metadata: str,
    *,
    score_column: str | None = None,
    threshold: float | None = None,
    other_thresholds: Mapping[str, float] | None = None,
    label_column: str | None = None,
    wanted_recall: float = 0.95,
    inputs: ShardInputs | None = None,
) -> ReportData:
    """Count what `spark_nsfw.use.page.render` shows.

    Args:
        spark: classic or Connect.
        metadata: an output of ``spark-nsfw score`` or ``classify``.
        score_column: which score it is about; None takes ``nsfw_score`` where there is one,
            else the first score.
        threshold: at which shards are compared; None takes the middle of the range.
        other_thresholds: those of other score columns, by column; the middle of the range
            where none is given.
        label_column: of booleans, or of numbers that are 1 where a sample is unsafe.
        wanted_recall: share of the unsafe samples that is to be removed.
        inputs: where the shards are; with them there are contact sheets.

    Raises:
        InputError: a column is not there, or nothing has a score.
    """
    if not 0 < wanted_recall <= 1:
        raise InputError(f"--recall (wanted_recall) is above 0 and at most 1, not {wanted_recall}")
    metadata = absolute(metadata)
    notes = inspect_output(metadata)
    rows = spark.read.parquet(metadata)
    columns = _score_columns(rows.schema, score_column, metadata)
    for name in (SHARD, STATUS, KEY, *([label_column] if label_column else [])):
        if name not in rows.columns:
            option = " for --label-column (label_column)" if name == label_column else ""
            there = ", ".join(rows.columns)
            raise InputError(f"{metadata} has no column {name!r}{option}; there are {there}")
    thresholds = dict(other_thresholds or {})
    for name in thresholds.keys() - set(columns):
        raise InputError(
            f"--threshold {name}=…: {metadata} has no score column {name!r}, "
            f"only {', '.join(columns)}"
        )
    if threshold is not None:
        thresholds[columns[0]] = threshold
    label = F.lit(None) if label_column is None else F.col(f"`{label_column}`").cast("boolean")
    scores, (unsafe, safe) = _scores(rows, columns, thresholds, label, metadata)
    main, labels, wanted = scores[0], None, None
    if label_column is not None:
        labels = LabelCounts(label_column, unsafe, safe)
        wanted = label_threshold(rows, main, label, labels, wanted_recall)
    num_by_status = {row[STATUS]: row["count"] for row in rows.groupBy(STATUS).count().collect()}
    data = ReportData(
        source=metadata,
        score=main,
        num_by_status=num_by_status,
        shards=_shards(rows, _score(main.column), main.threshold, metadata),
        others=scores[1:],
        notes=[json.loads(note) for note in notes if note.startswith("{")],
        labels=labels,
        wanted_recall=wanted_recall,
        wanted=wanted,
        thumbnails=() if inputs is None else _band_samples(rows, main),
        agreement=collect_agreement(rows, scores) if len(scores) > 1 else None,
    )
    return data if inputs is None else _with_images(spark, data, inputs)


def _score(column: str) -> Column:
    return F.col(f"`{column}`")


def _score_columns(schema: StructType, main: str | None, metadata: str) -> list[str]:
    """The columns that hold scores, the main one first.

    Those that a run has noted on what made them, if they are numbers with a fraction.
    """
    found = [
        field.name
        for field in schema
        if isinstance(field.dataType, FloatType | DoubleType)
        and PROVENANCE in (field.metadata or {})
        and field.name not in _NOT_SCORES
    ]
    if main is None and (_DEFAULT_SCORE in schema.names or not found):
        main = _DEFAULT_SCORE
    elif main is None:
        main = found[0]
    if main not in schema.names:
        raise InputError(
            f"{metadata} has no column {main!r}; there are {', '.join(schema.names)}. Name the one "
            "with the scores with --score-column (score_column)"
        )
    return [main, *(name for name in found if name != main)]


def _scores(
    rows: DataFrame,
    columns: Sequence[str],
    thresholds: Mapping[str, float],
    label: Column,
    metadata: str,
) -> tuple[list[ScoreCounts], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The distribution of each column, and the main one's among unsafe and safe samples."""
    ends = rows.agg(*(f(_score(c)) for c in columns for f in (F.min, F.max))).collect()[0]
    scores = []
    labelled = (np.zeros(NUM_BINS, np.int64), np.zeros(NUM_BINS, np.int64))
    for position, column in enumerate(columns):
        least, most = ends[2 * position : 2 * position + 2]
        if least is None and position == 0:
            raise InputError(f"{metadata}: nothing has a score")
        if least is None:
            continue
        low, high = _range(least, most)
        index = F.floor((_score(column).cast("double") - low) / (high - low) * NUM_BINS)
        binned = F.least(index.cast("int"), F.lit(NUM_BINS - 1)).alias("bin")
        given = (label if position == 0 else F.lit(None)).alias("label")
        counts = np.zeros(NUM_BINS, np.int64)
        scored = rows.where(_score(column).isNotNull())
        for row in scored.groupBy(binned, given).count().collect():
            counts[row["bin"]] += row["count"]
            if row["label"] is not None:
                labelled[0 if row["label"] else 1][row["bin"]] += row["count"]
        threshold = thresholds.get(column, (low + high) / 2)
        scores.append(ScoreCounts(column, low, high, counts, threshold, 0))
    return share_thresholds(rows, scores), labelled


def _range(least: float, most: float) -> tuple[float, float]:
    """0 to 1 where all scores are, else whole numbers around them."""
    if least >= 0 and most <= 1:
        return 0.0, 1.0
    return float(np.floor(least)), float(np.floor(most) + 1)


def _shards(rows: DataFrame, score: Column, threshold: float, metadata: str) -> list[ShardCounts]:
    filesystem, path = resolve(metadata)
    written: dict[str, float] = {}
    for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
        partition = f"/{SHARD}="
        if info.base_name.endswith(".parquet") and partition in info.path:
            name = unquote(info.path.rpartition(partition)[2].partition("/")[0])
            if info.mtime is not None:
                written[name] = max(written.get(name, 0.0), info.mtime.timestamp())
    counts = rows.groupBy(SHARD).agg(
        F.count(F.lit(1)).alias("num_rows"),
        F.count_if(F.col(STATUS) != Status.OK.value).alias("num_failed"),
        F.count_if(score >= threshold).alias("num_high"),
    )
    return [
        ShardCounts(row[SHARD], row.num_rows, row.num_failed, row.num_high, written.get(row[SHARD]))
        for row in counts.orderBy(SHARD).collect()
    ]


def _band_samples(rows: DataFrame, score: ScoreCounts) -> list[Thumbnail]:
    """A few samples of every band, the same ones every time, without their images."""
    column = _score(score.column)
    band = F.floor((column - score.low) / (score.high - score.low) * NUM_BANDS)
    by_chance = Window.partitionBy("band").orderBy(F.xxhash64(SHARD, KEY), SHARD, KEY)
    chosen = (
        rows.where(column.isNotNull())
        .select(
            SHARD,
            KEY,
            column.cast("double").alias("score"),
            F.least(band, F.lit(NUM_BANDS - 1)).alias("band"),
        )
        .withColumn("position", F.row_number().over(by_chance))
        .where(F.col("position") <= _SAMPLES_PER_BAND)
        .orderBy("score")
    )
    return [Thumbnail(row[SHARD], row[KEY], row["score"], None) for row in chosen.collect()]


def _with_images(spark: SparkSession, data: ReportData, inputs: ShardInputs) -> ReportData:
    """The same with the images of all samples that it names."""
    contested = () if data.agreement is None else data.agreement.contested
    wanted = [(each.shard, each.key) for each in data.thumbnails]
    wanted += [(each.shard, each.key) for group in contested for each in group]
    jpeg_of = draw_thumbnails(spark, wanted, inputs)
    data = replace(data, thumbnails=_drawn(data.thumbnails, jpeg_of))
    if data.agreement is None:
        return data
    groups = [_drawn(group, jpeg_of) for group in contested]
    return replace(data, agreement=replace(data.agreement, contested=groups))


def _drawn(samples: Sequence[_Sample], jpeg_of: Mapping[tuple[str, str], bytes]) -> list[_Sample]:
    return [replace(each, jpeg=jpeg_of.get((each.shard, each.key))) for each in samples]
