"""What a run costs around its images: ``python -m benchmarks.start``.

The command line scores 2,080 photographs with a small tower, again when nothing is left, and the
184 of the demo: wall time, the memory of all its processes (PSS, which counts a page that several
share once), and when each step began and ended. ``--images`` has them in shards of 260.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What is told of a run, by module: functions, and methods of classes.
_STEPS = {
    "spark_nsfw.spark.session": ["_start_local"],
    "spark_nsfw.cli.score": ["_recipe"],
    "spark_nsfw.score.recipe": ["Recipe.ready"],
    "spark_nsfw.read.shards": ["ShardSource.units"],
    "spark_nsfw.spark.job": ["_begin", "summarize"],
    "spark_nsfw.spark.output": ["ParquetOutput.begin", "ParquetOutput.append"],
    "spark_nsfw.cli.__main__": ["run"],
}

_BEGAN = "SPARK_NSFW_BENCHMARK_BEGAN"


def _command(source: Path, output: Path, plan: str, *more: str) -> list[str]:
    return [
        "score", str(source), str(output), "--model=test_vit", "--embedding-size=768",
        "--no-pretrained", f"--plan={plan}", *more,
    ]  # fmt: skip


def _run(arguments: list[str], steps: bool = False) -> tuple[float, str]:
    """Seconds of a command, and what it said of its steps."""
    module = "benchmarks.start" if steps else "spark_nsfw.cli"
    began = time.time()
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {_BEGAN: repr(began)} if steps else None,
        check=True,
        capture_output=True,
        text=True,
    )
    return time.time() - began, ended.stderr


def _with_steps(arguments: list[str]) -> None:
    """Run the command in this process, and tell on stderr when its steps began and ended."""
    began = float(os.environ[_BEGAN])
    original = builtins.__import__

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.time() - began
            try:
                return function(*args, **kwargs)
            finally:
                print(f"step {start:.2f} {time.time() - began:.2f} {name}", file=sys.stderr)

        return call

    done: set[str] = set()
    lock = threading.RLock()

    def wrap(module: Any, path: str) -> None:
        owner, _, attribute = path.rpartition(".")
        where = getattr(module, owner) if owner else module
        setattr(where, attribute, timed(path, getattr(where, attribute)))

    def importing(name: str, *rest: Any, **kwargs: Any) -> Any:
        found = original(name, *rest, **kwargs)
        with lock:
            for module_name in [each for each in _STEPS if each not in done]:
                module = sys.modules.get(module_name)
                specification = getattr(module, "__spec__", None)
                if specification is not None and not specification._initializing:
                    done.add(module_name)
                    for path in _STEPS[module_name]:
                        wrap(module, path)
        return found

    builtins.__import__ = importing
    sys.argv = ["spark-nsfw", *arguments]
    print(f"step 0.00 {time.time() - began:.2f} start Python", file=sys.stderr)
    from spark_nsfw.cli.__main__ import run

    run()


def main() -> None:
    """Measure all, or only tell the steps of one command."""
    if _BEGAN in os.environ:
        _with_steps(sys.argv[1:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, help="a directory of shards of photographs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--detectors", default="../shared/laion", help="where LAION's zip is")
    options = parser.parse_args()
    from benchmarks.processes import most_pss_mib
    from benchmarks.table import report  # it imports torch, which is a step to be told

    detector = f"--detector=laion={options.detectors}/clip_autokeras_binary_nsfw.zip"
    with tempfile.TemporaryDirectory() as directory:
        images, few = options.images or Path(directory) / "in", Path(directory) / "few"
        from examples.photographs import write_photograph_shards

        if options.images is None:
            write_photograph_shards(images, 8, 260)
        write_photograph_shards(few, 4, 46)
        output = Path(directory) / "out"
        rows: list[dict[str, object]] = []
        for plan in ("fused", "dataframe"):
            for case, source in (("2,080 images", images), ("184 images", few)):
                first, again = [], []
                for _ in range(options.rounds):
                    shutil.rmtree(output, ignore_errors=True)
                    command = _command(source, output, plan, detector)
                    first.append(_run(command)[0])
                    again.append(_run(command)[0])
                shutil.rmtree(output)
                process = subprocess.Popen(
                    [sys.executable, "-m", "spark_nsfw.cli", *command], stdout=subprocess.DEVNULL
                )
                rows.append(
                    {
                        "plan": plan,
                        "run": case,
                        "s": statistics.median(first),
                        "again, nothing to do, s": statistics.median(again),
                        "PSS MiB": most_pss_mib(process),
                    }
                )
        report("start", rows)
        shutil.rmtree(output)
        _, told = _run(_command(images, output, "fused", detector), steps=True)
        print("\nfused, 2,080 images; a step that lies in another is part of it\n")
        steps = [line.split(maxsplit=3)[1:] for line in told.splitlines() if line[:5] == "step "]
        for start, end, name in sorted(steps, key=lambda step: float(step[0])):
            print(f"{start:>7} to {end:>6} s  {name}")


if __name__ == "__main__":
    main()
