"""Metadata with several score columns → how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from operator import and_

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_nsfw.schema import KEY, SHARD
from spark_nsfw.spark.session import session_settings
from spark_nsfw.use.agreement import (
    MAX_RANKED,
    Agreement,
    Decisions,
    most_contested,
    rank_correlations,
)
from spark_nsfw.use.report import ScoreCounts

__all__ = ["collect_agreement"]

_SAMPLES_PER_GROUP = 8


def collect_agreement(rows: DataFrame, scores: Sequence[ScoreCounts]) -> Agreement | None:
    """Compare the columns' decisions for all images, and their ranks for at most a sample.

    Up to `MAX_RANKED` images all are ranked; of more, a sample that is the same every time.

    Args:
        rows: all of an output.
        scores: at least two, the main one first.

    Returns:
        None if no image has every score.
    """
    columns = [score.column for score in scores]
    quoted = [F.col(f"`{column}`") for column in columns]
    pairs = list(combinations(range(len(scores)), 2))
    counts = []
    for one, other in pairs:
        first, second = (quoted[i] >= F.lit(scores[i].threshold) for i in (one, other))
        both = quoted[one].isNotNull() & quoted[other].isNotNull()
        counts += [F.count_if(both), F.count_if(first & ~second), F.count_if(~first & second)]
    scored = rows.where(reduce(and_, (column.isNotNull() for column in quoted)))
    found = rows.agg(*counts).collect()[0]
    num_images = scored.count()
    if not num_images:
        return None
    chosen = scored.select(SHARD, KEY, *quoted)
    if num_images > MAX_RANKED:
        share = int(2**30 * MAX_RANKED / num_images)
        chosen = chosen.where(F.pmod(F.xxhash64(SHARD, KEY), F.lit(2**30)) < share)
    with session_settings(rows.sparkSession, {"spark.sql.execution.arrow.pyspark.enabled": "true"}):
        ranked = chosen.toPandas()
    return Agreement(
        columns=columns,
        correlations=rank_correlations(ranked, columns),
        num_ranked=len(ranked),
        num_images=num_images,
        decisions=[
            Decisions(columns[one], columns[other], *found[3 * position : 3 * position + 3])
            for position, (one, other) in enumerate(pairs)
        ],
        contested=most_contested(ranked, columns, _SAMPLES_PER_GROUP),
    )
