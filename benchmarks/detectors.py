"""What each detector costs on a CPU, and that several share one decode.

``python -m benchmarks.detectors [--images 96]``. Costs are multiples of a forward pass of CLIP
ViT-B/32, on as many cores as the process has; weights are random, which costs the same. The
last row is a whole pass, from JPEG bytes to rows, with LAION's detector and Marqo's, over the
sum of their two forward passes alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import timm
import torch
from safetensors.torch import save_file

from benchmarks.table import report
from examples.photographs import encode, photographs
from spark_nsfw import (
    NsfwClassifier,
    OpenNsfwClassifier,
    PixelClassifier,
    Scorer,
    TimmImageClassifier,
    TimmImageEmbedder,
)
from spark_nsfw.errors import WeightsError
from spark_nsfw.score.forward import ForwardPasses
from spark_nsfw.score.nsfw import NsfwDetector
from spark_nsfw.score.pixels import decode_once
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.registry import detector_of

TOWERS = {
    "CLIP ViT-B/32": "vit_base_patch32_clip_quickgelu_224.openai",
    "CLIP ViT-L/14": "vit_large_patch14_clip_quickgelu_224.openai",
}
#: These get a sixth of the images.
SLOW = ("CLIP ViT-L/14", "freepik")
ROUNDS = 3


def random_file(folder: Path, architecture: str, num_classes: int) -> str:
    path = folder / f"{architecture}.safetensors"
    save_file(timm.create_model(architecture, num_classes=num_classes).state_dict(), path)
    return str(path)


def seconds_of(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forward(recipe: Recipe, images: list[bytes]) -> Callable[[], object]:
    """The models alone, on images that are decoded already, as the pipeline runs them."""
    passes = ForwardPasses(recipe, "cpu")
    passes.load()
    (transform,) = recipe.transforms
    pixels = torch.from_numpy(np.stack([decode_once(i, [transform])[0] for i in images]))
    batches = pixels.split(8)

    def run() -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(passes.num_threads, "", torch.set_num_threads, (1,)) as pool:
            list(pool.map(lambda batch: passes.score({transform: batch}, len(batch)), batches))

    return run


def whole(recipe: Recipe, images: list[bytes]) -> Callable[[], object]:
    """From JPEG bytes to rows."""
    columns = [pa.array(["ok"] * len(images)), pa.nulls(len(images), pa.string())]
    batch = pa.RecordBatch.from_arrays(columns, names=["status", "error_message"])
    scorer = Scorer.of(recipe, "cpu")
    return lambda: list(scorer.score_rows([(batch, images)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=96)
    options = parser.parse_args()
    pictures = photographs()
    images = [encode(next(pictures), quality=90) for _ in range(options.images)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        laion = str(folder / "laion.safetensors")
        widths = {"CLIP ViT-B/32": (512, 64, 512, 1), "CLIP ViT-L/14": (768, 64, 512, 256, 1)}
        recipes: dict[str, Recipe] = {}
        for tower, model in TOWERS.items():
            save_file(NsfwDetector(widths[tower]).state_dict(), laion)
            embedder = TimmImageEmbedder(model, batch_size=8, num_threads_per_worker=1)
            recipes[tower] = Recipe.of(
                embedder, [NsfwClassifier(model_path=laion)], device="cpu"
            ).with_ready_classifiers()
        others: dict[str, PixelClassifier] = {
            "open_nsfw": OpenNsfwClassifier(num_threads_per_worker=1),
            "marqo": TimmImageClassifier(
                "hf-hub:Marqo/nsfw-image-detection-384",
                model_path=random_file(folder, "vit_tiny_patch16_384", 2),
            ),
            "freepik": detector_of(  # type: ignore[dict-item]
                f"freepik={random_file(folder, 'eva02_base_patch14_448', 4)}"
            ),
        }
        for label, detector in others.items():
            try:
                recipes[label] = Recipe.of(None, [detector], device="cpu").with_ready_classifiers()
            except WeightsError as exc:
                print(f"{label} left out: {exc}", file=sys.stderr)
        first = recipes["CLIP ViT-B/32"]
        both = Recipe.of(first.embedder, [*first.classifiers, others["marqo"]], device="cpu")
        counts = {label: len(images) // 6 if label in SLOW else len(images) for label in recipes}
        ways = {
            label: forward(recipe, images[: counts[label]]) for label, recipe in recipes.items()
        }
        ways["both in one pass"], counts["both in one pass"] = whole(both, images), len(images)
        for way in ways.values():
            way()
        seconds: dict[str, list[float]] = {label: [] for label in ways}
        for _ in range(ROUNDS):
            for label, way in ways.items():
                seconds[label].append(seconds_of(way))
    medians = {label: statistics.median(t) / counts[label] for label, t in seconds.items()}
    base, alone = medians["CLIP ViT-B/32"], medians["CLIP ViT-B/32"] + medians["marqo"]
    report(
        "detectors",
        [
            {
                "detector": label,
                "ms per image": 1000 * median,
                "of ViT-B/32": median / base,
                "of both alone": median / alone if label == "both in one pass" else "",
            }
            for label, median in medians.items()
        ],
    )


if __name__ == "__main__":
    main()
