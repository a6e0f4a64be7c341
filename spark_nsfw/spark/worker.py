"""What a Python worker that scores has: its device and its scorers."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import torch
from pyspark import TaskContext, cloudpickle
from pyspark.sql import SparkSession

from spark_nsfw.errors import InputError
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.score.scorer import Scorer
from spark_nsfw.score.stored import StoredScorer

__all__ = [
    "choose_device",
    "device_kind",
    "recipe_identity",
    "send_class_from",
    "worker_device",
    "worker_scorer",
]

#: What a worker says where there should be a GPU and is none.
_NO_GPU = "no GPU"

#: Keep only recent scorers; more would exhaust GPU memory.
_MAX_SCORERS = 2

_log = logging.getLogger(__name__)

_scorers: dict[str, Scorer | StoredScorer] = {}


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
        return _device_at(resources["gpu"].addresses[0])
    return "cuda:0" if device == "cuda" or torch.cuda.is_available() else "cpu"


def _device_at(address: str) -> str:
    """The torch device at an address of Spark's.

    Args:
        address: a number, in nvidia-smi's order, or a UUID such as ``GPU-…`` and ``MIG-…``.

    Raises:
        InputError: nobody knows which of the visible GPUs that is.
    """
    # The address counts the machine's GPUs, torch those that the environment leaves.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    left = [name for name in visible.split(",") if name]
    if address in left and not address.startswith("MIG-"):
        return f"cuda:{left.index(address)}"
    if not address.isdigit():  # torch cannot be told of it in another way
        if left != [address] and torch.cuda.is_initialized():
            raise InputError(
                f"Spark gave this task GPU {address}, and its worker has opened {visible or 'all'} "
                "before: give each executor one GPU (spark.executor.resource.gpu.amount)"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = address
        return "cuda:0"
    if len(left) == 1:
        return "cuda:0"
    if not all(each.isdigit() for each in left):
        return f"cuda:{left.index(_uuid_of(address, left))}"
    return f"cuda:{address}"


def _uuid_of(address: str, left: list[str]) -> str:
    """The UUID of nvidia-smi's GPU of that number, as CUDA_VISIBLE_DEVICES has it."""
    command = ["nvidia-smi", f"--id={address}", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as exc:
        told = str(exc)
    for uuid in left:
        if told.startswith(uuid):  # CUDA takes the beginning of a UUID, too
            return uuid
    raise InputError(
        f"Spark gave this task GPU {address}, and CUDA_VISIBLE_DEVICES has {','.join(left)}: "
        f"which of them is it? nvidia-smi says {told!r}. Let spark.executor.resource.gpu."
        "discoveryScript tell UUIDs, or leave CUDA_VISIBLE_DEVICES unset"
    )


def device_kind(spark: SparkSession, device: str | None = None) -> str:
    """``cuda`` or ``cpu``: what the workers compute on, as one of them reports.

    On a cluster this runs a task, so at least one executor has registered afterwards.

    Raises:
        InputError: a GPU was asked for and there is none.
    """

    def choose(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            yield pa.RecordBatch.from_arrays([pa.array([_kind_of_device(device)])], names=["kind"])

    context = getattr(spark, "_sc", None)  # Spark Connect has none
    if context is not None and context.master.partition("[")[0] == "local":
        return _refuse_no_gpu(_kind_of_device(device), device)  # workers are on this machine
    if device is not None and torch.device(device).type == "cpu":
        spark.range(1, numPartitions=1).collect()  # no worker needs to import torch for that
        return "cpu"
    row = spark.range(1, numPartitions=1).mapInArrow(choose, "kind string").collect()[0]
    return _refuse_no_gpu(row["kind"], device)


def _refuse_no_gpu(kind: str, device: str | None) -> str:
    if kind == _NO_GPU:
        raise InputError(
            f"device {device or 'cuda'}: torch sees no GPU on a worker's machine; check "
            "nvidia-smi and torch.cuda.is_available() there, or use --device cpu"
        )
    return kind


def _kind_of_device(device: str | None) -> str:
    kind = torch.device(choose_device(device)).type
    return _NO_GPU if kind == "cuda" and not torch.cuda.is_available() else kind


def worker_device(device: str | None = None) -> str:
    """This worker's `choose_device`, with as many threads as the task has cores."""
    task = TaskContext.get()
    if task is not None:
        torch.set_num_threads(max(1, task.cpus()))
    chosen = choose_device(device)
    if torch.device(chosen).type == "cuda":
        torch.cuda.set_device(chosen)  # pinned memory would open a context on the first GPU
    return chosen


def send_class_from(model: object, directory: Path) -> None:
    """Let a model's class travel to the workers as code if its module lies in a directory.

    Other classes travel as the name of their module, which workers import.
    """
    module = sys.modules[type(model).__module__]
    place = Path(getattr(module, "__file__", None) or "/")
    is_installed = "site-packages" in place.parts or module.__name__.startswith("spark_nsfw.")
    if place.is_relative_to(directory) and not is_installed:
        cloudpickle.register_pickle_by_value(module)


def recipe_identity(recipe: Recipe) -> str:
    """What identifies a recipe's scorer in a worker; to be called on the driver.

    The code of classes from other packages counts, since it may be edited in a notebook
    while the workers live on.
    """
    models = [*recipe.classifiers, *([recipe.embedder] if recipe.embedder is not None else [])]
    foreign = [type(m) for m in models if not type(m).__module__.startswith("spark_nsfw.")]
    code = [hashlib.sha256(cloudpickle.dumps(each)).hexdigest() for each in foreign]
    return " ".join([recipe.identity, *code])


def worker_scorer(recipe: Recipe, identity: str) -> Scorer | StoredScorer:
    """This worker's scorer for a recipe of that `recipe_identity`, kept between tasks."""
    device = worker_device(recipe.device)
    known_as = f"{device} {identity}"
    if known_as not in _scorers:
        while len(_scorers) >= _MAX_SCORERS:
            del _scorers[next(iter(_scorers))]
        made = Scorer.of(recipe, device) if recipe.reads_images else StoredScorer(recipe, device)
        _scorers[known_as] = made
        _log.info("scorer loaded on %s: %s", device, identity)
    return _scorers[known_as]
