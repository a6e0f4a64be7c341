"""Samples → thumbnails of their images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO

from spark_nsfw.errors import ImageError, InputError, ShardError
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import IMAGE_EXTENSIONS
from spark_nsfw.read.tar import MAX_MEMBER_BYTES, Member, iter_runs, split_name
from spark_nsfw.score.pixels import decode_image, encode_jpeg
from spark_nsfw.storage import open_input

__all__ = ["ShardSamples", "iter_thumbnails", "samples_by_shard", "thumbnails"]

_THUMBNAIL_SIDE = 160

#: A shard's name and URL, and the keys of the samples that are wanted of it.
ShardSamples = tuple[str, str, Sequence[str]]


def samples_by_shard(samples: Iterable[tuple[str, str]], inputs: ShardInputs) -> list[ShardSamples]:
    """Samples, by shard and key, as they lie in the inputs.

    Raises:
        InputError: a shard is not among the inputs.
    """
    url_of = {unit.name: unit.place for unit in inputs.list_units()}
    keys: dict[str, list[str]] = {}
    for shard, key in dict.fromkeys(samples):
        if shard not in url_of:
            raise InputError(f"shard {shard} is not below {', '.join(inputs.roots)}")
        keys.setdefault(shard, []).append(key)
    return [(shard, url_of[shard], wanted) for shard, wanted in keys.items()]


def thumbnails(shards: Sequence[ShardSamples]) -> dict[tuple[str, str], bytes]:
    """JPEGs of those images that can still be read, by shard and key; a shard is read once."""

    def draw(one: ShardSamples) -> list[tuple[tuple[str, str], bytes]]:
        shard, url, keys = one
        return [((shard, key), jpeg) for key, jpeg in iter_thumbnails(url, keys)]

    with ThreadPoolExecutor(16) as pool:
        return dict(drawn for of_shard in pool.map(draw, shards) for drawn in of_shard)


def iter_thumbnails(url: str, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Key and JPEG of each of these samples of a shard; no other one's content is read."""
    wanted = set(keys)
    with suppress(ShardError, OSError), open_input(url) as stream:
        for key, run in iter_runs(stream):
            if key in wanted:
                wanted.remove(key)
                with suppress(ImageError):
                    image = _read_image(stream, run)
                    yield key, encode_jpeg(decode_image(image, _THUMBNAIL_SIDE))
            if not wanted:
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
