"""Samples → thumbnails of their images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import BinaryIO

from spark_nsfw.errors import ImageError, InputError, ShardError
from spark_nsfw.read.images import read_located
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS
from spark_nsfw.read.tar import MAX_MEMBER_BYTES, Member, iter_runs, split_name
from spark_nsfw.score.pixels import decode_image, encode_jpeg
from spark_nsfw.storage import RetryingFile, open_input

__all__ = ["LocatedSample", "ShardSamples", "iter_thumbnails", "samples_by_shard", "thumbnails"]

_THUMBNAIL_SIDE = 160

#: A sample's key, and where its image begins in its shard and its bytes; None if not known.
LocatedSample = tuple[str, int | None, int | None]

#: A shard's name and URL, and the samples that are wanted of it.
ShardSamples = tuple[str, str, Sequence[LocatedSample]]


def samples_by_shard(
    samples: Iterable[tuple[str, str]],
    inputs: ShardInputs,
    locations: Mapping[tuple[str, str], tuple[int, int]],
) -> list[ShardSamples]:
    """Samples, by shard and key, as they lie in the inputs.

    Args:
        samples: shard and key of each.
        inputs: where the shards are.
        locations: where an image begins in its shard and its bytes, as far as is known.

    Raises:
        InputError: a shard is not among the inputs.
    """
    url_of = {unit.name: unit.place for unit in inputs.list_units()}
    wanted: dict[str, list[LocatedSample]] = {}
    for shard, key in dict.fromkeys(samples):
        if shard not in url_of:
            raise InputError(f"shard {shard} is not below {', '.join(inputs.roots)}")
        located = (key, *locations.get((shard, key), (None, None)))
        wanted.setdefault(shard, []).append(located)
    return [(shard, url_of[shard], located) for shard, located in wanted.items()]


def thumbnails(shards: Sequence[ShardSamples]) -> dict[tuple[str, str], bytes]:
    """JPEGs of those images that can still be read, by shard and key."""

    def draw(one: ShardSamples) -> list[tuple[tuple[str, str], bytes]]:
        shard, url, samples = one
        return [((shard, key), jpeg) for key, jpeg in iter_thumbnails(url, samples)]

    with ThreadPoolExecutor(16) as pool:
        return dict(drawn for of_shard in pool.map(draw, shards) for drawn in of_shard)


def iter_thumbnails(url: str, samples: Iterable[LocatedSample]) -> Iterator[tuple[str, bytes]]:
    """Key and JPEG of each of these samples of a shard; no other one's content is read."""
    missing = set()
    with suppress(OSError), closing(RetryingFile(url)) as file:
        for key, offset, num_bytes in samples:
            try:
                if offset is None or num_bytes is None:
                    raise ShardError("nobody noted where its image lies")
                image = read_located(file, key, offset, num_bytes)
            except ShardError:
                missing.add(key)
            else:
                with suppress(ImageError):
                    yield key, encode_jpeg(decode_image(image, _THUMBNAIL_SIDE))
    if missing:
        yield from _look_for(url, missing)


def _look_for(url: str, keys: set[str]) -> Iterator[tuple[str, bytes]]:
    """As `iter_thumbnails`, with a walk along the headers of the shard."""
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
