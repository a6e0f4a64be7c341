"""CLIP's towers on a CPU, by engine and precision: ``python -m benchmarks.tower [--models …]``.

Forward passes of eight images, as many at a time as there are threads, as the pipeline runs them;
random weights. timm's own network is the first row of each tower.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from benchmarks.table import report
from spark_nsfw.score.timm_embedder import TimmImageEmbedder
from spark_nsfw.score.tower import CPU_BLOCK_IMAGES, Tower, create_network

_MODELS = [
    "vit_base_patch32_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_quickgelu_224.openai",
]


def _timms(model: str) -> Tower:
    """The network as timm has it."""
    torch.manual_seed(0)
    embedder, network = TimmImageEmbedder(model), create_network(model, None).eval()
    tower = Tower(network, *embedder.statistics, torch.float32, True, model)
    return tower.eval().requires_grad_(False)


def _rate(tower: nn.Module, pixels: torch.Tensor, threads: int, seconds: float) -> float:
    """Images per second of several threads, each with passes of its own."""

    def work(until: float) -> int:
        count = 0
        with torch.inference_mode():
            while time.perf_counter() < until:
                tower(pixels)
                count += len(pixels)
        return count

    with ThreadPoolExecutor(threads, "", torch.set_num_threads, (1,)) as pool:
        list(pool.map(work, [time.perf_counter() + 0.1] * threads))
        started = time.perf_counter()
        counts = list(pool.map(work, [started + seconds] * threads))
        return sum(counts) / (time.perf_counter() - started)


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=_MODELS)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for model in options.models:
        first: dict[int, float] = {}
        reference = None
        cases: list[tuple[str, str, Callable[[], nn.Module]]] = [
            ("timm", "float32", lambda model=model: _timms(model))
        ]
        for engine in ("torch", "openvino"):
            for precision in ("float32", "bfloat16"):
                embedder = TimmImageEmbedder(model, engine=engine, precision=precision)  # type: ignore[arg-type]
                cases.append((engine, precision, lambda embedder=embedder: embedder.tower("cpu")))
        size = TimmImageEmbedder(model).image_size
        pixels = torch.randint(0, 256, (CPU_BLOCK_IMAGES, size, size, 3), dtype=torch.uint8)
        for engine, precision, load in cases:
            started = time.perf_counter()
            torch.set_num_threads(max(options.threads))  # OpenVINO has as many streams
            tower = load()
            loading = time.perf_counter() - started
            with torch.inference_mode():
                embeddings = tower(pixels)
            reference = embeddings if reference is None else reference
            row: dict[str, object] = {
                "model": model,
                "engine": engine,
                "precision": precision,
                "loading s": loading,
                "largest difference": float((embeddings - reference).abs().max()),
            }
            for threads in options.threads:
                rate = _rate(tower, pixels, threads, options.seconds)
                first.setdefault(threads, rate)
                row[f"images/s, {threads} threads"] = rate
                row[f"of timm's, {threads} threads"] = rate / first[threads]
            rows.append(row)
    report("tower", rows)


if __name__ == "__main__":
    main()
