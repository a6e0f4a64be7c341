"""What a Python worker that scores has: its device and its one scorer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from pyspark import TaskContext
from pyspark.sql import SparkSession

from spark_nsfw.classifiers import ImageClassifier
from spark_nsfw.embedders import TimmImageEmbedder
from spark_nsfw.errors import InputError
from spark_nsfw.scorer import Scorer

__all__ = [
    "choose_device",
    "device_kind",
    "worker_classifiers",
    "worker_device",
    "worker_scorer",
]

_NO_GPU = "no GPU"

_log = logging.getLogger(__name__)


def choose_device(device: str | None = None) -> str:
    """The torch device of this worker.

    In this order: ``device`` if given; the GPU that ``CUDA_VISIBLE_DEVICES`` leaves
    visible; the GPU address that Spark gave the task; any GPU; the CPU.
    """
    if device is not None:
        return device
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    task = TaskContext.get()
    resources = task.resources() if task is not None else {}
    if "gpu" in resources:
        return f"cuda:{resources['gpu'].addresses[0]}"
    return "cuda:0" if torch.cuda.is_available() else "cpu"


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


_scorers: dict[str, Scorer] = {}


def worker_scorer(
    embedder: TimmImageEmbedder,
    classifiers: Sequence[ImageClassifier],
    device: str | None,
    keep_embeddings: bool,
) -> Scorer:
    """This worker's scorer, kept between tasks.

    It is known by what it computes, not by who asked for it: a model that is loaded
    serves every function that needs the same one.
    """
    chosen = worker_device(device)
    settings = {
        "embedder": embedder.describe(),
        "classifiers": [classifier.describe() for classifier in classifiers],
        "device": chosen,
        "batch_size": embedder.batch_size,
        "num_threads": embedder.num_threads_per_worker,
        "columns": [embedder.image_embedding_column, keep_embeddings],
    }
    identity = json.dumps(_without_sources(settings), sort_keys=True)
    if identity not in _scorers:
        _scorers[identity] = Scorer(embedder, classifiers, chosen, keep_embeddings)
        _log.info("scorer loaded on %s: %s", chosen, identity)
    return _scorers[identity]


_classifiers: dict[str, ImageClassifier] = {}


def worker_classifiers(classifiers: Sequence[ImageClassifier]) -> list[ImageClassifier]:
    """These classifiers, or this worker's loaded ones that give the same scores."""
    identities = [json.dumps(_without_sources(c.describe()), sort_keys=True) for c in classifiers]
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
