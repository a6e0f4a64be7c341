"""The rows of a small output in memory, counted without Spark."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from spark_nsfw.note import PROVENANCE, Footer
from spark_nsfw.schema import KEY, LOCATION_COLUMNS, SHARD, STATUS, Status
from spark_nsfw.storage import resolve
from spark_nsfw.use.agreement import Decisions
from spark_nsfw.use.collect import DEFAULT_SCORE
from spark_nsfw.use.report import NUM_BANDS, NUM_BINS, ShardCounts, Thumbnail

__all__ = ["LocalRows", "small_rows"]

#: Beyond either, Spark is faster, start included.
_MAX_ROWS, _MAX_FILES = 1_000_000, 1_000


def small_rows(
    footers: Sequence[Footer], score_column: str | None = None, label_column: str | None = None
) -> LocalRows | None:
    """The rows of an output that is small enough for memory; None if Spark is to count them.

    Args:
        footers: of its files.
        score_column, label_column: further columns that are needed, if they are there.
    """
    if len(footers) > _MAX_FILES or sum(footer.num_rows for footer in footers) > _MAX_ROWS:
        return None
    if not all(footer.is_readable for footer in footers):
        return None  # Spark says what is wrong with it
    filesystem, _ = resolve(footers[0].file)
    paths = [resolve(footer.file)[1] for footer in footers]
    try:
        return _read(filesystem, paths, score_column, label_column)
    except (OSError, pa.ArrowException):
        return None  # Spark tries again, or says what is wrong


def _read(
    filesystem: fs.FileSystem,
    paths: Sequence[str],
    score_column: str | None,
    label_column: str | None,
) -> LocalRows | None:
    partitioning = None
    if all(f"/{SHARD}=" in path for path in paths):
        partitioning = ds.HivePartitioning(pa.schema([(SHARD, pa.string())]))
    dataset = ds.dataset(paths, filesystem=filesystem, format="parquet", partitioning=partitioning)
    rows = LocalRows(dataset.schema, pa.table({}))
    for name in (score_column, label_column):
        if name in dataset.schema.names and not _is_number(dataset.schema.field(name).type):
            return None  # what is true among texts is for Spark to say
    wanted = {SHARD, KEY, STATUS, *LOCATION_COLUMNS, DEFAULT_SCORE, *rows.noted_fractions}
    wanted |= {name for name in (score_column, label_column) if name is not None}
    return LocalRows(
        dataset.schema, dataset.to_table([name for name in dataset.schema.names if name in wanted])
    )


@dataclass(frozen=True)
class LocalRows:
    """As `spark_nsfw.use.collect.ReportRows`.

    Attributes:
        schema: of the output, with the metadata of its Parquet files.
        table: shard, key, status, where images lie, and the columns that are counted.
    """

    schema: pa.Schema
    table: pa.Table

    @property
    def columns(self) -> Sequence[str]:
        """As `ReportRows.columns`."""
        return list(self.schema.names)

    @property
    def noted_fractions(self) -> Sequence[str]:
        """As `ReportRows.noted_fractions`."""
        footer = self.schema.metadata or {}
        fields = json.loads(footer.get(b"org.apache.spark.sql.parquet.row.metadata", b"{}"))
        noted = {f["name"] for f in fields.get("fields", []) if PROVENANCE in f["metadata"]}
        return [
            field.name
            for field in self.schema
            if field.name in noted and field.type in (pa.float32(), pa.float64())
        ]

    def ends(self, column: str) -> tuple[float, float] | None:
        """As `ReportRows.ends`."""
        scores = self._given(column)
        return (float(scores.min()), float(scores.max())) if len(scores) else None

    def bins(
        self, column: str, low: float, high: float, label: str | None
    ) -> dict[bool | None, npt.NDArray[np.int64]]:
        """As `ReportRows.bins`."""
        scores = self._scores(column)
        known, unsafe = self._labels(label)
        chosen: dict[bool | None, npt.NDArray[np.bool_]] = {
            None: ~known,
            True: known & unsafe,
            False: known & ~unsafe,
        }
        counts = {}
        for value, rows in chosen.items():
            given = scores[rows & ~np.isnan(scores)]
            index = np.floor((given - low) / (high - low) * NUM_BINS).astype(np.int64)
            counts[value] = np.bincount(np.minimum(index, NUM_BINS - 1), minlength=NUM_BINS)
        return counts

    def quantiles(
        self, column: str, shares: Sequence[float], num_scored: int, unsafe: str | None = None
    ) -> list[float]:
        """As `ReportRows.quantiles`."""
        scores = self._scores(column)
        if unsafe is not None:
            known, is_unsafe = self._labels(unsafe)
            scores = scores[known & is_unsafe]
        found = np.quantile(scores[~np.isnan(scores)], shares, method="inverted_cdf")
        return [float(value) for value in found]

    def num_below(self, column: str, thresholds: Sequence[float]) -> list[int]:
        """As `ReportRows.num_below`."""
        return [int((self._given(column) < value).sum()) for value in thresholds]

    def num_removed(
        self, column: str, thresholds: Sequence[float], label: str
    ) -> list[tuple[int, int]]:
        """As `ReportRows.num_removed`."""
        scores = self._scores(column)
        known, unsafe = self._labels(label)
        return [
            (
                int((known & unsafe & (scores >= v)).sum()),
                int((known & ~unsafe & (scores >= v)).sum()),
            )
            for v in thresholds
        ]

    def num_by_status(self) -> dict[str, int]:
        """As `ReportRows.num_by_status`."""
        counts = pc.value_counts(self.table[STATUS])
        return {row["values"]: row["counts"] for row in counts.to_pylist()}

    def shards(self, column: str, threshold: float) -> list[ShardCounts]:
        """As `ReportRows.shards`."""
        failed = pc.not_equal(self.table[STATUS], Status.OK.value)
        high = pa.array(self._scores(column) >= threshold)
        table = pa.table({SHARD: self.table[SHARD], "failed": failed, "high": high})
        counts = table.group_by(SHARD).aggregate(
            [([], "count_all"), ("failed", "sum"), ("high", "sum")]
        )
        return [
            ShardCounts(row[SHARD], row["count_all"], row["failed_sum"], row["high_sum"])
            for row in counts.sort_by(SHARD).to_pylist()
        ]

    def band_samples(self, column: str, low: float, high: float, number: int) -> list[Thumbnail]:
        """As `ReportRows.band_samples`."""
        scores = self._scores(column)
        rows = np.flatnonzero(~np.isnan(scores))
        band = np.floor((scores[rows] - low) / (high - low) * NUM_BANDS).astype(np.int64)
        samples = pd.DataFrame(
            {
                SHARD: self._strings(SHARD)[rows],
                KEY: self._strings(KEY)[rows],
                "score": scores[rows],
                "band": np.minimum(band, NUM_BANDS - 1),
            }
        )
        samples["chance"] = _chances(samples)
        chosen = samples.sort_values(["chance", SHARD, KEY]).groupby("band").head(number)
        ordered = chosen.sort_values(["score", SHARD, KEY])
        return [
            Thumbnail(str(row.shard), str(row.key), float(row.score), None)
            for row in ordered.itertuples()
        ]

    def locations(
        self, samples: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[int, int]]:
        """As `ReportRows.locations`."""
        if not samples or not {*LOCATION_COLUMNS} <= {*self.table.column_names}:
            return {}
        of_shards = pc.is_in(self.table[SHARD], pa.array({shard for shard, _ in samples}))
        of_keys = pc.is_in(self.table[KEY], pa.array({key for _, key in samples}))
        is_ok = pc.equal(self.table[STATUS], Status.OK.value)
        rows = self.table.filter(pc.and_(is_ok, pc.and_(of_shards, of_keys)))
        columns = [rows[name].to_pylist() for name in (SHARD, KEY, *LOCATION_COLUMNS)]
        found = {
            (shard, key): (offset, size) for shard, key, offset, size in zip(*columns, strict=True)
        }
        return {sample: found[sample] for sample in samples if sample in found}

    def decisions(self, first: tuple[str, float], second: tuple[str, float]) -> Decisions:
        """As `ReportRows.decisions`."""
        one, other = (self._scores(column) for column, _ in (first, second))
        both = ~np.isnan(one) & ~np.isnan(other)
        by_one, by_other = one >= first[1], other >= second[1]
        return Decisions(
            first[0],
            second[0],
            int(both.sum()),
            int((both & by_one & ~by_other).sum()),
            int((both & ~by_one & by_other).sum()),
        )

    def with_all(self, columns: Sequence[str], max_rows: int) -> tuple[int, pd.DataFrame]:
        """As `ReportRows.with_all`."""
        scores = np.stack([self._scores(column) for column in columns])
        rows = np.flatnonzero(~np.isnan(scores).any(axis=0))
        samples = pd.DataFrame({SHARD: self._strings(SHARD)[rows], KEY: self._strings(KEY)[rows]})
        for column, values in zip(columns, scores, strict=True):
            samples[column] = values[rows]
        if len(rows) > max_rows:
            samples = samples[_chances(samples) < int(2**32 * max_rows / len(rows))]
        return len(rows), samples

    def _scores(self, column: str) -> npt.NDArray[np.float64]:
        """Of all rows, NaN where there is none."""
        values = pc.cast(self.table[column], pa.float64()).to_numpy()
        return np.asarray(values, np.float64)

    def _given(self, column: str) -> npt.NDArray[np.float64]:
        """The scores that are there."""
        scores = self._scores(column)
        return scores[~np.isnan(scores)]

    def _strings(self, column: str) -> npt.NDArray[np.object_]:
        return np.asarray(self.table[column].to_numpy(zero_copy_only=False), object)

    def _labels(self, label: str | None) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Whether each row has a label, and whether that says unsafe."""
        if label is None:
            nothing = np.zeros(len(self.table), bool)
            return nothing, nothing
        labels = pc.cast(self.table[label], pa.bool_())
        return pc.is_valid(labels).to_numpy(), pc.fill_null(labels, False).to_numpy()


def _is_number(type_: pa.DataType) -> bool:
    is_number = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
    return any(is_one(type_) for is_one in is_number)


def _chances(samples: pd.DataFrame) -> npt.NDArray[np.int64]:
    """A number of 32 bits for each sample, the same every time."""
    return np.array(
        [
            int(hashlib.md5(f"{shard}/{key}".encode(), usedforsecurity=False).hexdigest()[:8], 16)
            for shard, key in zip(samples[SHARD], samples[KEY], strict=True)
        ],
        np.int64,
    )
