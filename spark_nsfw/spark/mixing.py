"""Which runs may write into one output: those with the same settings, columns and inputs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from pyspark.sql.types import StructType

from spark_nsfw.errors import JobError
from spark_nsfw.note import PROVENANCE, refuse_another_note
from spark_nsfw.schema import EMBEDDING_NORM, SCHEMA_PARTITION, SHARD
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.output import Output
from spark_nsfw.spark.types import spark_schema
from spark_nsfw.use.metadata import MetadataFiles

__all__ = ["refuse_mixing", "refuse_other_results", "without_missing_norms"]

#: Parts of the note that must not change, even with ``allow_changes``.
_NEVER_MIXED = ("rows", "inputs")


def without_missing_norms(recipe: Recipe, existing: StructType) -> Recipe:
    """The recipe for an output that was begun before embeddings' norms were kept."""
    if EMBEDDING_NORM in _made_columns(existing):
        return recipe
    return replace(recipe, keep_norms=False)


def refuse_other_results(output: MetadataFiles, recipe: Recipe) -> None:
    """Refuse what an output that has been begun would refuse for its columns.

    Raises:
        JobError: as `refuse_mixing`.
    """
    found = output.spark_schema()
    if found is not None:
        existing = StructType.fromJson(json.loads(found))
        _refuse_other_columns(output.url, existing, without_missing_norms(recipe, existing))


def _refuse_other_columns(url: str, existing: StructType, recipe: Recipe) -> None:
    """Refuse to add rows with other result columns, or columns of other types.

    Args:
        url: the output's.
        existing: its schema.
        recipe: what would be computed.

    Raises:
        JobError: names both sides.
    """
    before = {name: existing[name].dataType.simpleString() for name in _made_columns(existing)}
    now = {f.name: f.dataType.simpleString() for f in spark_schema(recipe.result_fields)}
    if before != now:
        raise JobError(
            f"{url} has the result columns {_listed(before)}; this run would write "
            f"{_listed(now)}. Give another output, or --overwrite to start anew"
        )


def _listed(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(columns.items())) or "none"


def _made_columns(schema: StructType) -> list[str]:
    """The columns of an output that a recipe made; the others are the dataset's own."""
    return [field.name for field in schema if PROVENANCE in (field.metadata or {})]


def refuse_mixing(output: Output, recipe: Recipe, now: dict[str, Any], allow_changes: bool) -> None:
    """Refuse to add rows to an output that was begun with different settings.

    Columns never mix. Nor do inputs of different roots: units are named below their root, so
    equal names would stand for different units, or one unit would come back under another name.

    Args:
        output: has been begun.
        recipe: what would be computed.
        now: the note of the rows that would be added.
        allow_changes: accept other weights, precision or decoding.

    Raises:
        JobError: names the differences; or the output's columns were deleted meanwhile.
    """
    existing, before = output.schema(), output.note()
    if existing is None or before is None:
        raise JobError(
            f"{output.url} has lost its partition {SHARD}={SCHEMA_PARTITION} during this run: "
            "run again, with --overwrite if the output has rows"
        )
    before.setdefault("inputs", now["inputs"])  # notes of older outputs do not have them
    before["inputs"].setdefault("kind", now["inputs"]["kind"])
    kinds = [note["inputs"]["kind"] for note in (before, now)]
    if kinds[0] != kinds[1]:
        raise JobError(
            f"{output.url} was made from {kinds[0]}, and this input is {kinds[1]} "
            "(--input-format): give another output, or --overwrite to start anew"
        )
    before, now = _with_one_name_for_s3(before), _with_one_name_for_s3(now)
    refuse_another_note(
        output.url,
        {name: before.get(name) for name in _NEVER_MIXED},
        {name: now[name] for name in _NEVER_MIXED},
        "or --overwrite to start anew",
    )
    _refuse_other_columns(output.url, existing, recipe)
    if not allow_changes:
        remedy = "or --overwrite to start anew, or --allow-changes to mix both"
        refuse_another_note(output.url, before, now, remedy)


def _with_one_name_for_s3(note: dict[str, Any]) -> dict[str, Any]:
    """A note to compare with another: ``s3://`` and ``s3a://`` are one store."""
    inputs = note["inputs"]
    filesystem = re.sub("^s3n?:", "s3a:", inputs.get("filesystem", ""))
    return note | {"inputs": inputs | {"filesystem": filesystem}}
