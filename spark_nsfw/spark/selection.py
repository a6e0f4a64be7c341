"""Which rows an export keeps: written once, so that a stopped run goes on with the same rows."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_nsfw.errors import InputError
from spark_nsfw.schema import (
    ERROR_MESSAGE,
    KEY,
    LOCATION_COLUMNS,
    SCHEMA_PARTITION,
    SHARD,
    STATUS,
)
from spark_nsfw.spark.output import ParquetOutput
from spark_nsfw.spark.types import quoted
from spark_nsfw.use.export_output import selection_directory
from spark_nsfw.use.regroup import ExportOptions
from spark_nsfw.use.tar_writer import KEPT, SOURCE_SHARD

__all__ = ["freeze", "kept_columns"]

_OURS = (SHARD, KEY, STATUS, ERROR_MESSAGE)


def kept_columns(
    rows: DataFrame, columns: Sequence[str] | None, options: ExportOptions
) -> list[str]:
    """The columns that go into the sidecars, in the order of the rows.

    Where images lay in their shards does not, unless it is asked for: they lie elsewhere now.

    Raises:
        InputError: the rows are no metadata, or lack a column that is wanted.
    """
    missing = [name for name in _OURS if name not in rows.columns]
    if missing:
        raise InputError(
            f"the metadata has no column {', '.join(missing)}: export takes what `spark-nsfw "
            "score` or `spark-nsfw classify` wrote"
        )
    if rows.schema[SHARD].dataType.simpleString() != "string":
        raise InputError(
            "the metadata's shard names were read as numbers, because its partition "
            f"{SHARD}={SCHEMA_PARTITION} is missing"
        )
    unknown = [name for name in columns or () if name not in rows.columns]
    if unknown:
        raise InputError(f"no column {', '.join(unknown)}; there are {', '.join(rows.columns)}")
    if options.renumber and options.old_id_col in rows.columns:
        raise InputError(
            f"the metadata has a column {options.old_id_col} already; give another name for the "
            "old keys (old_id_col)"
        )
    always = {*_OURS, options.id_col, SOURCE_SHARD}
    wanted = {*rows.columns} - {*LOCATION_COLUMNS} if columns is None else {*columns}
    return [name for name in rows.columns if name in always | wanted]


def freeze(rows: DataFrame, output: str, request: dict[str, Any]) -> dict[str, Any]:
    """Write which rows to keep into a directory that no other run writes to.

    Args:
        rows: with a column `KEPT` of booleans.
        output: of the export, a path or URL.
        request: what is exported; its ``columns`` are written.

    Returns:
        The plan: the request, where the selection is, and its numbers of rows.
    """
    plan: dict[str, Any] = {"request": request, "selection": str(uuid.uuid4())}
    selection = selection_directory(output, plan)
    # Rows that are not kept go along, with nothing but their status, to be counted where they
    # are written: RAPIDS cannot plan a query that counts them with `observe`.
    columns = [
        F.col(quoted(name))
        if name in (SHARD, STATUS)
        else F.when(F.col(KEPT), F.col(quoted(name))).alias(name)
        for name in request["columns"]
    ]
    frozen = rows.select(*columns, KEPT)
    place = ParquetOutput(rows.sparkSession, selection)
    place.begin(frozen.schema, {})
    place.append(frozen)
    num_rows: Counter[str] = Counter()
    num_selected: Counter[str] = Counter()
    num_selected_by_shard: Counter[str] = Counter()
    for row in place.rows().groupBy(SHARD, STATUS, KEPT).count().collect():
        num_rows[row[STATUS]] += row["count"]
        if row[KEPT]:
            num_selected[row[STATUS]] += row["count"]
            num_selected_by_shard[row[SHARD]] += row["count"]
    return plan | {
        "num_rows": num_rows,
        "num_selected": num_selected,
        "num_selected_by_shard": num_selected_by_shard,
    }
