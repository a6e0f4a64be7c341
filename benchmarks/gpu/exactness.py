"""How far embeddings and scores move, whether they depend on their neighbours, and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.fidelity import drift as score_drift
from benchmarks.gpu.forward import with_float8
from benchmarks.gpu.setup import Row, Setup, cosine
from spark_nsfw.score.forward import ForwardPasses
from spark_nsfw.score.laion import DETECTORS
from spark_nsfw.score.nsfw import NsfwClassifier


def drift(setup: Setup) -> Iterator[Row]:
    """Embeddings of photographs against timm's network in float32, and what scores make of it.

    The displacements are also applied to embeddings of TensorFlow's golden set, whose scores
    spread over the whole range.
    """
    torch.backends.cudnn.allow_tf32 = False
    pixels = setup.batch(256)

    def embed(precision: str, rearranged: bool = True, in_float8: bool = False) -> torch.Tensor:
        tower = setup.tower(precision, rearranged)
        if in_float8:
            tower = with_float8(tower)
        with torch.inference_mode():
            return torch.cat([tower(piece) for piece in pixels.split(64)]).cpu()

    base = embed("float32", rearranged=False)
    detector = DETECTORS.get(base.shape[1])
    variants = [
        ("float32", True, False),
        ("float16", False, False),
        ("float16", True, False),
        ("bfloat16", True, False),
        *([("bfloat16", True, True)] if setup.on_gpu else []),
    ]
    for precision, rearranged, in_float8 in variants:
        moved = embed(precision, rearranged, in_float8)
        row: Row = {
            "precision": "float8" if in_float8 else precision,
            "rearranged": rearranged,
            "largest difference": float((base - moved).abs().max()),
            "1 - smallest cosine": 1 - cosine(base, moved),
        }
        if detector is not None:
            classifier = NsfwClassifier(model_path=f"{setup.detectors}/{detector.file_name}")
            golden = np.load(Path(setup.detectors) / "golden_vit_l_14.npz")["embedding_f32"]
            displaced = golden + np.resize((moved - base).numpy(), golden.shape)
            displaced /= np.linalg.norm(displaced, axis=1, keepdims=True)
            known = [classifier.classify(each, "cpu") for each in (golden, displaced)]
            row |= {f"golden, {name}": value for name, value in score_drift(*known).items()}
        yield row
    if setup.on_gpu:
        torch.backends.cudnn.allow_tf32 = True
        moved = embed("float32", rearranged=False)
        torch.backends.cudnn.allow_tf32 = False
        yield {
            "precision": "float32, TF32 convolution",
            "largest difference": float((base - moved).abs().max()),
            "1 - smallest cosine": 1 - cosine(base, moved),
        }


def determinism(setup: Setup) -> Iterator[Row]:
    """Whether an image's bits depend on the other images, its place, the lane, the graph."""
    size = setup.batch_size
    pixels = setup.pixels[:size].contiguous()
    if setup.on_gpu:
        pixels = pixels.pin_memory()
    transform = setup.transform

    def passes(recorded: bool) -> ForwardPasses:
        made = ForwardPasses(setup.recipe(batch_size=size), setup.device)
        made.records = recorded
        made.load()
        return made

    def embeddings(by: ForwardPasses, images: torch.Tensor, count: int) -> torch.Tensor:
        given = by.score({transform: images}, count).embeddings
        assert given is not None
        return given

    recorded, eager = passes(True), passes(False)
    base = embeddings(recorded, pixels, size)
    yield {"case": "again", "equal": _same(base, embeddings(recorded, pixels, size))}
    yield {"case": "step by step", "equal": _same(base, embeddings(eager, pixels, size))}
    few = pixels.clone()
    few[10:] = 0
    yield {"case": "ten of them", "equal": _same(base[:10], embeddings(recorded, few, 10)[:10])}
    reverse = embeddings(recorded, pixels.flip(0).contiguous(), size).flip(0)
    yield {"case": "in reverse", "equal": _same(base, reverse)}
    for name, by in (("recorded", recorded), ("step by step", eager)):
        with ThreadPoolExecutor(2) as pool:
            many = list(pool.map(lambda _, by=by: embeddings(by, pixels, size), range(20)))
        equal = all(_same(base, each) for each in many)
        yield {"case": f"20 times, two threads, {name}", "equal": equal}
    if setup.on_gpu:
        with torch.inference_mode():
            tower = setup.embedder().tower(setup.device)
            other = torch.cat([tower(p.to(setup.device)) for p in pixels.split(16)]).cpu()
        yield {
            "case": "batches of 16",
            "equal": _same(base, other),
            "largest difference": float((base - other).abs().max()),
        }


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a, b))


_SHORT = """
import logging, sys, torch
from benchmarks.gpu.setup import Setup
from spark_nsfw.score.forward import ForwardPasses
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
model, size, device, shard, recorded = sys.argv[1:]
setup = Setup(model, int(size) or None, device, shard or None, "", 1)
torch.cuda.set_per_process_memory_fraction(4 / (torch.cuda.mem_get_info()[1] / 2**30))
passes = ForwardPasses(setup.recipe(batch_size=1024), device)
passes.records = recorded == "1"
passes.load()
pixels = setup.batch(1024).cpu().pin_memory()
for _ in range(3):
    given = passes.score({setup.transform: pixels}, 1024).embeddings
print("fits", passes.fitting_batch_size, "finite", bool(torch.isfinite(given).all()))
"""


def memory(setup: Setup) -> Iterator[Row]:
    """A batch of 1,024 in a process that may have 4 GiB of the GPU."""
    if not setup.on_gpu:
        yield {"skipped": "a CPU has no limit of its own"}
        return
    for recorded in ("1", "0"):
        arguments = [setup.model, str(setup.embedding_size or 0), setup.device, setup.shard or ""]
        ended = subprocess.run(
            [sys.executable, "-c", _SHORT, *arguments, recorded],
            check=False,
            capture_output=True,
            text=True,
        )
        told = ended.stdout if ended.returncode == 0 else ended.stdout + ended.stderr[-1500:]
        yield {"CUDA graph": recorded == "1", "status": ended.returncode, "told": told}
