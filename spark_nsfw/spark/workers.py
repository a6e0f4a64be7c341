"""What a Python worker that scores has: its device and its one scorer."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from pyspark import TaskContext, cloudpickle
from pyspark.sql import SparkSession

from spark_nsfw.errors import InputError
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.embedder import TimmImageEmbedder
from spark_nsfw.score.scorer import Scorer

__all__ = [
    "choose_device",
    "classifier_identity",
    "device_kind",
    "scorer_identity",
    "worker_classifiers",
    "worker_device",
    "worker_scorer",
]

_NO_GPU = "no GPU"

_log = logging.getLogger(__name__)


def choose_device(device: str | None = None) -> str:
    """The torch device of this worker.

    In this order: ``device`` if it is one; the GPU address that Spark gave the task; the
    first GPU that is visible; the CPU, unless ``device`` is ``cuda``.
    """
    if device not in (None, "cuda"):
        return str(device)
    task = TaskContext.get()
    resources = task.resources() if task is not None else {}
    if "gpu" in resources:
        # The address counts the machine's GPUs, torch those that the environment leaves.
        address = resources["gpu"].addresses[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if address in visible:
            return f"cuda:{visible.index(address)}"
        return "cuda:0" if visible != [""] and len(visible) == 1 else f"cuda:{address}"
    return "cuda:0" if device == "cuda" or torch.cuda.is_available() else "cpu"


def worker_device(device: str | None = None) -> str:
    """This worker's `choose_device`, with as many threads as the task has cores."""
    task = TaskContext.get()
    if task is not None:
        torch.set_num_threads(max(1, task.cpus()))
    chosen = choose_device(device)
    if torch.device(chosen).type == "cuda":
        torch.cuda.set_device(chosen)  # pinned memory would open a context on the first GPU
    return chosen


def device_kind(spark: SparkSession, device: str | None = None) -> str:
    """``cuda`` or ``cpu``: what the workers compute on, found out by one of them.

    Raises:
        InputError: it should be a GPU and there is none.
    """

    def choose(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            kind = torch.device(choose_device(device)).type
            if kind == "cuda" and not torch.cuda.is_available():
                kind = _NO_GPU
            yield pa.RecordBatch.from_arrays([pa.array([kind])], names=["kind"])

    row = spark.range(1, numPartitions=1).mapInArrow(choose, "kind string").collect()[0]
    if row["kind"] == _NO_GPU:
        raise InputError(
            f"device {device or 'cuda'}: torch sees no GPU on the machine of a worker; check "
            "nvidia-smi and torch.cuda.is_available() there, or take --device cpu"
        )
    return str(row["kind"])


#: Scorers that a worker keeps, the last ones: whoever tries out many would fill the GPU.
_KEPT = 2

_scorers: dict[str, Scorer] = {}
_classifiers: dict[str, ImageClassifier] = {}


def classifier_identity(classifier: ImageClassifier) -> str:
    """What a loaded classifier is known by in a worker; to be asked for on the driver.

    It is known by what it computes, not by who asked for it or where its file lies: a model
    that is loaded serves every function that needs the same one.
    """
    described = _without_sources(classifier.describe())
    if not type(classifier).__module__.startswith("spark_nsfw."):
        # its code may be edited in a notebook while the workers live on
        described["code"] = hashlib.sha256(cloudpickle.dumps(type(classifier))).hexdigest()
    return json.dumps(described, sort_keys=True)


def scorer_identity(
    embedder: TimmImageEmbedder, classifiers: Sequence[ImageClassifier], keep_embeddings: bool
) -> str:
    """What a scorer is known by in a worker; to be asked for on the driver."""
    settings = {
        "embedder": _without_sources(embedder.describe()),
        "classifiers": [classifier_identity(classifier) for classifier in classifiers],
        "batch_size": embedder.batch_size,
        "num_threads": embedder.num_threads_per_worker,
        "columns": [embedder.image_embedding_column, keep_embeddings],
    }
    return json.dumps(settings, sort_keys=True)


def worker_scorer(
    embedder: TimmImageEmbedder,
    classifiers: Sequence[ImageClassifier],
    device: str | None,
    keep_embeddings: bool,
    identity: str,
) -> Scorer:
    """This worker's scorer of that `scorer_identity`, kept between tasks."""
    chosen = worker_device(device)
    known_as = f"{chosen} {identity}"
    if known_as not in _scorers:
        while len(_scorers) >= _KEPT:
            del _scorers[next(iter(_scorers))]
        _scorers[known_as] = Scorer(embedder, classifiers, chosen, keep_embeddings)
        _log.info("scorer loaded on %s: %s", chosen, identity)
    return _scorers[known_as]


def worker_classifiers(
    classifiers: Sequence[ImageClassifier], identities: Sequence[str]
) -> list[ImageClassifier]:
    """These classifiers, or this worker's loaded ones of the same `classifier_identity`."""
    known = zip(identities, classifiers, strict=True)
    return [_classifiers.setdefault(identity, classifier) for identity, classifier in known]


def _without_sources(value: Any) -> Any:
    """The same file is the same weights, wherever it lies."""
    if isinstance(value, dict):
        return {
            name: _without_sources(entry)
            for name, entry in value.items()
            if name != "source" or value.get("sha256") is None
        }
    return [_without_sources(entry) for entry in value] if isinstance(value, list) else value
