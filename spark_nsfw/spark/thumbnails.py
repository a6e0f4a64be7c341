"""Samples → thumbnails of their images, read from the shards by Spark's tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO

import pyarrow as pa
from pyspark.sql import SparkSession

from spark_nsfw.errors import ImageError, InputError, ShardError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS
from spark_nsfw.read.tar import MAX_MEMBER_BYTES, Member, iter_runs, split_name
from spark_nsfw.score.pixels import decode_image, encode_jpeg
from spark_nsfw.storage import open_input

__all__ = ["draw_thumbnails"]

_THUMBNAIL_SIDE = 160


def draw_thumbnails(
    spark: SparkSession, samples: Iterable[tuple[str, str]], inputs: ShardInputs
) -> dict[tuple[str, str], bytes]:
    """JPEGs of those images that can still be read, by shard and key; a shard is read once.

    Args:
        spark: classic or Connect.
        samples: shard and key of each.
        inputs: where the shards are.

    Raises:
        InputError: a shard is not among the inputs.
    """
    url_of = {unit.name: unit.place for unit in inputs.list_units()}
    keys: dict[str, list[str]] = {}
    for shard, key in dict.fromkeys(samples):
        if shard not in url_of:
            raise InputError(f"shard {shard} is not below {', '.join(inputs.roots)}")
        keys.setdefault(shard, []).append(key)
    tasks = spark.createDataFrame(
        [(name, url_of[name], wanted) for name, wanted in keys.items()],
        "shard string, url string, keys array<string>",
    )
    found = tasks.repartition(len(keys)).mapInArrow(_draw, "shard string, key string, jpeg binary")
    return {(row.shard, row.key): bytes(row.jpeg) for row in found.collect()}


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
