"""What is computed of an image, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spark_nsfw.note import package_version
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.embedder import TimmImageEmbedder

__all__ = ["provenance"]


def provenance(
    embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier]
) -> dict[str, Any]:
    """Tower, detectors, their weights and the version of this package, as plain JSON types."""
    return {
        "version": package_version(),
        "embedder": embedder.describe(),
        "classifiers": [classifier.describe() for classifier in classifiers],
    }
