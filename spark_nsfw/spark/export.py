"""Metadata and a predicate → WebDataset shards of what satisfies it.

The selected rows are written once, below the output; with their numbers per shard they
are the plan. After that every output shard is a task of its own that reads and writes
files, so a run that was stopped goes on with the output shards that are not there yet.
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
import pyarrow.parquet as pq
from pyarrow import fs
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nsfw.errors import InputError, JobError
from spark_nsfw.note import PROVENANCE, refuse_another_note
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.schema import KEY, SHARD, STATUS, Status
from spark_nsfw.spark.cluster import reader_workers
from spark_nsfw.spark.output import read_note
from spark_nsfw.spark.selection import freeze, kept_columns, read_plan
from spark_nsfw.storage import (
    absolute,
    delete_directory,
    files_digest,
    is_below,
    list_files,
    open_input,
    resolve,
)
from spark_nsfw.use.regroup import ExportOptions, OutputShard, Piece, plan_shards
from spark_nsfw.use.tar_writer import KEPT, STATE, write_output_shard

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
        num_selected: those of them that were to be exported.
        problems: what this run could not find or copy, for a person.
    """

    output: str
    num_shards: int
    num_samples: int
    num_bytes: int
    num_rows: dict[str, int]
    num_selected: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def num_missing(self) -> int:
        """Samples that were selected, but could not be copied."""
        return sum(self.num_selected.values()) - self.num_samples

    def __str__(self) -> str:
        of_samples = sum(n for s, n in self.num_rows.items() if not Status(s).is_shard_level)
        rejected = self.num_rows.get(Status.OK, 0) - self.num_selected.get(Status.OK, 0)
        lines = [
            f"{self.num_samples:,} of {of_samples:,} samples in {self.num_shards:,} shards, "
            f"{self.num_bytes / 1e6:,.1f} MB",
            f"  {'not selected':<20} {rejected:>12,}",
        ]
        for status, count in sorted(self.num_rows.items(), key=lambda item: -item[1]):
            left_out = count - self.num_selected.get(status, 0)
            if status != Status.OK and left_out:
                lines.append(f"  {status:<20} {left_out:>12,}")
        if self.num_missing:
            lines.append(f"  {'not to be copied':<20} {self.num_missing:>12,}")
            lines += [f"WARNING   {problem}" for problem in self.problems[:10]]
            if len(self.problems) > 10:
                lines.append(f"WARNING   and {len(self.problems) - 10:,} more such problems")
        if not self.num_samples:
            lines.append("WARNING   no sample was selected: nothing is written")
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
    options: ExportOptions | None = None,
) -> ExportSummary:
    """Export the samples of an output of the scoring job that satisfy a predicate.

    Args:
        spark: classic or Connect.
        metadata: the output, a path or URL.
        output: a directory of its own for the new shards.
        inputs: where the shards are that were scored.
        where: a predicate in Spark SQL, such as ``nsfw_score < 0.5``.
        columns: which of the metadata's columns the sidecars get; None takes all.
        keep_unscored: export what has no score as well.
        options: how samples become shards.

    Raises:
        InputError: arguments that cannot work.
        JobError: the output was made in another way, or the run failed.
    """
    metadata = absolute(metadata)
    root, names = list_files(metadata)
    if not names:
        raise InputError(f"{metadata} does not exist, or has no metadata in it")
    request = {
        "where": where,
        "metadata": {"source": root, "num_files": len(names)},
    }
    _refuse_inside(output, [metadata])
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
        JobError: the output was made in another way, or the run failed.
    """
    spark, options = rows.sparkSession, options or ExportOptions()
    output = absolute(output)
    columns_kept = kept_columns(rows, columns, options)
    _refuse_inside(output, [inputs.filesystem + root for root in inputs.roots])
    url_of = {unit.name: unit.place for unit in inputs.list_units()}
    request = request | {
        "input_files_sha256": files_digest(map(unquote, rows.inputFiles())),
        "columns": columns_kept,
        "keep_unscored": keep_unscored,
        "options": asdict(options),
    }
    plan = read_plan(output)
    is_new = plan is None
    if plan is None:
        _refuse_files_of_others(output)
        scored = F.col(STATUS) == Status.OK.value
        kept = scored & where
        if keep_unscored:
            kept = kept | (~scored & F.col(KEY).isNotNull())
        kept_rows = rows.withColumn(KEPT, F.coalesce(kept, F.lit(False)))
        plan = freeze(kept_rows, output, request, options)
    else:
        refuse_another_note(output, plan["request"], request)
    unknown = sorted(plan["num_selected_by_shard"].keys() - url_of.keys())
    if unknown:
        if is_new:
            delete_directory(f"{output}/{STATE}")
        raise InputError(
            f"{len(unknown):,} of the shards are not below {', '.join(inputs.roots)}, such as "
            f"{unknown[0]}: give the input that was scored"
        )
    shards = plan_shards(plan["num_selected_by_shard"], options)
    done = _finished(output)
    pending = [shard for shard in shards if shard.name not in done]
    note = (read_note(rows.schema) or {}) | {"export": request}
    problems = _write(spark, pending, url_of, output, options, note) if pending else []
    return _finish(output, shards, plan, problems)


def _write(
    spark: SparkSession,
    shards: Sequence[OutputShard],
    url_of: dict[str, str],
    output: str,
    options: ExportOptions,
    note: dict[str, Any],
) -> list[str]:
    """Write output shards in parallel; returns what could not be found or copied."""
    prefix, names = list_files(f"{output}/{STATE}/selection")
    selection_of: dict[str, list[str]] = {}
    for name in names:
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
            write, "problems array<string>, refusal string"
        )
        try:
            rows = results.collect()
        except Exception as exc:
            raise JobError(f"a shard could not be written; run again to resume: {exc}") from exc
    refusals = [row.refusal for row in rows if row.refusal is not None]
    if refusals:
        raise JobError(refusals[0])
    return [problem for row in rows for problem in row.problems]


def _finished(output: str) -> set[str]:
    """The output shards that are there with their sidecars."""
    _, names = list_files(output)
    there = set(names)
    return {
        name.removesuffix(".parquet")
        for name in names
        if name.endswith(".parquet") and name.removesuffix("parquet") + "tar" in there
    }


def _finish(
    output: str, shards: Sequence[OutputShard], plan: dict[str, Any], problems: list[str]
) -> ExportSummary:
    """Sum up, and clean up."""

    def count(shard: OutputShard) -> tuple[int, int]:
        with open_input(f"{output}/{shard.name}.parquet") as stream:
            num_samples = pq.read_metadata(stream).num_rows
        filesystem, path = resolve(f"{output}/{shard.name}.tar")
        return num_samples, filesystem.get_file_info(path).size

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(count, shards))
    delete_directory(f"{output}/{STATE}/selection")
    delete_directory(f"{output}/{STATE}/partial")
    return ExportSummary(
        output=output,
        num_shards=len(shards),
        num_samples=sum(num_samples for num_samples, _ in counts),
        num_bytes=sum(num_bytes for _, num_bytes in counts),
        num_rows=plan["num_rows"],
        num_selected=plan["num_selected"],
        problems=problems,
    )


def _refuse_inside(output: str, places: Sequence[str]) -> None:
    """Refuse an output that the next run over the input would take for input."""
    for place in places:
        if is_below(output, place):
            raise InputError(f"{output} is in {place}, which is read: give a directory of its own")


def _refuse_files_of_others(output: str) -> None:
    """Refuse to write among files that no export has written."""
    filesystem, path = resolve(output)
    selector = fs.FileSelector(path, allow_not_found=True)
    others = [i.base_name for i in filesystem.get_file_info(selector) if i.base_name != STATE]
    if others:
        raise InputError(
            f"{output} has files that no export has written, such as {sorted(others)[0]}: "
            "give a directory of its own"
        )
