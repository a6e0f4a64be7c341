"""Metadata → its summary."""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, FloatType

from spark_nsfw.schema import STATUS, Status
from spark_nsfw.spark.output import read_note
from spark_nsfw.spark.types import quoted
from spark_nsfw.use.summary import ScoreSummary, Summary

__all__ = ["summarize"]

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def summarize(
    metadata: DataFrame, output: str, score_columns: Sequence[str], num_shards: int
) -> Summary:
    """Count rows and look at the distribution of scores, in one pass over the small columns.

    Args:
        metadata: all rows of an output.
        output: where it is.
        score_columns: those that are there and hold fractions are summed up; labels are not.
        num_shards: that have rows, as the output's listing told.
    """
    fractions = {f.name for f in metadata.schema if isinstance(f.dataType, (FloatType, DoubleType))}
    kept = [column for column in score_columns if column in fractions]
    aggregates = [F.count(F.lit(1)).alias("num_rows")]
    for column in kept:
        score = F.col(quoted(column))
        aggregates += [
            F.percentile_approx(score, list(_QUANTILES), 10_000),
            F.count(score),
            F.sum((score > 0.5).cast("long")),
        ]
    found = {row[STATUS]: row for row in metadata.groupBy(STATUS).agg(*aggregates).collect()}
    num_by_status = {status: row["num_rows"] for status, row in found.items()}
    scores = {}
    scored = found.get(Status.OK.value)  # rows of another status have no score
    for index, column in enumerate(kept):
        if scored is None:
            break
        quantiles, count, above = scored[2 + 3 * index : 5 + 3 * index]
        if count:
            scores[column] = ScoreSummary(
                dict(zip(_QUANTILES, quantiles, strict=True)), above / count
            )
    return Summary(
        output=output,
        num_shards=num_shards,
        num_samples=sum(
            count for status, count in num_by_status.items() if not Status(status).is_shard_level
        ),
        num_by_status=num_by_status,
        scores=scores,
        provenance=read_note(metadata.schema) or {},
    )
