"""What a person wants to know of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spark_nsfw.schema import Status
from spark_nsfw.use.provenance import ModelNote, lacks_tower, models_of

__all__ = ["ScoreSummary", "Summary", "counted", "weights_lines"]


@dataclass(frozen=True)
class ScoreSummary:
    """The distribution of one score column.

    Attributes:
        quantiles: by probability, from a sketch with a relative rank error of 1e-4.
        share_above_half: of the images that have a score.
    """

    quantiles: dict[float, float]
    share_above_half: float


@dataclass(frozen=True)
class Summary:
    """What an output holds.

    Attributes:
        output: where it is.
        num_shards: shards with at least one row.
        num_samples: rows that stand for a sample.
        num_by_status: rows by status, those that stand for a shard included.
        scores: by score column; empty where nothing was scored.
        provenance: the note of what made it.
        num_new_images: images that this run scored.
        seconds: that scoring them took, from the first shard listed to the last row written.
    """

    output: str
    num_shards: int
    num_samples: int
    num_by_status: dict[str, int]
    scores: dict[str, ScoreSummary]
    provenance: dict[str, Any] = field(default_factory=dict)
    num_new_images: int = 0
    seconds: float = 0.0

    @property
    def num_scored(self) -> int:
        """Samples whose status is ``ok``."""
        return self.num_by_status.get(Status.OK.value, 0)

    @property
    def num_damaged_shards(self) -> int:
        """Rows that stand for a shard, of which something could not be read."""
        return sum(self.num_by_status.values()) - self.num_samples

    @property
    def num_crashed_shards(self) -> int:
        """Shards that were set aside because they killed every worker that read them."""
        return self.num_by_status.get(Status.SHARD_CRASHED.value, 0)

    def __str__(self) -> str:
        damaged = f"; {counted(self.num_damaged_shards, 'shard')} damaged"
        lines = [
            f"{counted(self.num_samples, 'sample')} in {counted(self.num_shards, 'shard')}: "
            f"{self.num_scored:,} scored, "
            f"{self.num_samples - self.num_scored:,} failed"
            f"{damaged if self.num_damaged_shards else ''}",
            *(
                f"  {status:<20} {count:>12,}"
                for status, count in sorted(self.num_by_status.items(), key=lambda x: (-x[1], x[0]))
            ),
        ]
        for column, scores in self.scores.items():
            lines.append(f"{column}: {scores.share_above_half:.2%} above 0.5; quantiles")
            lines.append("  " + "".join(f"{f'{p:.0%}':>9}" for p in scores.quantiles))
            lines.append("  " + "".join(f"{value:>9.3g}" for value in scores.quantiles.values()))
        if self.seconds and self.num_new_images:
            lines.append(
                f"{self.num_new_images:,} images in {self.seconds:,.1f} s: "
                f"{self.num_new_images / self.seconds:,.1f} images/s"
            )
        lines.append(f"output    {self.output}")
        lines += weights_lines(self.provenance)
        return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``2 shards``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def weights_lines(provenance: dict[str, Any]) -> list[str]:
    """Which weights made the scores, and a plain warning where they are random."""
    models = models_of(provenance)
    if lacks_tower(models):
        models.insert(0, ModelNote("tower", "unknown"))
    lines = []
    for model in models:
        sha256 = f" sha256 {model.sha256}" if model.sha256 else ""
        lines.append(f"{model.role:<9} {model.name}: {model.source}{sha256}")
    if any(model.is_random for model in models if model.role == "tower"):
        lines.append("WARNING   the tower's weights are random: these scores mean nothing")
    return lines
