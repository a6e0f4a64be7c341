"""Metadata → what the report shows: a small output in memory, a large one by Spark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import and_

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, FloatType
from pyspark.sql.window import Window

from spark_nsfw.note import PROVENANCE, inspect_output
from spark_nsfw.read.source import ImageSource
from spark_nsfw.schema import KEY, LOCATION_COLUMNS, SHARD, STATUS, Status
from spark_nsfw.spark.session import session_settings
from spark_nsfw.spark.stores import adopt_stores
from spark_nsfw.spark.thumbnails import draw_thumbnails
from spark_nsfw.storage import absolute
from spark_nsfw.use.agreement import Decisions
from spark_nsfw.use.collect import collect, samples_shown, with_images
from spark_nsfw.use.report import NUM_BANDS, NUM_BINS, ReportData, ShardCounts, Thumbnail
from spark_nsfw.use.thresholds import MAX_EXACT_SCORES
from spark_nsfw.use.thumbnails import refuse_none, samples_by_unit

__all__ = ["SparkRows", "collect_report"]

#: Spark's own measure: quantiles' ranks are off by at most one in so many.
_EXACT, _APPROXIMATE = 1_000_000, 100_000


def collect_report(
    spark: SparkSession,
    metadata: str,
    *,
    score_column: str | None = None,
    threshold: float | None = None,
    other_thresholds: Mapping[str, float] | None = None,
    label_column: str | None = None,
    wanted_recall: float = 0.95,
    source: ImageSource | None = None,
    notes: Sequence[str] | None = None,
) -> ReportData:
    """Count what `spark_nsfw.use.page.render` shows, whatever the output's size.

    Args:
        spark: classic or Connect.
        metadata: an output of ``spark-nsfw score`` or ``classify``.
        score_column, threshold, other_thresholds, label_column, wanted_recall: as for
            `spark_nsfw.use.collect.collect`.
        source: what was scored; with it there are contact sheets.
        notes: what `inspect_output` has told already.

    Raises:
        InputError: a column is not there, or nothing has a score.
    """
    adopt_stores(spark)
    metadata = absolute(metadata)
    rows = SparkRows(spark.read.parquet(metadata))
    data = collect(
        rows,
        metadata,
        list(inspect_output(metadata)) if notes is None else notes,
        score_column=score_column,
        threshold=threshold,
        other_thresholds=other_thresholds,
        label_column=label_column,
        wanted_recall=wanted_recall,
        with_samples=source is not None,
    )
    if source is None:
        return data
    shown = samples_shown(data)
    units = samples_by_unit(shown, source, rows.locations(shown))
    drawn = draw_thumbnails(spark, units, source)
    refuse_none(drawn, units)
    return with_images(data, drawn)


class SparkRows:
    """As `spark_nsfw.use.collect.ReportRows`, counted by Spark.

    Args:
        rows: all of an output.
    """

    def __init__(self, rows: DataFrame) -> None:
        self._rows = rows

    @property
    def columns(self) -> Sequence[str]:
        """As `ReportRows.columns`."""
        return self._rows.columns

    @property
    def noted_fractions(self) -> Sequence[str]:
        """As `ReportRows.noted_fractions`."""
        return [
            field.name
            for field in self._rows.schema
            if isinstance(field.dataType, FloatType | DoubleType)
            and PROVENANCE in (field.metadata or {})
        ]

    def ends(self, column: str) -> tuple[float, float] | None:
        """As `ReportRows.ends`."""
        least, most = self._rows.agg(F.min(_score(column)), F.max(_score(column))).collect()[0]
        return None if least is None else (least, most)

    def bins(
        self, column: str, low: float, high: float, label: str | None
    ) -> dict[bool | None, npt.NDArray[np.int64]]:
        """As `ReportRows.bins`."""
        index = F.floor((_score(column) - low) / (high - low) * NUM_BINS)
        binned = F.least(index.cast("int"), F.lit(NUM_BINS - 1)).alias("bin")
        given = (F.lit(None) if label is None else _label(label)).alias("label")
        scored = self._rows.where(_score(column).isNotNull())
        counts: dict[bool | None, npt.NDArray[np.int64]] = {}
        for row in scored.groupBy(binned, given).count().collect():
            of_label = counts.setdefault(row["label"], np.zeros(NUM_BINS, np.int64))
            of_label[row["bin"]] += row["count"]
        return counts

    def quantiles(
        self, column: str, shares: Sequence[float], num_scored: int, unsafe: str | None = None
    ) -> list[float]:
        """As `ReportRows.quantiles`; of many scores, ranks are off by up to 1e-5 of them."""
        rows = self._rows if unsafe is None else self._rows.where(_label(unsafe))
        accuracy = _EXACT if num_scored <= MAX_EXACT_SCORES else _APPROXIMATE
        found = rows.agg(F.percentile_approx(_score(column), list(shares), accuracy))
        return list(found.collect()[0][0])

    def num_below(self, column: str, thresholds: Sequence[float]) -> list[int]:
        """As `ReportRows.num_below`."""
        counts = [F.count_if(_score(column) < F.lit(value)) for value in thresholds]
        return list(self._rows.agg(*counts).collect()[0])

    def num_removed(
        self, column: str, thresholds: Sequence[float], label: str
    ) -> list[tuple[int, int]]:
        """As `ReportRows.num_removed`."""
        counts = [
            F.count_if((_score(column) >= F.lit(value)) & wanted)
            for value in thresholds
            for wanted in (_label(label), ~_label(label))
        ]
        found = list(self._rows.agg(*counts).collect()[0])
        return list(zip(found[::2], found[1::2], strict=True))

    def num_by_status(self) -> dict[str, int]:
        """As `ReportRows.num_by_status`."""
        return {row[STATUS]: row["count"] for row in self._rows.groupBy(STATUS).count().collect()}

    def shards(self, column: str, threshold: float) -> list[ShardCounts]:
        """As `ReportRows.shards`."""
        counts = self._rows.groupBy(SHARD).agg(
            F.count(F.lit(1)).alias("num_rows"),
            F.count_if(F.col(STATUS) != Status.OK.value).alias("num_failed"),
            F.count_if(_score(column) >= threshold).alias("num_high"),
        )
        return [
            ShardCounts(row[SHARD], row.num_rows, row.num_failed, row.num_high)
            for row in counts.orderBy(SHARD).collect()
        ]

    def band_samples(self, column: str, low: float, high: float, number: int) -> list[Thumbnail]:
        """As `ReportRows.band_samples`."""
        band = F.floor((_score(column) - low) / (high - low) * NUM_BANDS)
        by_chance = Window.partitionBy("band").orderBy(_chance(), SHARD, KEY)
        chosen = (
            self._rows.where(_score(column).isNotNull())
            .select(
                SHARD,
                KEY,
                _score(column).alias("score"),
                F.least(band, F.lit(NUM_BANDS - 1)).alias("band"),
            )
            .withColumn("position", F.row_number().over(by_chance))
            .where(F.col("position") <= number)
            .orderBy("score", SHARD, KEY)
        )
        return [Thumbnail(row[SHARD], row[KEY], row["score"], None) for row in chosen.collect()]

    def locations(
        self, samples: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[int, int]]:
        """As `ReportRows.locations`."""
        if not samples or not {*LOCATION_COLUMNS} <= {*self._rows.columns}:
            return {}
        shards, keys = ({sample[i] for sample in samples} for i in (0, 1))
        rows = self._rows.where(
            F.col(SHARD).isin(*shards) & F.col(KEY).isin(*keys) & (F.col(STATUS) == Status.OK.value)
        )
        found = {
            (row[0], row[1]): (row[2], row[3])
            for row in rows.select(SHARD, KEY, *LOCATION_COLUMNS).collect()
        }
        return {sample: found[sample] for sample in samples if sample in found}

    def decisions(self, first: tuple[str, float], second: tuple[str, float]) -> Decisions:
        """As `ReportRows.decisions`."""
        one, other = (_score(column) for column, _ in (first, second))
        by_one, by_other = one >= F.lit(first[1]), other >= F.lit(second[1])
        counts = self._rows.agg(
            F.count_if(one.isNotNull() & other.isNotNull()),
            F.count_if(by_one & ~by_other),
            F.count_if(~by_one & by_other),
        )
        return Decisions(first[0], second[0], *counts.collect()[0])

    def with_all(self, columns: Sequence[str], max_rows: int) -> tuple[int, pd.DataFrame]:
        """As `ReportRows.with_all`."""
        scores = [_score(column).alias(column) for column in columns]
        scored = self._rows.where(reduce(and_, (_score(c).isNotNull() for c in columns)))
        num_images = scored.count()
        chosen = scored.select(SHARD, KEY, *scores)
        if num_images > max_rows:
            chosen = chosen.where(_chance() < int(2**32 * max_rows / num_images))
        arrow = {"spark.sql.execution.arrow.pyspark.enabled": "true"}
        with session_settings(self._rows.sparkSession, arrow):
            return num_images, chosen.toPandas()


def _score(column: str) -> Column:
    return F.col(f"`{column}`").cast("double")


def _label(column: str) -> Column:
    return F.col(f"`{column}`").cast("boolean")


def _chance() -> Column:
    """A number of 32 bits for each sample, the same every time."""
    digest = F.md5(F.concat_ws("/", SHARD, KEY).cast("binary"))
    return F.conv(F.substring(digest, 1, 8), 16, 10).cast("bigint")
