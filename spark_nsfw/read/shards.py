"""Shards → rows: samples in Arrow batches, and the source that reads them unit by unit.

This is where a sample's members get their roles: which one is the image, which
extension is the caption, which columns come from the sidecar or the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from spark_nsfw.errors import InputError, ShardUnreadableError
from spark_nsfw.read.columns import (
    SHARDS_FOR_COLUMNS,
    Description,
    describe,
    infer_from_first,
    passthrough_arrays,
)
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.sidecar import Sidecar
from spark_nsfw.read.source import Rows, Unit
from spark_nsfw.read.tar import MAX_MEMBER_BYTES, Sample, iter_samples
from spark_nsfw.schema import (
    IMAGE_OFFSET,
    LOCATION_COLUMNS,
    Status,
    sample_schema,
    without_image,
)

__all__ = [
    "IMAGE_EXTENSIONS",
    "SampleOptions",
    "ShardSource",
    "iter_sample_batches",
    "iter_sample_rows",
]

#: In order of preference where a sample has several.
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "jp2", "jfif", "ppm", "pgm", "tif", "tiff",
)  # fmt: skip


@dataclass(frozen=True)
class SampleOptions:
    """How shards become rows.

    Attributes:
        image_extensions: which members are images; the first that a sample has wins.
        captions: keep the ``.txt`` member as column ``caption``.
        id_col: the column of sidecar and JSON that holds the sample id.
        passthrough: the dataset's own columns, from `infer_passthrough`.
        max_image_bytes: larger members make a row with status ``member_oversized``.
        locations: tell where in its shard each image lies.
        images: read the images; without them the column ``image`` is null.
        batch_rows: rows in an Arrow batch, at most.
        batch_bytes: image bytes in an Arrow batch after which it is closed.
    """

    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    captions: bool = False
    id_col: str = "key"
    passthrough: tuple[pa.Field, ...] = ()
    max_image_bytes: int = MAX_MEMBER_BYTES
    locations: bool = True
    images: bool = True
    batch_rows: int = 256
    batch_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        extensions = tuple(e.lower().removeprefix(".") for e in self.image_extensions)
        object.__setattr__(self, "image_extensions", extensions)

    @property
    def schema(self) -> pa.Schema:
        """The schema of the batches, `spark_nsfw.schema.sample_schema`."""
        return sample_schema(
            captions=self.captions, passthrough=self.passthrough, locations=self.locations
        )

    def wants(self, extension: str) -> bool:
        """Whether members with this extension need to be read."""
        return (
            (extension in self.image_extensions and self.images)
            or (extension == "txt" and self.captions)
            or (extension == "json" and bool(self.passthrough))
        )


@dataclass
class _Rows:
    """The rows of a batch while it grows."""

    keys: list[str | None] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    descriptions: list[Description] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    messages: list[str | None] = field(default_factory=list)
    locations: list[tuple[int | None, int | None]] = field(default_factory=list)
    images: list[bytes | None] = field(default_factory=list)
    num_bytes: int = 0


def iter_sample_batches(
    shards: Iterable[tuple[str, str]], options: SampleOptions
) -> Iterator[pa.RecordBatch]:
    """Read shards one after the other into Arrow batches with ``options.schema``.

    Every sample becomes one row, in order; a batch never spans two shards.

    Args:
        shards: pairs of (URL, shard name).
    """
    for rows, images in iter_sample_rows(shards, options):
        arrays = [*rows.columns, pa.array(images, pa.binary())]
        yield pa.RecordBatch.from_arrays(arrays, schema=options.schema)


def iter_sample_rows(
    shards: Iterable[tuple[str, str]], options: SampleOptions
) -> Iterator[tuple[pa.RecordBatch, list[bytes | None]]]:
    """As `iter_sample_batches`, with the images beside the rows, for which they are not copied.

    Returns:
        Pairs of a batch without the column ``image`` and its rows' encoded images.
    """
    for url, name in shards:
        sidecar, fault = None, None
        if options.passthrough:
            try:
                sidecar = Sidecar.read(url, options.id_col, options.captions)
            except ShardUnreadableError as exc:
                fault = Sample(None, status=Status.SIDECAR_UNREADABLE, error_message=str(exc))
        rows = _Rows()
        for sample in iter_samples(
            url, options.wants, options.max_image_bytes, through=options.images
        ):
            _append(rows, sample, options)
            if len(rows.keys) >= options.batch_rows or rows.num_bytes >= options.batch_bytes:
                yield _record_batch(rows, name, sidecar, options), rows.images
                rows = _Rows()
        if fault is not None:
            _append(rows, fault, options)
        if rows.keys:
            yield _record_batch(rows, name, sidecar, options), rows.images


def _append(rows: _Rows, sample: Sample, options: SampleOptions) -> None:
    extension = next((e for e in options.image_extensions if e in sample.extensions), None)
    if extension is None and sample.key is not None:
        sample.fail(
            Status.IMAGE_MISSING,
            f"no image among the members with extension {', '.join(sample.extensions)}",
        )
    description = describe(sample.members.get("json"), options.id_col, options.captions)
    caption = sample.members.get("txt")
    usable = extension is not None and sample.status is Status.OK and options.images
    image = sample.members[extension] if usable and extension else None
    rows.keys.append(sample.key)
    rows.captions.append(None if caption is None else caption.decode("utf-8", "replace"))
    rows.descriptions.append(description)
    rows.statuses.append(sample.status.value)
    rows.messages.append(sample.error_message or description.problem)
    rows.locations.append(sample.locations.get(extension or "", (None, None)))
    rows.images.append(image)
    rows.num_bytes += len(image or b"")


def _record_batch(
    rows: _Rows, shard: str, sidecar: Sidecar | None, options: SampleOptions
) -> pa.RecordBatch:
    """The rows without their images."""
    arrays = [pa.array([shard] * len(rows.keys), pa.string()), pa.array(rows.keys, pa.string())]
    if options.captions:
        arrays.append(pa.array(rows.captions, pa.string()))
    arrays += passthrough_arrays(options.passthrough, rows.keys, rows.descriptions, sidecar)
    if options.locations:
        arrays += [pa.array(numbers, pa.int64()) for numbers in zip(*rows.locations, strict=True)]
    arrays.append(pa.array(rows.statuses, pa.string()))
    arrays.append(pa.array(rows.messages, pa.string()))
    return pa.RecordBatch.from_arrays(arrays, schema=without_image(options.schema))


@dataclass(frozen=True)
class ShardSource:
    """Tar shards; a `spark_nsfw.read.source.Source` with a unit for each.

    Attributes:
        inputs: where the shards are.
        options: how they become rows; its ``passthrough`` does not count.
        columns: which of the dataset's own columns to keep; None keeps all, () none.
    """

    inputs: ShardInputs
    options: SampleOptions = field(default_factory=SampleOptions)
    columns: Sequence[str] | None = None

    def describe(self) -> dict[str, Any]:
        """Kind and roots of the input, and what decides which rows come out."""
        return {
            "inputs": self.inputs.describe("webdataset"),
            "rows": {
                "columns": None if self.columns is None else list(self.columns),
                "captions": self.options.captions,
                "id_col": self.options.id_col,
                "image_extensions": list(self.options.image_extensions),
                "max_image_bytes": self.options.max_image_bytes,
            },
        }

    def covers(self, url: str) -> bool:
        """Whether an output there would be read as input, or holds the input."""
        return self.inputs.covers(url)

    def units(self) -> list[Unit]:
        """The shards that are there now, sorted by name.

        Raises:
            NothingToReadError: there are none, or one that was named is missing.
            InputError: two shards have one name.
        """
        return self.inputs.list_units()

    def unit_named(self, name: str) -> Unit:
        """The unit of a name that an output has, without listing any."""
        return Unit(name, self.inputs.place_of(name))

    def schema(
        self, own: Sequence[pa.Field] | None = None, units: Sequence[Unit] | None = None
    ) -> pa.Schema:
        """The columns of its rows, without the image.

        Empty and damaged shards have no columns of their own, so the first few are tried.

        Args:
            own: the dataset's own columns, if they are known, and those of images' locations if
                they are wanted then.
            units: the shards, if they have been listed already.

        Raises:
            InputError: a column that was asked for is not there, or no sidecar can be used.
        """
        locations = own is None or {*LOCATION_COLUMNS} <= {column.name for column in own}
        if own is None and self.columns is not None and not self.columns:
            own = ()
        if own is None:
            listed = self.units() if units is None else units
            shards = [unit.place for unit in listed[:SHARDS_FOR_COLUMNS]]
            try:
                own = infer_from_first(
                    shards, self.options.id_col, self.columns, self.options.captions
                )
            except ShardUnreadableError as exc:
                raise InputError(str(exc)) from exc
        passthrough = [column for column in own if column.name not in LOCATION_COLUMNS]
        return without_image(
            sample_schema(
                captions=self.options.captions, passthrough=passthrough, locations=locations
            )
        )

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[Rows]:
        """The samples of a shard, each batch with its rows' encoded images.

        Raises:
            FileNotFoundError: the shard is gone.
            StorageError: it cannot be read now.
        """
        ours = sample_schema(captions=self.options.captions).names
        own = tuple(column for column in schema if column.name not in ours)
        options = replace(self.options, passthrough=own, locations=IMAGE_OFFSET in schema.names)
        return iter_sample_rows([(unit.place, unit.name)], options)
