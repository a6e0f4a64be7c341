"""Bare forward passes: pixels are on the device, embeddings stay there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.rates import square_rate
from benchmarks.gpu.setup import Row, Setup, cosine
from spark_nsfw.score.lanes import Lane
from spark_nsfw.score.tower import Tower

_ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _measure(setup: Setup, tower: Callable[..., Any], batch: torch.Tensor) -> Row:
    """Images per second and the memory that they take at the peak."""
    if setup.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        seconds = setup.seconds_per_call(lambda: tower(batch))
    row: Row = {"images/s": len(batch) / seconds}
    if setup.on_gpu:
        row["MiB an image"] = (torch.cuda.max_memory_allocated() - before) / 2**20 / len(batch)
    return row


def variants(setup: Setup) -> Iterator[Row]:
    """Timm's network, and what each change to it brings; precisions; attention kernels."""
    batch = setup.batch(setup.batch_size)
    half = square_rate(setup, "float16") if setup.on_gpu else None

    def row(variant: str, precision: str, tower: Callable[..., Any]) -> Row:
        measured = _measure(setup, tower, batch)
        rate = half if precision != "float32" else None
        share = setup.share(float(str(measured["images/s"])), rate)
        return {"variant": variant, "precision": precision, **measured, **share}

    yield row("timm", "float16", setup.tower("float16", rearranged=False))
    only_silu = setup.tower("float16")
    network: Any = only_silu.network
    if hasattr(network.blocks[-1], "block"):
        network.blocks[-1] = network.blocks[-1].block
    yield row("timm, SiLU", "float16", only_silu)
    rearranged = setup.tower("float16")
    yield row("rearranged", "float16", rearranged)
    if setup.on_gpu:
        for name, kernel in _ATTENTION.items():
            with sdpa_kernel(kernel):
                yield row(f"rearranged, {name}", "float16", rearranged)
        yield row("rearranged, CUDA graph", "float16", _Recorded(setup, rearranged))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            recorded = _Recorded(setup, rearranged)
        yield row("rearranged, cuDNN, CUDA graph", "float16", recorded)
        del recorded
    del only_silu, rearranged
    for precision in ("bfloat16", "float32"):
        yield row("rearranged", precision, setup.tower(precision))


class _Recorded:
    """A tower's forward pass as a CUDA graph; the pixels are those that it is recorded with."""

    def __init__(self, setup: Setup, tower: Tower) -> None:
        lane = Lane(setup.device)
        with torch.inference_mode():
            lane.record(
                lambda pixels: [tower(pixels[setup.transform])],
                [setup.transform],
                setup.batch_size,
            )
        graph = lane._graph
        assert graph is not None
        self._lane, self._graph = lane, graph  # the lane holds what the graph reads

    def __call__(self, batch: torch.Tensor) -> None:
        self._graph.replay()


def batch_sizes(setup: Setup) -> Iterator[Row]:
    """Rate and memory by images per batch."""
    rate = square_rate(setup, "float16") if setup.on_gpu else None
    tower = setup.tower("float16")
    for size in (32, 64, 128, 256, 512, 1024) if setup.on_gpu else (4, 16):
        measured = _measure(setup, tower, setup.batch(size))
        share = setup.share(float(str(measured["images/s"])), rate)
        yield {"batch size": size, "precision": "float16", **measured, **share}


#: Classes of kernels, by words in their names; the first that fits.
_KERNELS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "mm_"),
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn"),
    "LayerNorm": ("layer_norm",),
    "SiLU": ("silu",),
    "copies": ("copy", "memcpy", "memset", "cat"),
}


def profile(setup: Setup) -> Iterator[Row]:
    """Where the device's time goes, by class of kernel."""
    from torch.profiler import ProfilerActivity, profile

    tower, batch = setup.tower("float16"), setup.batch(setup.batch_size)
    activities = [ProfilerActivity.CUDA] if setup.on_gpu else [ProfilerActivity.CPU]
    passes = 5
    with torch.inference_mode():
        tower(batch)
        setup.finish()
        with profile(activities=activities) as profiled:
            for _ in range(passes):
                tower(batch)
            setup.finish()
    spent: dict[str, float] = {}
    names: dict[str, dict[str, float]] = {}
    for event in profiled.key_averages():
        micros = event.self_device_time_total if setup.on_gpu else event.self_cpu_time_total
        key = event.key.lower()
        kinds = [kind for kind, words in _KERNELS.items() if any(word in key for word in words)]
        kind = kinds[0] if kinds else "the rest"
        spent[kind] = spent.get(kind, 0) + micros
        names.setdefault(kind, {})[event.key[:60]] = micros
    for kind, micros in sorted(spent.items(), key=lambda item: -item[1]):
        most = sorted(names[kind].items(), key=lambda item: -item[1])[:3]
        yield {
            "kernels": kind,
            "µs an image": micros / passes / len(batch),
            "share": micros / sum(spent.values()),
            "most of it": {name: m / passes / len(batch) for name, m in most},
        }


def compiled(setup: Setup) -> Iterator[Row]:
    """torch.compile, its own choice of kernels for what is no matrix product."""
    batch = setup.batch(setup.batch_size)
    tower = setup.tower("float16")
    tower.network = torch.compile(tower.network, dynamic=False)
    started = time.perf_counter()
    with torch.inference_mode():
        tower(batch)
    setup.finish()
    seconds = time.perf_counter() - started
    measured = _measure(setup, tower, batch)
    rate = square_rate(setup, "float16") if setup.on_gpu else None
    share = setup.share(float(str(measured["images/s"])), rate)
    yield {"compiling s": seconds, **measured, **share}


class Float8Linear(nn.Module):
    """A dense layer in float8, each row of inputs and of weights with a scale of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = _to_float8(linear.weight.float())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any float (…, K) → bfloat16 (…, N)."""
        rows = x.reshape(-1, x.shape[-1])
        values, scale = _to_float8(rows)
        product = torch._scaled_mm(
            values, self.weight.t(), scale, self.scale.t(), self.bias, out_dtype=torch.bfloat16
        )
        return product.reshape(*x.shape[:-1], -1)


def _to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / largest
    values = (rows.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return values, scale.contiguous()


def with_float8(tower: Tower) -> Tower:
    """A bfloat16 tower whose blocks' dense layers are in float8, but the last block's."""
    network: Any = tower.network
    for block in list(network.blocks)[:-1]:
        block.attn.qkv, block.attn.proj = (
            Float8Linear(block.attn.qkv),
            Float8Linear(block.attn.proj),
        )
        block.mlp.fc1, block.mlp.fc2 = Float8Linear(block.mlp.fc1), Float8Linear(block.mlp.fc2)
    return tower


def float8(setup: Setup) -> Iterator[Row]:
    """float8 with a compiler, which puts the scaling into the kernels around it."""
    if not setup.on_gpu:
        yield {"skipped": "float8 needs a GPU"}
        return
    batch = setup.batch(setup.batch_size)
    tower = with_float8(setup.tower("bfloat16"))
    with torch.inference_mode():
        embeddings = tower(batch)
        yield {
            "smallest cosine against float16": cosine(embeddings, setup.tower("float16")(batch)),
            **_measure(setup, tower, batch),
            "compiled": False,
        }
    tower.network = torch.compile(tower.network, dynamic=False)
    measured = _measure(setup, tower, batch)
    share = setup.share(float(str(measured["images/s"])), square_rate(setup, "float16"))
    yield {"compiled": True, **measured, **share}
