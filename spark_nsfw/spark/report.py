"""Metadata → the counts and thumbnails that the report shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from pyarrow import fs
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from spark_nsfw.errors import ImageError, InputError, ShardError
from spark_nsfw.note import inspect_output
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS
from spark_nsfw.read.tar import MAX_MEMBER_BYTES, Member, iter_runs, split_name
from spark_nsfw.schema import KEY, SHARD, STATUS, Status
from spark_nsfw.score.pixels import decode_image, encode_jpeg
from spark_nsfw.storage import absolute, open_input, resolve
from spark_nsfw.use.report import (
    NUM_BANDS,
    NUM_BINS,
    LabelCounts,
    ReportData,
    ShardCounts,
    Thumbnail,
)

__all__ = ["collect_report"]

_THUMBNAIL_SIDE = 160
_SAMPLES_PER_BAND = 8


def collect_report(
    spark: SparkSession,
    metadata: str,
    *,
    score_column: str = "nsfw_score",
    threshold: float | None = None,
    label_column: str | None = None,
    wanted_recall: float = 0.95,
    inputs: ShardInputs | None = None,
) -> ReportData:
    """Count what `spark_nsfw.use.page.render` shows.

    Args:
        spark: classic or Connect.
        metadata: an output of ``spark-nsfw score`` or ``classify``.
        score_column: which score it is about.
        threshold: at which shards are compared; None takes the middle of the range.
        label_column: of booleans, or of numbers that are 1 where a sample is unsafe.
        wanted_recall: share of the unsafe samples that is to be removed.
        inputs: where the shards are; with them there is a contact sheet.

    Raises:
        InputError: a column is not there, or nothing has a score.
    """
    metadata = absolute(metadata)
    notes = inspect_output(metadata)
    rows = spark.read.parquet(metadata)
    for name in (SHARD, STATUS, KEY, score_column, *([label_column] if label_column else [])):
        if name not in rows.columns:
            raise InputError(f"{metadata} has no column {name!r}: {', '.join(rows.columns)}")
    if not 0 < wanted_recall <= 1:
        raise InputError(f"recall is above 0 and at most 1, not {wanted_recall}")
    score = F.col(f"`{score_column}`")
    low, high = _range(rows, score, metadata)
    if threshold is None:
        threshold = (low + high) / 2
    index = F.floor((score.cast("double") - low) / (high - low) * NUM_BINS).cast("int")
    binned = F.least(index, F.lit(NUM_BINS - 1))
    label = F.lit(None) if label_column is None else F.col(f"`{label_column}`").cast("boolean")
    scored = rows.where(score.isNotNull())
    found = scored.groupBy(binned.alias("bin"), label.alias("label")).count().collect()
    counts = {is_unsafe: np.zeros(NUM_BINS, np.int64) for is_unsafe in (None, False, True)}
    for row in found:
        counts[row["label"]][row["bin"]] += row["count"]
    num_by_status = {row[STATUS]: row["count"] for row in rows.groupBy(STATUS).count().collect()}
    return ReportData(
        source=metadata,
        score_column=score_column,
        low=low,
        high=high,
        counts=sum(counts.values(), np.zeros(NUM_BINS, np.int64)),
        num_by_status=num_by_status,
        shards=_shards(rows, score, threshold, metadata),
        notes=[json.loads(note) for note in notes if note.startswith("{")],
        threshold=threshold,
        labels=None
        if label_column is None
        else LabelCounts(label_column, counts[True], counts[False]),
        wanted_recall=wanted_recall,
        thumbnails=() if inputs is None else _thumbnails(scored, score, low, high, inputs),
    )


def _range(rows: DataFrame, score: Column, metadata: str) -> tuple[float, float]:
    """0 to 1 where all scores are, else whole numbers around them."""
    least, most = rows.agg(F.min(score), F.max(score)).collect()[0]
    if least is None:
        raise InputError(f"{metadata}: nothing has a score")
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


def _thumbnails(
    scored: DataFrame, score: Column, low: float, high: float, inputs: ShardInputs
) -> list[Thumbnail]:
    """A few samples of every band, the same ones every time."""
    spark = scored.sparkSession
    band = F.least(F.floor((score - low) / (high - low) * NUM_BANDS), F.lit(NUM_BANDS - 1))
    by_chance = Window.partitionBy("band").orderBy(F.xxhash64(SHARD, KEY), SHARD, KEY)
    chosen = (
        scored.select(SHARD, KEY, score.cast("double").alias("score"), band.alias("band"))
        .withColumn("position", F.row_number().over(by_chance))
        .where(F.col("position") <= _SAMPLES_PER_BAND)
        .orderBy("score")
        .collect()
    )
    url_of = {unit.name: unit.place for unit in inputs.list_units()}
    keys: dict[str, list[str]] = {}
    for row in chosen:
        if row[SHARD] not in url_of:
            raise InputError(f"shard {row[SHARD]} is not below {', '.join(inputs.roots)}")
        keys.setdefault(row[SHARD], []).append(row[KEY])
    tasks = spark.createDataFrame(
        [(name, url_of[name], wanted) for name, wanted in keys.items()],
        "shard string, url string, keys array<string>",
    )
    found = tasks.repartition(len(keys)).mapInArrow(_draw, "shard string, key string, jpeg binary")
    jpeg_of = {(row.shard, row.key): bytes(row.jpeg) for row in found.collect()}
    return [
        Thumbnail(row[SHARD], row[KEY], row["score"], jpeg_of.get((row[SHARD], row[KEY])))
        for row in chosen
    ]


def _draw(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Shards and keys → thumbnails of those images that can still be read."""
    for batch in batches:
        for row in batch.to_pylist():
            found = dict(_iter_thumbnails(row["url"], set(row["keys"])))
            arrays = [
                pa.array([row["shard"]] * len(found), pa.string()),
                pa.array(found.keys(), pa.string()),
                pa.array(found.values(), pa.binary()),
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=["shard", "key", "jpeg"])


def _iter_thumbnails(url: str, keys: set[str]) -> Iterator[tuple[str, bytes]]:
    """Key and thumbnail of each of these samples; no other one's content is read."""
    with suppress(ShardError, OSError), open_input(url) as stream:
        for key, run in iter_runs(stream):
            if key in keys:
                keys.remove(key)
                with suppress(ImageError):
                    image = _read_image(stream, run)
                    yield key, encode_jpeg(decode_image(image, _THUMBNAIL_SIDE))
            if not keys:
                return


def _read_image(stream: BinaryIO, run: Sequence[Member]) -> bytes:
    """The encoded image of a sample; nothing where it has none."""
    member_of = {(split_name(member.name) or ("", ""))[1]: member for member in run}
    for extension in IMAGE_EXTENSIONS:
        if extension in member_of:
            header = member_of[extension].header
            stream.seek(header.offset_data)
            return stream.read(min(header.size, MAX_MEMBER_BYTES))
    return b""
