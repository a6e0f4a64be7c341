"""A tower on a GPU, without Spark and without network: ``python -m benchmarks.gpu``.

Bare forward rate by precision and batch size with its share of the measured matrix rate,
end-to-end rate from tar bytes to Arrow rows with all cores decoding, memory, and the drift
of embeddings against float32. Weights are random, shards are made on the spot.
``--device cpu --model test_vit2`` tries the script out where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import report
from examples.photographs import encode, photographs, write_shard
from spark_nsfw import SampleOptions, Scorer, TimmImageEmbedder, iter_sample_rows

MODEL = "vit_large_patch14_clip_quickgelu_224.openai"
#: 81.08 GMACs an image, of MODEL (timm's benchmark tables); other towers have no share.
FLOP_PER_IMAGE = {MODEL: 2 * 81.08e9}
MATRIX_SIDE = 8192


def seconds_per_call(work: Callable[[], object], device: str, rounds: int = 5) -> float:
    """The median time of a call, after two that do not count."""

    def finish() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    for number in range(rounds + 2):
        finish()
        started = time.perf_counter()
        work()
        finish()
        if number >= 2:
            times.append(time.perf_counter() - started)
    return float(np.median(times))


def matrix_rate(precision: str, device: str, side: int) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in "ab")
    return 2 * side**3 / seconds_per_call(lambda: a @ b, device)


def embedder(options: argparse.Namespace, precision: str, batch_size: int) -> TimmImageEmbedder:
    return TimmImageEmbedder(
        options.model,
        precision=precision,
        batch_size=batch_size,
        num_threads_per_worker=len(os.sched_getaffinity(0)),
    )


def forward_rates(options: argparse.Namespace) -> list[dict[str, object]]:
    """Bare forward passes, pixels already on the device."""
    on_gpu = options.device.startswith("cuda")
    size = embedder(options, "float32", 1).image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (max(options.batch_sizes), size, size, 3), dtype=torch.uint8, generator=generator
    )
    rows: list[dict[str, object]] = []
    reference = None
    for precision, compiled in [(p, c) for p in options.precisions for c in options.compile]:
        tower = embedder(options, precision, 1).tower(options.device)
        if compiled:
            tower.network = torch.compile(tower.network)
        rate = matrix_rate(precision, options.device, MATRIX_SIDE if on_gpu else 512)
        for batch_size in options.batch_sizes:
            batch = pixels[:batch_size].to(options.device)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with torch.inference_mode():
                seconds = seconds_per_call(
                    lambda tower=tower, batch=batch: tower(batch), options.device
                )
                embeddings = tower(batch[: min(options.batch_sizes)]).cpu()
            reference = embeddings if reference is None else reference
            cosine = (embeddings * reference).sum(dim=1).min().item()
            row: dict[str, object] = {
                "precision": precision,
                "compiled": compiled,
                "batch size": batch_size,
                "images/s": batch_size / seconds,
                "matrix TFLOP/s": rate / 1e12,
                "smallest cosine": f"{cosine:.7f}",
            }
            if options.model in FLOP_PER_IMAGE:
                row["share of matrix rate"] = (
                    batch_size / seconds * FLOP_PER_IMAGE[options.model] / rate
                )
            if on_gpu:
                row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row)
            print(row, flush=True)
    return rows


def end_to_end(
    options: argparse.Namespace, path: Path, precision: str, forward: list[dict[str, object]]
) -> dict[str, object]:
    """From the bytes of a tar to Arrow rows, once the pipeline is full."""
    bare, batch_size = max(
        (float(str(row["images/s"])), int(str(row["batch size"])))
        for row in forward
        if row["precision"] == precision and not row["compiled"]
    )
    scorer = Scorer(embedder(options, precision, batch_size), [], options.device)
    started = time.perf_counter()
    batches = scorer.score_rows(iter_sample_rows([(str(path), "s")], SampleOptions()))
    next(batches)
    first = time.perf_counter()
    rate = sum(batch.num_rows for batch in batches) / (time.perf_counter() - first)
    return {
        "precision": precision,
        "cores": len(os.sched_getaffinity(0)),
        "end to end images/s": rate,
        "bare forward images/s": bare,
        "end to end / bare": rate / bare,
        "start-up s": first - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", nargs="*", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument(
        "--compile", type=int, nargs="*", default=[0, 1], help="1: torch.compile, forward only"
    )
    parser.add_argument("--images", type=int, default=20_000, help="end to end")
    options = parser.parse_args()
    forward = forward_rates(options)
    report("gpu_forward", forward)
    jpegs = [encode(p, quality=90) for p, _ in zip(photographs(), range(500), strict=False)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.tar"
        write_shard(
            path, ((f"{i:06}", [("jpg", jpegs[i % len(jpegs)])]) for i in range(options.images))
        )
        report(
            "gpu_end_to_end", [end_to_end(options, path, p, forward) for p in options.precisions]
        )


if __name__ == "__main__":
    main()
