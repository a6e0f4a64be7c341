"""Which runs may write into one output: those with the same settings, columns and inputs."""

from __future__ import annotations

import re
from typing import Any

from pyspark.sql.types import StructType

from spark_nsfw.errors import JobError
from spark_nsfw.note import PROVENANCE, refuse_another_note
from spark_nsfw.schema import SCHEMA_PARTITION, SHARD
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.output import Output
from spark_nsfw.spark.types import spark_schema

__all__ = ["made_columns", "refuse_mixing"]

#: Parts of the note that must not change, even with ``allow_changes``.
_NEVER_MIXED = ("rows", "inputs")


def made_columns(schema: StructType) -> list[str]:
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
    before, now = _with_one_name_for_s3(before), _with_one_name_for_s3(now)
    columns = made_columns(existing)
    results = spark_schema(recipe.result_fields)
    refuse_another_note(
        output.url,
        {name: before.get(name) for name in _NEVER_MIXED} | {"result_columns": sorted(columns)},
        {name: now[name] for name in _NEVER_MIXED} | {"result_columns": sorted(results.names)},
        "or --overwrite to start anew",
    )
    refuse_another_note(
        output.url,
        {"result_types": {name: existing[name].dataType.simpleString() for name in columns}},
        {"result_types": {name: results[name].dataType.simpleString() for name in columns}},
        "or --overwrite to start anew",
    )
    if not allow_changes:
        remedy = "or --overwrite to start anew, or --allow-changes to mix both"
        refuse_another_note(output.url, before, now, remedy)


def _with_one_name_for_s3(note: dict[str, Any]) -> dict[str, Any]:
    """A note to compare with another: ``s3://`` and ``s3a://`` are one store."""
    inputs = note["inputs"]
    filesystem = re.sub("^s3n?:", "s3a:", inputs.get("filesystem", ""))
    return note | {"inputs": inputs | {"filesystem": filesystem}}
