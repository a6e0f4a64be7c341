"""Metadata and a predicate → WebDataset shards of what satisfies it.

The selected rows are written once, below the output; with their numbers per shard they
are the plan. After that every output shard is a task of its own that reads and writes
files, so a stopped run goes on with the output shards that are not there yet.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nsfw.errors import InputError, JobError
from spark_nsfw.files import file_info, files_digest, list_files
from spark_nsfw.note import PROVENANCE, refuse_another_note
from spark_nsfw.ownership import refuse_overlap
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.schema import KEY, SHARD, STATUS, Status
from spark_nsfw.spark.cluster import reader_workers
from spark_nsfw.spark.output import read_note
from spark_nsfw.spark.selection import freeze, kept_columns
from spark_nsfw.spark.stores import adopt_stores, on_workers
from spark_nsfw.spark.waves import reason
from spark_nsfw.storage import absolute, open_input
from spark_nsfw.use.export_output import (
    delete_partial_files,
    delete_selections,
    finished_shards,
    read_plan,
    refuse_export,
    refuse_foreign_output,
    selection_directory,
    write_plan,
)
from spark_nsfw.use.regroup import ExportOptions, OutputShard, Piece, plan_shards
from spark_nsfw.use.summary import counted
from spark_nsfw.use.tar_writer import KEPT, write_output_shard

__all__ = ["ExportSummary", "export_metadata", "export_rows", "plan_digest"]

#: Output shards share a task where there are more of them than this.
_MAX_TASKS = 10_000


@dataclass(frozen=True)
class ExportSummary:
    """What an output of an export holds, and what was left out.

    Attributes:
        output: where it is.
        num_shards: tars.
        num_samples: in them.
        num_bytes: of the tars.
        num_rows: rows of the metadata by status.
        num_selected: how many of them were selected, by status.
        num_lost: selected samples with a score that are not in the shards that were given, or
            not whole.
        problems: what could not be found or copied, for a person.
    """

    output: str
    num_shards: int
    num_samples: int
    num_bytes: int
    num_rows: dict[str, int]
    num_selected: dict[str, int]
    num_lost: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def num_missing(self) -> int:
        """Samples that were selected but not copied, `num_lost` and damaged ones."""
        return sum(self.num_selected.values()) - self.num_samples

    def __str__(self) -> str:
        of_samples = sum(n for s, n in self.num_rows.items() if not Status(s).is_shard_level)
        rejected = self.num_rows.get(Status.OK, 0) - self.num_selected.get(Status.OK, 0)
        lines = [
            f"{self.num_samples:,} of {of_samples:,} samples in "
            f"{counted(self.num_shards, 'shard')}, {self.num_bytes / 1e6:,.1f} MB",
            f"  {'not selected':<20} {rejected:>12,}",
        ]
        for status, count in sorted(self.num_rows.items(), key=lambda item: -item[1]):
            left_out = count - self.num_selected.get(status, 0)
            if status != Status.OK and left_out:
                lines.append(f"  {status:<20} {left_out:>12,}")
        if self.num_missing:
            lines.append(f"  {'could not be copied':<20} {self.num_missing:>12,}")
            lines += [f"WARNING   {problem}" for problem in self.problems[:10]]
            if len(self.problems) > 10:
                more = counted(len(self.problems) - 10, "more such problem")
                lines.append(f"WARNING   and {more}")
        if not any(self.num_selected.values()):
            lines.append("WARNING   no sample was selected: no shard is written")
        return "\n".join([*lines, f"output    {self.output}"])


def export_metadata(
    spark: SparkSession,
    metadata: str,
    output: str,
    inputs: ShardInputs,
    where: str,
    *,
    columns: Sequence[str] | None = None,
    keep_unscored: bool = False,
    allow_moved: bool = False,
    options: ExportOptions | None = None,
) -> ExportSummary:
    """Export the samples of an output of the scoring job that satisfy a predicate.

    Samples that are selected but not in the shards are counted in the summary, and the rest is
    exported.

    Args:
        spark: classic or Connect.
        metadata: the output, a path or URL.
        output: a directory of its own for the new shards.
        inputs: where the shards are that were scored.
        where: a predicate in Spark SQL, such as ``nsfw_score < 0.5``.
        columns: which of the metadata's columns the sidecars get; None takes all.
        keep_unscored: export what has no score as well.
        allow_moved: accept shards in another place than the one that was scored.
        options: how samples become shards.

    Raises:
        InputError: arguments that cannot work. Nothing was written.
        JobError: the output was made with different settings, or the run failed.
    """
    adopt_stores(spark)
    metadata = absolute(metadata)
    refuse_export(metadata, output, inputs, allow_moved=allow_moved)
    root, names = list_files(metadata)
    request = {
        "where": where,
        "metadata": {"source": root, "num_files": len(names)},
    }
    try:
        rows = spark.read.parquet(metadata)
        rows.where(where)
    except AnalysisException as exc:
        raise InputError(f"{where!r} cannot be applied to {metadata}: {exc}") from exc
    return export_rows(
        rows,
        F.expr(where),
        inputs,
        output,
        request,
        columns=columns,
        keep_unscored=keep_unscored,
        options=options,
    )


def plan_digest(rows: DataFrame) -> str:
    """What tells rows that are yet to be computed from others, the same in every session.

    Spark's plan names Python functions and does not show what they do.
    """
    text = io.StringIO()
    with redirect_stdout(text):
        rows.explain(mode="extended")
    analyzed = text.getvalue().partition("== Optimized")[0]
    return hashlib.sha256(re.sub(r"#\d+L?", "", analyzed).encode()).hexdigest()


def export_rows(
    rows: DataFrame,
    where: Column,
    inputs: ShardInputs,
    output: str,
    request: dict[str, Any],
    *,
    columns: Sequence[str] | None = None,
    keep_unscored: bool = False,
    options: ExportOptions | None = None,
) -> ExportSummary:
    """Export the samples of some metadata rows.

    Args:
        rows: with the columns of `spark_nsfw.schema`, read or yet to be computed.
        where: what makes a row one to keep.
        request: what tells this export from another into the same output, besides its
            options and the files that the rows are read from.
        inputs, output, columns, keep_unscored, options: as for `export_metadata`.

    Raises:
        InputError: arguments that cannot work.
        JobError: the output was made with different settings, or the run failed.
    """
    spark, options = rows.sparkSession, options or ExportOptions()
    adopt_stores(spark)
    output = absolute(output)
    columns_kept = kept_columns(rows, columns, options)
    refuse_overlap(output, [inputs.filesystem + root for root in inputs.roots])
    refuse_foreign_output(output)
    url_of = {unit.name: unit.place for unit in inputs.list_units()}
    request = request | {
        "input_files_sha256": files_digest(map(unquote, rows.inputFiles())),
        "columns": columns_kept,
        "keep_unscored": keep_unscored,
        "options": asdict(options),
    }
    plan = read_plan(output)
    if plan is None:
        delete_selections(output)  # of runs that were stopped before their plan was complete
        scored = F.col(STATUS) == Status.OK.value
        kept = scored & where
        if keep_unscored:
            kept = kept | (~scored & F.col(KEY).isNotNull())
        plan = freeze(rows.withColumn(KEPT, F.coalesce(kept, F.lit(False))), output, request)
        try:
            shards = _shards_of(plan, url_of, inputs, options)
        except InputError:
            delete_selections(output)
            raise
        write_plan(output, plan)
    else:
        refuse_another_note(output, plan["request"], request)
        shards = _shards_of(plan, url_of, inputs, options)
    done = finished_shards(output)
    pending = [shard for shard in shards if shard.name not in done]
    note = (read_note(rows.schema) or {}) | {"export": request}
    problems = _write(spark, pending, url_of, output, options, note, plan) if pending else []
    return _finish(output, shards, plan, problems)


def _shards_of(
    plan: dict[str, Any], url_of: dict[str, str], inputs: ShardInputs, options: ExportOptions
) -> list[OutputShard]:
    """The output shards of a plan.

    Raises:
        InputError: some shards of the metadata were not given; or see `plan_shards`.
    """
    unknown = sorted(plan["num_selected_by_shard"].keys() - url_of.keys())
    if unknown:
        raise InputError(
            f"cannot find {counted(len(unknown), 'shard')} of the metadata below "
            f"{', '.join(inputs.roots)}, such as {unknown[0]}: give the input that was scored"
        )
    return plan_shards(plan["num_selected_by_shard"], options)


def _write(
    spark: SparkSession,
    shards: Sequence[OutputShard],
    url_of: dict[str, str],
    output: str,
    options: ExportOptions,
    note: dict[str, Any],
    plan: dict[str, Any],
) -> list[str]:
    """Write output shards in parallel; returns what could not be found or copied.

    Raises:
        JobError: shards clash, or one could not be read or written now.
    """
    prefix, names = list_files(selection_directory(output, plan))
    selection_of: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith(".parquet"):
            continue
        partition, _, _ = name.partition("/")
        selection_of.setdefault(unquote(partition.removeprefix(f"{SHARD}=")), []).append(
            prefix + name
        )
    if not selection_of:
        raise JobError(
            f"{output} was finished before, and {shards[0].name}.tar is gone from it: "
            "export into another output, or delete this one to start anew"
        )
    footer = {PROVENANCE: json.dumps(note)}

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for text in batch.column("task").to_pylist():
                task = json.loads(text)
                pieces = tuple(Piece(**piece) for piece in task["pieces"])
                shard = OutputShard(task["name"], task["number"], pieces)
                urls, selections = task["urls"], task["selections"]
                refusal = None
                try:
                    written = write_output_shard(shard, urls, selections, output, options, footer)
                    problems = written.problems
                except JobError as exc:  # told by the driver, without a worker's traceback
                    problems, refusal = [], str(exc)
                arrays = [
                    pa.array([problems], pa.list_(pa.string())),
                    pa.array([refusal], pa.string()),
                ]
                yield pa.RecordBatch.from_arrays(arrays, names=["problems", "refusal"])

    def task(shard: OutputShard) -> str:
        names = {piece.shard for piece in shard.pieces}
        places = {
            "urls": {name: url_of[name] for name in names},
            "selections": {name: selection_of[name] for name in names},
        }
        return json.dumps(asdict(shard) | places)

    tasks = spark.createDataFrame([(task(shard),) for shard in shards], "task string")
    with reader_workers(spark):
        results = tasks.repartition(min(len(shards), _MAX_TASKS)).mapInArrow(
            on_workers(write), "problems array<string>, refusal string"
        )
        try:
            rows = results.collect()
        except Exception as exc:
            raise JobError(
                f"a shard could not be written: {reason(exc)}. Run again to resume"
            ) from exc
    refusals = [row.refusal for row in rows if row.refusal is not None]
    if refusals:
        raise JobError(refusals[0])
    return [problem for row in rows for problem in row.problems]


def _finish(
    output: str, shards: Sequence[OutputShard], plan: dict[str, Any], problems: list[str]
) -> ExportSummary:
    """Sum up, and clean up."""

    def count(shard: OutputShard) -> tuple[int, int]:
        with open_input(f"{output}/{shard.name}.parquet") as stream:
            num_samples = pq.read_metadata(stream).num_rows
        return num_samples, file_info(f"{output}/{shard.name}.tar").size

    def count_scored(shard: OutputShard) -> int:
        with open_input(f"{output}/{shard.name}.parquet") as stream:
            statuses = pq.read_table(stream, columns=[STATUS])[STATUS]
        return int(pc.sum(pc.equal(statuses, Status.OK.value)).as_py() or 0)

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(count, shards))
        num_samples, num_lost = sum(found for found, _ in counts), 0
        if num_samples < sum(plan["num_selected"].values()):
            num_scored = sum(pool.map(count_scored, shards))
            num_lost = plan["num_selected"].get(Status.OK.value, 0) - num_scored
            problems = problems or [
                f"{shard.name}.tar has {found:,} of {shard.num_samples:,} selected samples"
                for shard, (found, _) in zip(shards, counts, strict=True)
                if found < shard.num_samples
            ]
    delete_selections(output)
    delete_partial_files(output)
    return ExportSummary(
        output=output,
        num_shards=len(shards),
        num_samples=num_samples,
        num_bytes=sum(num_bytes for _, num_bytes in counts),
        num_rows=plan["num_rows"],
        num_selected=plan["num_selected"],
        num_lost=num_lost,
        problems=problems,
    )
