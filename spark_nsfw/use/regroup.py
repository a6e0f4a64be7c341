"""Kept rows per shard → which rows each output shard gets.

Pure arithmetic: an output shard can be written anywhere, and again, with the same bytes::

    selected:    00000 (3 rows)   00001 (4 rows)        samples_per_shard = 5
    output:      00000 = 00000[0:3] + 00001[0:2]        00001 = 00001[2:4]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spark_nsfw.errors import InputError
from spark_nsfw.schema import KEY

__all__ = ["ExportOptions", "OutputShard", "Piece", "plan_shards"]


@dataclass(frozen=True)
class ExportOptions:
    """How selected samples become shards.

    Attributes:
        samples_per_shard: of every output shard but the last; None keeps the shards as
            they are, less what is not selected.
        renumber: give samples new keys, ``000420031`` for the 32nd sample of shard 42;
            else they keep theirs.
        shard_digits: of the numbers that regrouped shards get for names.
        id_col: a column of the metadata that holds the keys as well, and gets the new ones.
        old_id_col: the column that keeps what ``id_col`` held.
    """

    samples_per_shard: int | None = None
    renumber: bool = False
    shard_digits: int = 5
    id_col: str = KEY
    old_id_col: str = "source_key"

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.samples_per_shard < 1:
            raise InputError(
                f"--samples-per-shard (samples_per_shard) is at least 1, not "
                f"{self.samples_per_shard}"
            )
        if self.shard_digits < 1:
            raise InputError(
                f"--shard-digits (shard_digits, max_shards) is at least 1, not {self.shard_digits}"
            )
        if self.renumber and self.samples_per_shard is None:
            raise InputError(
                "--renumber (renumber) numbers the samples of regrouped shards: set "
                "--samples-per-shard (samples_per_shard)"
            )

    def new_key(self, shard_number: int, position: int) -> str:
        """The key of a renumbered sample, all of them as long as each other.

        Source: NVIDIA NeMo Curator, ``ImageTextPairDataset.to_webdataset``.
        """
        assert self.samples_per_shard is not None
        sample_digits = len(str(self.samples_per_shard - 1)) if self.samples_per_shard > 1 else 0
        number = shard_number * 10**sample_digits + position
        return f"{number:0{self.shard_digits + sample_digits}d}"


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of one shard's selection."""

    shard: str
    start: int
    stop: int


@dataclass(frozen=True)
class OutputShard:
    """A shard to write: its name without ``.tar``, its number, and what it consists of."""

    name: str
    number: int
    pieces: tuple[Piece, ...]

    @property
    def num_samples(self) -> int:
        """Rows that were selected for it."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def plan_shards(num_selected: Mapping[str, int], options: ExportOptions) -> list[OutputShard]:
    """Which rows of which selections make up which output shard.

    Args:
        num_selected: shard name → rows that were selected.
        options: whether and how shards are regrouped.

    Raises:
        InputError: more shards than ``shard_digits`` can number.
    """
    shards = sorted((name, count) for name, count in num_selected.items() if count)
    if options.samples_per_shard is None:
        return [
            OutputShard(name, number, (Piece(name, 0, count),))
            for number, (name, count) in enumerate(shards)
        ]
    size = options.samples_per_shard
    num_shards = -(-sum(count for _, count in shards) // size)
    if num_shards > 10**options.shard_digits:
        raise InputError(
            f"{num_shards:,} shards of {size:,} samples cannot be numbered with "
            f"{options.shard_digits} digits: take more with --shard-digits (shard_digits, "
            "max_shards), or larger shards with --samples-per-shard (samples_per_shard)"
        )
    pieces: list[list[Piece]] = [[] for _ in range(num_shards)]
    position = 0
    for name, count in shards:
        start = 0
        while start < count:
            stop = min(count, start + size - position % size)
            pieces[position // size].append(Piece(name, start, stop))
            position += stop - start
            start = stop
    return [
        OutputShard(f"{number:0{options.shard_digits}d}", number, tuple(parts))
        for number, parts in enumerate(pieces)
    ]
