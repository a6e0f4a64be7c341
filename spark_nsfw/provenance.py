"""What made these numbers: the note that every output file carries."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spark_nsfw.classifiers import ImageClassifier
from spark_nsfw.embedders import TimmImageEmbedder

__all__ = ["PROVENANCE", "package_version", "provenance"]

#: The key under which the columns' metadata holds the note.
PROVENANCE = "spark_nsfw"


def package_version() -> str:
    """The installed version; ``0+unknown`` when the package runs from a plain folder."""
    try:
        return version("spark-nsfw")
    except PackageNotFoundError:
        return "0+unknown"


def provenance(
    embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier]
) -> dict[str, Any]:
    """Tower, detectors, their weights and the version of this package, as plain JSON types."""
    return {
        "version": package_version(),
        "embedder": embedder.describe(),
        "classifiers": [classifier.describe() for classifier in classifiers],
    }
