"""Images per second and core from encoded bytes to 224 × 224 pixels.

Run it with ``python -m benchmarks.pixels``.

``pillow`` is the plain way: PIL decode, bicubic resize, centre crop, as in CLIP's transform.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks.table import report
from examples.photographs import encode, photographs
from spark_nsfw.score.pixels import center_crop_box, decode_image, resized_size

ROUNDS = 5


def plain_pillow(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    size = resized_size(*image.size, 224)
    return np.asarray(
        image.resize(size, Image.Resampling.BICUBIC).crop(center_crop_box(*size, 224))
    )


WAYS: dict[str, Callable[[bytes], np.ndarray]] = {
    "pillow": plain_pillow,
    "exact": lambda content: decode_image(content, 224),
    "fast": lambda content: decode_image(content, 224, decode="fast"),
}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for image_format in ("JPEG", "PNG", "WEBP"):
        for side in (256, 512, 1024):
            images = [
                encode(p, image_format, quality=90)
                for p, _ in zip(photographs(side, side, seed=side), range(12), strict=False)
            ]
            best = dict.fromkeys(WAYS, float("inf"))
            for _ in range(ROUNDS):  # the ways take turns, so that all meet the same machine
                for name, way in WAYS.items():
                    started = time.perf_counter()
                    for content in images:
                        way(content)
                    best[name] = min(best[name], time.perf_counter() - started)
            row: dict[str, object] = {"format": image_format, "side": side}
            row |= {f"{name} images/s": len(images) / best[name] for name in WAYS}
            rows.append(row | {"fast / pillow": best["pillow"] / best["fast"]})
    report("pixels", rows)


if __name__ == "__main__":
    main()
