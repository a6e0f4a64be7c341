"""Find what is not safe for work among billions of images, with Spark.

The names below are the public API. Those that need Spark are imported when first
used, so that the core runs without pyspark and Java.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark_nsfw.dataset import ImageTextPairDataset
    from spark_nsfw.errors import SparkNsfwError
    from spark_nsfw.read.images import read_image
    from spark_nsfw.read.shards import SampleOptions, iter_sample_batches, iter_sample_rows
    from spark_nsfw.schema import Status
    from spark_nsfw.score.aesthetic import AestheticClassifier
    from spark_nsfw.score.classifier import ImageClassifier
    from spark_nsfw.score.embedder import ImageEmbedder
    from spark_nsfw.score.nsfw import NsfwClassifier
    from spark_nsfw.score.open_nsfw import OpenNsfwClassifier
    from spark_nsfw.score.pixel_classifier import PixelClassifier
    from spark_nsfw.score.pixels import Transform
    from spark_nsfw.score.scorer import Scorer
    from spark_nsfw.score.timm_classifier import TimmImageClassifier
    from spark_nsfw.score.timm_embedder import TimmImageEmbedder
    from spark_nsfw.spark.datasource import register_webdataset
    from spark_nsfw.spark.reader import read_webdataset
    from spark_nsfw.spark.udf import nsfw_udf, score_samples

_MODULES = {
    "AestheticClassifier": "score.aesthetic",
    "ConceptClassifier": "score.concepts",
    "ImageClassifier": "score.classifier",
    "ImageEmbedder": "score.embedder",
    "ImageTextPairDataset": "dataset",
    "MultiHeadedClassifier": "score.multi_headed",
    "NsfwClassifier": "score.nsfw",
    "OpenNsfwClassifier": "score.open_nsfw",
    "PixelClassifier": "score.pixel_classifier",
    "Q16Classifier": "score.q16",
    "SafetyCheckerClassifier": "score.safety_checker",
    "SampleOptions": "read.shards",
    "Scorer": "score.scorer",
    "SparkNsfwError": "errors",
    "Status": "schema",
    "TimmImageClassifier": "score.timm_classifier",
    "TimmImageEmbedder": "score.timm_embedder",
    "Transform": "score.pixels",
    "iter_sample_batches": "read.shards",
    "iter_sample_rows": "read.shards",
    "nsfw_udf": "spark.udf",
    "read_image": "read.images",
    "read_webdataset": "spark.reader",
    "register_webdataset": "spark.datasource",
    "score_samples": "spark.udf",
}

__all__ = [
    "AestheticClassifier",
    "ConceptClassifier",
    "ImageClassifier",
    "ImageEmbedder",
    "ImageTextPairDataset",
    "MultiHeadedClassifier",
    "NsfwClassifier",
    "OpenNsfwClassifier",
    "PixelClassifier",
    "Q16Classifier",
    "SafetyCheckerClassifier",
    "SampleOptions",
    "Scorer",
    "SparkNsfwError",
    "Status",
    "TimmImageClassifier",
    "TimmImageEmbedder",
    "Transform",
    "iter_sample_batches",
    "iter_sample_rows",
    "nsfw_udf",
    "read_image",
    "read_webdataset",
    "register_webdataset",
    "score_samples",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
