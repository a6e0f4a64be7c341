"""The footers of an output → what made it, for people and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from spark_nsfw.note import Footer, inspect_output
from spark_nsfw.schema import SCHEMA_PARTITION, SHARD
from spark_nsfw.use.provenance import ModelNote, lacks_tower, models_of, random_models
from spark_nsfw.use.summary import counted

__all__ = ["Way", "inspect_ways", "ways_json", "ways_text"]

_SHARD_OF = re.compile(rf"/{SHARD}=([^/]+)/[^/]*\Z")


@dataclass(frozen=True)
class Way:
    """One way in which rows of an output were made.

    Attributes:
        footers: of the files that hold them.
    """

    footers: Sequence[Footer]

    @property
    def note(self) -> dict[str, Any] | None:
        """What made them; None if it is not noted."""
        return self.footers[0].note

    @property
    def num_rows(self) -> int:
        """Rows, those without a score included."""
        return sum(footer.num_rows for footer in self.footers)

    @property
    def num_shards(self) -> int:
        """Partitions with rows; 0 where files are not partitioned by shard."""
        found = (_SHARD_OF.search(footer.file) for footer in self.footers)
        return len({unquote(match[1]) for match in found if match} - {SCHEMA_PARTITION})


def inspect_ways(output: str) -> list[Way]:
    """The ways in which an output's rows were made, from its files' footers.

    Args:
        output: directory of Parquet files, or one file; a path or URL.

    Raises:
        InputError: there are no Parquet files.
    """
    return [Way(footers) for footers in inspect_output(output).values()]


def ways_json(output: str, ways: Sequence[Way]) -> str:
    """All that is known, as one JSON object."""
    made = [
        {
            "num_rows": way.num_rows,
            "num_shards": way.num_shards,
            "num_files": len(way.footers),
            "first_file": way.footers[0].file,
            "problem": way.footers[0].problem or None,
            "random_weights": random_models(way.note or {}),
            "note": way.note,
        }
        for way in ways
    ]
    return json.dumps({"output": output, "made": made}, indent=2, sort_keys=True)


def ways_text(output: str, ways: Sequence[Way]) -> str:
    """The same in about ten lines for each way."""
    blocks = [_line("output", output), *("\n".join(_way_lines(way)) for way in ways)]
    return ("\n\n" if len(ways) > 1 else "\n").join(blocks)


def _way_lines(way: Way) -> list[str]:
    shards = f"{counted(way.num_shards, 'shard')}, " if way.num_shards else ""
    files = counted(len(way.footers), "file")
    lines = [_line("rows", f"{way.num_rows:,} in {shards}{files}")]
    if way.note is None:
        return [*lines, _line("made by", f"{way.footers[0].problem} ({way.footers[0].file})")]
    lines.append(_line("made by", f"spark_nsfw {way.note.get('version', 'of unknown version')}"))
    models = models_of(way.note)
    if lacks_tower(models):
        lines.append(_line("tower", "unknown"))
    for model in models:
        lines += _model_lines(model)
    inputs = way.note.get("inputs", {})
    lines.append(_line("input", ", ".join(inputs.get("roots", [inputs.get("root", "unknown")]))))
    if way.note.get("rows"):
        lines.append(_line("options", _options(way.note["rows"])))
    random = random_models(way.note)
    if random:
        lines.append(f"RANDOM WEIGHTS: THESE SCORES MEAN NOTHING ({', '.join(random)})")
    return lines


def _model_lines(model: ModelNote) -> list[str]:
    column = f" → {model.column}" if model.column else ""
    weights = model.short_weights
    if model.is_random:
        weights = weights.replace("random", "RANDOM")
    lines = [_line(model.role, model.name + column), _line("  weights", weights)]
    options = dict(model.options)
    if model.role == "tower":
        width = options.pop("embedding_size", "unknown")
        norm = "L2 norm 1" if options.pop("normalize_embeddings", False) else "not normalized"
        precision = options.pop("precision", "unknown precision")
        lines.append(_line("  embedding", f"width {width}, {norm}, {precision}"))
    if "preprocessing" in options:
        lines.append(_line("  pixels", str(options.pop("preprocessing"))))
    if options:
        lines.append(_line("  options", _options(options)))
    return lines


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in sorted(options.items()))


def _word(value: Any) -> str:
    """A value of a note in a word: ``no`` rather than ``false``, names without brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "default"
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _line(name: str, text: str) -> str:
    return f"{name:<12} {text}"
