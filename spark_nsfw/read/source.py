"""Where samples come from: a source is a set of units, and a way to read one of them.

A unit is what a run has done or not done as a whole: a tar, a Parquet file, a folder, or a
file of stored embeddings. Its name is never renumbered; it is the column ``shard`` of the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

__all__ = ["GrowingSource", "ImageSource", "Rows", "Source", "Unit"]

#: Rows of one unit: a batch of their columns, and apart from it, so that they are not
#: copied, what each is scored by: its encoded image or None, or a list array (N,) of
#: stored embeddings.
Rows = tuple[pa.RecordBatch, Any]


@dataclass(frozen=True)
class Unit:
    """What is done as a whole.

    Attributes:
        name: the column ``shard``; unique in its source.
        place: path or URL of its file or directory.
        modified_seconds: when it last changed, in Unix seconds; 0 if unknown.
        num_bytes: its size; 0 if unknown.
        members: names of its files, where ``place`` has others as well.
    """

    name: str
    place: str
    modified_seconds: float = field(default=0.0, compare=False)
    num_bytes: int = field(default=0, compare=False)
    members: tuple[str, ...] = field(default=(), compare=False, repr=False)


class Source(Protocol):
    """What a run reads. An instance travels to Python workers, so it pickles small."""

    def describe(self) -> dict[str, Any]:
        """What the output's note says of it, as plain JSON types.

        ``inputs`` names its kind and roots: rows of two are never mixed in one output.
        ``rows`` has the options that decide which rows and columns come out.
        """
        ...

    def covers(self, url: str) -> bool:
        """Whether an output at this path or URL would be read as input, or holds the input."""
        ...

    def units(self) -> list[Unit]:
        """What there is to read now, sorted by name.

        Raises:
            InputError: what was named is missing, or two units have one name.
            NothingToReadError: there is not one unit.
        """
        ...

    def schema(
        self, own: Sequence[pa.Field] | None = None, units: Sequence[Unit] | None = None
    ) -> pa.Schema:
        """The columns of its rows, without what they are scored by.

        Args:
            own: the dataset's own columns as an earlier run settled them; None looks into
                the first units that have any.
            units: of the source, if they have been listed already.

        Raises:
            InputError: a column that was asked for is not there.
        """
        ...

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[Rows]:
        """The rows of a unit, in order; at least one row, whatever the unit holds.

        What is damaged is a row that says so.

        Raises:
            FileNotFoundError: the unit is gone; raised before the first row.
            StorageError: it cannot be read now.
        """
        ...


class ImageSource(Source, Protocol):
    """A source of images."""

    def unit_named(self, name: str) -> Unit:
        """The unit of a name that an output has, without listing any.

        Raises:
            StorageError: it cannot be found out now.
        """
        ...


@runtime_checkable
class GrowingSource(ImageSource, Protocol):
    """A source whose units get more samples later on, which are units of their own then."""

    def remaining(
        self,
        units: Sequence[Unit],
        done: Iterable[str],
        keys_of: Callable[[Iterable[str]], Mapping[str, set[str]]],
    ) -> tuple[list[Unit], list[str]]:
        """The units, with none of the samples that are done under another unit's name.

        Args:
            units: of this source.
            done: names of units whose rows an output has.
            keys_of: tells the keys of each of some units that are done.

        Returns:
            Those units, and the names of units that are done and have samples of another one, as
            two runs can leave them that saw different samples at the same time.
        """
        ...
