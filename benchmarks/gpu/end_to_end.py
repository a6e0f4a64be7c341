"""From the bytes of a tar to Arrow rows, by one or several processes that share the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.setup import Row, Setup
from spark_nsfw.read.shards import SampleOptions, iter_sample_rows
from spark_nsfw.score.laion import DETECTORS
from spark_nsfw.score.nsfw import NsfwClassifier
from spark_nsfw.score.scorer import Scorer

#: Decoding threads in each process, processes, variant of LAION's detector, images per batch,
#: CUDA graph.
_CASES = [
    (14, 1, "torch", 256, True),
    (8, 1, "laion", 256, True),
    (8, 1, "laion", 256, False),
    (7, 2, "torch", 256, True),
    (8, 1, "torch", 256, False),
    (4, 1, "torch", 256, True),
]


def rates(setup: Setup) -> Iterator[Row]:
    """Images per second once all processes are full, with a detector."""
    from examples.photographs import write_shard

    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "s.tar"
        number = 2048 if setup.on_gpu else 256
        jpegs = setup.jpegs
        write_shard(path, ((f"{i:06}", [("jpg", jpegs[i % len(jpegs)])]) for i in range(number)))
        for threads, processes, variant, batch_size, recorded in _CASES:
            if not setup.on_gpu and processes * threads > 14:
                continue
            arguments = [
                setup.model, setup.embedding_size or 0, setup.device, setup.detectors, path,
                threads, batch_size, variant, int(recorded), 2 * setup.seconds,
            ]  # fmt: skip
            yield {
                "threads": threads,
                "processes": processes,
                "cores": cores,
                "detector": variant,
                "batch size": batch_size,
                "CUDA graph": recorded,
                **_together([str(argument) for argument in arguments], processes),
            }


def _together(arguments: list[str], count: int) -> Row:
    """Start processes, let all get ready, then measure them at the same time."""
    command = [sys.executable, "-m", "benchmarks.gpu.end_to_end", *arguments]
    started = time.perf_counter()
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a process did not get ready")
        ready = time.perf_counter() - started
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate()[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return {
        "images/s": sum(float(rate) for rate, _ in told),
        "busy cores": sum(float(cores) for _, cores in told),
        "ready after s": ready,
    }


def _process(setup: Setup, path: str, threads: int, size: int, variant: str, record: bool) -> None:
    """Score the shard again and again; tell the rate, and how many cores were busy."""
    embedder = setup.embedder(batch_size=size, num_threads_per_worker=threads)
    detector = DETECTORS[embedder.embedding_size]
    archive = f"{setup.detectors}/{detector.file_name}"
    classifier = NsfwClassifier(model_path=archive, variant=variant)  # type: ignore[arg-type]
    scorer = Scorer(embedder, [classifier], setup.device)
    scorer.passes.records = record

    def shards() -> Iterator[tuple[str, str]]:
        while time.perf_counter() < until:
            yield path, "s"

    until = float("inf")
    rows = scorer.score_rows(iter_sample_rows(shards(), SampleOptions()))
    warm = 4 * (2048 if setup.on_gpu else 64)
    done = 0
    while done < warm:
        done += next(rows).num_rows
    print("ready", flush=True)
    sys.stdin.readline()
    busy, started, done = time.process_time(), time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < setup.seconds:
        done += next(rows).num_rows
    print(done / seconds, (time.process_time() - busy) / seconds, flush=True)
    os._exit(0)  # what is under way has no end


if __name__ == "__main__":
    model, width, device, detectors, path, threads, size, variant, record, seconds = sys.argv[1:]
    _process(
        Setup(model, int(width) or None, device, None, detectors, float(seconds)),
        path,
        int(threads),
        int(size),
        variant,
        record == "1",
    )
