"""What other systems do with the same shards: ``python -m benchmarks.peers``.

Each is a command from nothing to Parquet files with key, embedding and score (ours writes all
its columns), with the same pixels, tower, weights and detector, eight images a pass, a process
or slot per core, and takes its turn in each round. Two numbers of images tell the rate at the
margin from the start. Then each gets three shards of which one is cut off and one has a JPEG that
is cut off. Needs the extra ``peers``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch

from benchmarks.peers.models import COLUMNS, Task
from benchmarks.processes import most_pss_mib
from benchmarks.table import report
from examples.photographs import encode, photographs, write_photograph_shards, write_shard
from spark_nsfw.score.tower import create_network

#: The name of each, its module, and the packages whose versions matter.
_PEERS = {
    "webdataset + DataLoader": ("dataloader", ["webdataset", "torch"]),
    "Daft, one tar UDF per core": ("daft_tars", ["daft"]),
    "Daft, read_webdataset": ("daft_webdataset", ["daft"]),
    "Ray Data": ("ray_data", ["ray"]),
    "Spark, predict_batch_udf": ("predict_batch", ["pyspark"]),
    "spark_nsfw, fused": ("fused", ["spark-nsfw", "pyspark"]),
    "spark_nsfw, DataFrame": ("dataframe", ["spark-nsfw", "pyspark"]),
}

#: Seconds that a peer has for three small shards until it counts as hanging.
_PATIENCE = 120


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--detector", default="../shared/laion/clip_autokeras_binary_nsfw.zip")
    parser.add_argument("--model", default="test_vit")
    parser.add_argument("--images", type=int, default=260, help="in each of 8 shards")
    parser.add_argument("--times", type=int, default=4, help="as many in the longer run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=[name for name, _ in _PEERS.values()])
    options = parser.parse_args()
    chosen = {
        name: peer for name, peer in _PEERS.items() if peer[0] in (options.peers or [peer[0]])
    }
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        short, long, damaged = directory / "short", directory / "long", directory / "damaged"
        write_photograph_shards(short, 8, options.images)
        _repeat(short, long, options.times)
        _write_damaged(damaged)
        task = Task(str(short), str(directory / "out"), options.model,
                    _write_weights(options.model, directory), options.detector)  # fmt: skip
        short_task, long_task = task, replace(task, shards=str(long))
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
        references: dict[str, np.ndarray] = {}
        for _ in range(options.rounds):
            for name, (peer, _packages) in chosen.items():
                times = tuple(_timed(peer, each) for each in (short_task, long_task))
                _check(task.output, 8 * options.images * options.times, references, name)
                seconds[name].append(times)  # type: ignore[arg-type]
                print(f"{name}: {times[0]:.1f} s, {times[1]:.1f} s", flush=True)
        rows: list[dict[str, object]] = []
        num_short = 8 * options.images
        for name, (peer, packages) in chosen.items():
            first, last = (statistics.median(each) for each in zip(*seconds[name], strict=True))
            rate = num_short * (options.times - 1) / (last - first)
            rows.append(
                {
                    "way": name,
                    "versions": ", ".join(f"{each} {version(each)}" for each in packages),
                    f"{num_short} images, s": first,
                    f"{num_short * options.times} images, s": last,
                    "images/s at the margin": rate,
                    "start, s": first - num_short / rate,
                    "PSS MiB": _memory(peer, short_task),
                    "damaged shards": _damage(peer, replace(task, shards=str(damaged))),
                }
            )
        report(f"peers_{options.model}", rows)


def _command(peer: str, task: Task) -> list[str]:
    if peer not in ("fused", "dataframe"):
        return [sys.executable, "-m", f"benchmarks.peers.{peer}", str(task)]
    return [
        sys.executable, "-m", "spark_nsfw.cli", "score", task.shards, task.output,
        f"--model={task.model}", "--embedding-size=768", f"--clip-checkpoint={task.weights}",
        f"--detector=laion={task.detector}", f"--plan={peer}",
    ]  # fmt: skip


def _start(peer: str, task: Task) -> subprocess.Popen[bytes]:
    shutil.rmtree(task.output, ignore_errors=True)
    return subprocess.Popen(
        _command(peer, task),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _timed(peer: str, task: Task) -> float:
    began = time.perf_counter()
    status = _start(peer, task).wait()
    if status:
        raise SystemExit(f"{peer} ended with status {status}: {' '.join(_command(peer, task))}")
    return time.perf_counter() - began


def _memory(peer: str, task: Task) -> float:
    return most_pss_mib(_start(peer, task))


def _damage(peer: str, task: Task) -> str:
    """How many images have a score, how many a row that says why not, and how it ended."""
    process = _start(peer, task)
    try:
        ended = f"exit {process.wait(_PATIENCE)}"
    except subprocess.TimeoutExpired:
        ended = f"still running after {_PATIENCE} s"
    finally:
        _kill(process)
    try:
        scores = ds.dataset(task.output, format="parquet", partitioning="hive").to_table()
    except FileNotFoundError:
        return f"nothing written, {ended}"
    if "nsfw_score" not in scores.column_names:
        return f"nothing written, {ended}"
    num_scored = pc.count(scores["nsfw_score"]).as_py()
    told = f", {len(scores) - num_scored} rows of errors" if len(scores) > num_scored else ""
    return f"{num_scored} scored{told}, {ended}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _check(output: str, num_images: int, references: dict[str, np.ndarray], name: str) -> None:
    """Each way must have scored all images, and as the first way did."""
    table = ds.dataset(output, format="parquet", partitioning="hive").to_table(list(COLUMNS))
    order = pc.sort_indices(table, sort_keys=[("key", "ascending"), ("nsfw_score", "ascending")])
    scores = table["nsfw_score"].take(order).to_numpy()
    assert len(scores) == num_images, f"{name}: {len(scores)} of {num_images} images"
    difference = np.abs(scores - references.setdefault("nsfw_score", scores)).max()
    assert difference < 1e-4, f"{name}: scores differ by {difference}"


def _repeat(source: Path, target: Path, times: int) -> None:
    target.mkdir()
    for number in range(times):
        for path in sorted(source.glob("*.tar")):
            os.link(path, target / f"{number}_{path.name}")


def _write_damaged(directory: Path) -> None:
    """A whole shard of 100 images, one cut off after 150 and a half, one with 99 and half a one."""
    write_photograph_shards(directory, 1, 100)
    longer = directory / "longer"
    write_photograph_shards(longer, 1, 200, seed=1)
    cut = directory / "00001.tar"
    (longer / "00000.tar").rename(cut)
    longer.rmdir()
    with tarfile.open(cut) as archive:
        jpegs = [member for member in archive if member.name.endswith(".jpg")]
    os.truncate(cut, jpegs[150].offset_data + jpegs[150].size // 2)
    pictures = [
        encode(p, quality=90) for p, _ in zip(photographs(seed=2), range(100), strict=False)
    ]
    pictures[50] = pictures[50][: len(pictures[50]) // 2]
    write_shard(
        directory / "00002.tar",
        ((f"{index:06}", [("jpg", jpeg)]) for index, jpeg in enumerate(pictures)),
    )


def _write_weights(model: str, directory: Path) -> str:
    torch.manual_seed(0)
    path = directory / "weights.pt"
    torch.save(create_network(model, 768).state_dict(), path)
    return str(path)


if __name__ == "__main__":
    main()
