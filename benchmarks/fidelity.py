"""How far do precision and ``decode="fast"`` move embeddings and scores?

``python -m benchmarks.fidelity [--detectors DIR] [--model NAME] [--images N] [--device D]``

The tower has its real architecture and random weights, or those of ``--checkpoint``. A
random tower's embeddings lie far from those that the detector knows, where its scores
hardly move; so the same displacement is also applied to embeddings of TensorFlow's golden
set, whose scores spread over the whole range ("golden").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.table import report
from examples.photographs import encode, photographs
from spark_nsfw import NsfwClassifier, TimmImageEmbedder
from spark_nsfw.score.laion import DETECTORS
from spark_nsfw.score.pixels import decode_image


def images_for_it(count: int) -> list[bytes]:
    """Photographs as they come: JPEG, PNG and WebP, 300 to 900 pixels a side."""
    formats = ["JPEG", "JPEG", "JPEG", "PNG", "WEBP"]
    return [
        encode(photograph, formats[index % len(formats)])
        for index, photograph in zip(range(count), photographs(300, 900, seed=3), strict=False)
    ]


def largest_pixel_difference(images: list[bytes], size: int) -> int:
    """Grey levels between exact and fast pixels."""
    return max(
        int(np.abs(decode_image(i, size).astype(int) - decode_image(i, size, decode="fast")).max())
        for i in images
    )


def drift(scores: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Largest and mean distance of scores, and the share of decisions at 0.5 that flip."""
    distance = np.abs(scores - others)
    return {
        "max": float(distance.max()),
        "mean": float(distance.mean()),
        "flips": float(((scores > 0.5) != (others > 0.5)).mean()),
    }


def main() -> None:
    """Measure one tower."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_base_patch32_clip_quickgelu_224.openai")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--detectors", default="../shared/laion", help="LAION's zips, golden sets")
    parser.add_argument("--precisions", nargs="*", default=["bfloat16", "float16"])
    options = parser.parse_args()

    def embed(decode: str, precision: str) -> np.ndarray:
        embedder = TimmImageEmbedder(
            options.model, checkpoint_path=options.checkpoint, precision=precision, decode=decode
        )
        return embedder.embed(images, device=options.device)

    images = images_for_it(options.images)
    shape = TimmImageEmbedder(options.model)
    detector = DETECTORS[shape.embedding_size]
    classifier = NsfwClassifier(model_path=f"{options.detectors}/{detector.file_name}")
    golden_name = {768: "golden_vit_l_14.npz", 512: "golden_vit_b_32.npz"}[shape.embedding_size]
    golden = np.load(Path(options.detectors) / golden_name)["embedding_f32"]
    base = embed("exact", "float32")
    rows = []
    for decode, precision in [("fast", "float32"), *(("exact", p) for p in options.precisions)]:
        moved = embed(decode, precision)
        displaced = golden + np.resize(moved - base, golden.shape)
        displaced /= np.linalg.norm(displaced, axis=1, keepdims=True)
        own = drift(classifier.classify(base, "cpu"), classifier.classify(moved, "cpu"))
        known = drift(classifier.classify(golden, "cpu"), classifier.classify(displaced, "cpu"))
        rows.append(
            {
                "decode": decode,
                "precision": precision,
                "largest pixel difference": (
                    largest_pixel_difference(images, shape.image_size) if decode == "fast" else 0
                ),
                "smallest cosine": f"{(base * moved).sum(axis=1).min():.7f}",
                "score drift, max": own["max"],
                "golden drift, max": known["max"],
                "golden drift, mean": known["mean"],
                "golden decisions flipped": f"{known['flips']:.2%}",
            }
        )
    name = "fidelity_" + ("l14" if shape.embedding_size == 768 else "b32")
    report(name, [{"model": options.model, "images": options.images} | row for row in rows])


if __name__ == "__main__":
    main()
