"""Samples → thumbnails of their images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from typing import BinaryIO

from spark_nsfw.errors import ImageError, InputError, ShardError
from spark_nsfw.read.images import read_located
from spark_nsfw.read.shards import IMAGE_EXTENSIONS, ShardSource
from spark_nsfw.read.source import ImageSource, Unit
from spark_nsfw.read.tar import MAX_MEMBER_BYTES, Member, iter_runs, split_name
from spark_nsfw.schema import KEY
from spark_nsfw.score.pixels import decode_image, encode_jpeg
from spark_nsfw.storage import RetryingFile, open_input

__all__ = [
    "LocatedSample",
    "UnitSamples",
    "iter_thumbnails",
    "refuse_none",
    "samples_by_unit",
    "thumbnails",
]

_THUMBNAIL_SIDE = 160

#: A sample's key, and where its image begins in its shard and its bytes; None if not known.
LocatedSample = tuple[str, int | None, int | None]

#: A unit's name and place, and the samples that are wanted of it.
UnitSamples = tuple[str, str, Sequence[LocatedSample]]


def samples_by_unit(
    samples: Iterable[tuple[str, str]],
    source: ImageSource,
    locations: Mapping[tuple[str, str], tuple[int, int]],
) -> list[UnitSamples]:
    """Samples, by shard and key, as they lie in the input.

    Args:
        samples: shard and key of each.
        source: what was scored.
        locations: where an image begins in its shard and its bytes, as far as is known.
    """
    wanted: dict[str, list[LocatedSample]] = {}
    for shard, key in dict.fromkeys(samples):
        located = (key, *locations.get((shard, key), (None, None)))
        wanted.setdefault(shard, []).append(located)
    return [(shard, source.unit_named(shard).place, located) for shard, located in wanted.items()]


def thumbnails(units: Sequence[UnitSamples], source: ImageSource) -> dict[tuple[str, str], bytes]:
    """JPEGs of those images that can still be read, by shard and key."""

    def draw(one: UnitSamples) -> list[tuple[tuple[str, str], bytes]]:
        return [((one[0], key), jpeg) for key, jpeg in iter_thumbnails(one, source)]

    with ThreadPoolExecutor(16) as pool:
        return dict(drawn for of_unit in pool.map(draw, units) for drawn in of_unit)


def refuse_none(drawn: Mapping[tuple[str, str], bytes], units: Sequence[UnitSamples]) -> None:
    """Refuse an input of which not one image could be read.

    Raises:
        InputError: names a place where there should have been some.
    """
    if units and not drawn:
        raise InputError(
            f"none of the images could be read, such as {units[0][2][0][0]} of {units[0][1]}: "
            "is that what was scored?"
        )


def iter_thumbnails(unit: UnitSamples, source: ImageSource) -> Iterator[tuple[str, bytes]]:
    """Key and JPEG of each of a unit's samples that can still be read."""
    name, place, samples = unit
    if isinstance(source, ShardSource):
        images = _of_shard(place, samples)
    else:
        images = _of_unit(Unit(name, place), [key for key, _, _ in samples], source)
    with suppress(ShardError, OSError):
        for key, image in images:
            with suppress(ImageError):
                yield key, encode_jpeg(decode_image(image, _THUMBNAIL_SIDE))


def _of_unit(unit: Unit, keys: Sequence[str], source: ImageSource) -> Iterator[tuple[str, bytes]]:
    """Key and image of samples; of a table, all rows up to the last of them are read."""
    wanted = set(keys)
    for rows, images in source.read(replace(unit, members=tuple(keys)), source.schema()):
        for key, image in zip(rows.column(KEY).to_pylist(), images, strict=True):
            if key in wanted and image is not None:
                wanted.remove(key)
                yield key, image
        if not wanted:
            return


def _of_shard(url: str, samples: Iterable[LocatedSample]) -> Iterator[tuple[str, bytes]]:
    """Key and image of samples; no other one's content is read."""
    missing = set()
    with closing(RetryingFile(url)) as file:
        for key, offset, num_bytes in samples:
            try:
                if offset is None or num_bytes is None:
                    raise ShardError("nobody noted where its image lies")
                image = read_located(file, key, offset, num_bytes)
            except ShardError:
                missing.add(key)
            else:
                yield key, image
    if missing:
        yield from _look_for(url, missing)


def _look_for(url: str, keys: set[str]) -> Iterator[tuple[str, bytes]]:
    """Key and image of samples of a shard, by a walk along its headers."""
    with open_input(url) as stream:
        for key, run in iter_runs(stream):
            if key in keys:
                keys.remove(key)
                yield key, _read_image(stream, run)
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
