"""What the device and the cores can do at most: matrix products, and decoding."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from benchmarks.gpu.setup import Row, Setup
from spark_nsfw.score.pixels import decode_once

#: Of ViT-L/14: qkv, projection, first and second layer of the MLP, as inputs × outputs.
_TOWER_SHAPES = [(1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)]
_TOKENS = 257


def matrix(setup: Setup) -> Iterator[Row]:
    """FLOP/s of matrix products: a large square one, and those of ViT-L/14."""
    side = 8192 if setup.on_gpu else 256
    tokens = setup.batch_size * _TOKENS if setup.on_gpu else 256
    for precision in ("float16", "bfloat16", "float8_e4m3fn"):
        if precision == "float8_e4m3fn" and not setup.on_gpu:
            continue
        shapes = [(side, side, side)]
        if precision != "bfloat16":
            shapes += [(tokens, *shape) for shape in _TOWER_SHAPES]
        for shape in shapes:
            yield {
                "precision": precision,
                "shape": " x ".join(map(str, shape)),
                "TFLOP/s": matrix_rate(setup, precision, *shape) / 1e12,
            }


@lru_cache(maxsize=64)
def _matrix_rate(device: str, precision: str, m: int, k: int, n: int, seconds: float) -> float:
    setup = Setup("", None, device, None, "", seconds)
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    a, b = (x.to(getattr(torch, precision)) for x in (a, b))
    if precision == "float8_e4m3fn":
        scale_a = torch.ones(m, 1, device=device)
        scale_b = torch.ones(1, n, device=device)

        def product() -> object:
            return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16)
    else:

        def product() -> object:
            return a @ b.t()

    return 2 * m * k * n / setup.seconds_per_call(product)


def matrix_rate(setup: Setup, precision: str, m: int, k: int, n: int) -> float:
    """FLOP/s of random (m, k) x (k, n)."""
    return _matrix_rate(setup.device, precision, m, k, n, min(setup.seconds, 1))


def square_rate(setup: Setup, precision: str) -> float:
    """FLOP/s of a large square product."""
    return matrix_rate(setup, precision, *(3 * [8192 if setup.on_gpu else 256]))


def decode(setup: Setup) -> Iterator[Row]:
    """Images per second from JPEG bytes to pixels, by threads of one process."""
    cores = len(os.sched_getaffinity(0))
    jpegs, transform = setup.jpegs * 4, setup.transform

    def chunk(start: int) -> None:
        for jpeg in jpegs[start : start + 8]:
            decode_once(jpeg, [transform])

    for threads in sorted({1, 4, 8, 12, 14, 16} & set(range(1, cores + 1)) | {cores}):
        with ThreadPoolExecutor(threads, "", torch.set_num_threads, (1,)) as pool:
            list(pool.map(chunk, range(0, 64, 8)))
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < setup.seconds / 2:
                list(pool.map(chunk, range(0, len(jpegs), 8)))
                count += len(jpegs)
            rate = count / (time.perf_counter() - started)
        yield {"threads": threads, "cores": cores, "images/s": rate, "a thread": rate / threads}
