"""image_embedding → score."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from spark_nsfw.errors import EmbeddingWidthError, InputError, WeightsUnavailableError
from spark_nsfw.score.blocks import in_blocks
from spark_nsfw.score.checkpoint import load_state_dict
from spark_nsfw.score.download import PublishedFile, Weights, download, file_sha256, local_file

__all__ = ["ImageClassifier", "Model", "TakesClassifier"]

#: A loaded classifier: embeddings float32 (N, D) → scores float32 (N,), on one device.
Model = Callable[[torch.Tensor], torch.Tensor]


class TakesClassifier(Protocol):
    """A dataset whose embeddings can be scored, such as `spark_nsfw.ImageTextPairDataset`."""

    def with_classifier(self, classifier: ImageClassifier) -> Any:
        """The same dataset, scored."""


_Dataset = TypeVar("_Dataset", bound=TakesClassifier)


#: What decides where a score comes from and goes to, but not which it is.
_NOT_DESCRIBED = ("batch_size", "embedding_column", "model_path", "models_dir")

#: On a CPU every forward pass has this many rows, so that a score depends on nothing but
#: its embedding.
_CPU_BLOCK_ROWS = 128


class ImageClassifier:
    """Scores image embeddings; subclass it and give `load_model` to add one of your own.

    ::

        class WatermarkClassifier(ImageClassifier):
            def __init__(self, model_path):
                super().__init__("watermark_score", embedding_size=768, model_path=model_path)

            def load_model(self, device):
                model = nn.Sequential(nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
                model.load_state_dict(self.load_weights())
                return model.eval().to(device)

    Args:
        pred_column: the column that the scores go to.
        embedding_column: the column that stored embeddings are read from.
        embedding_size: width D of the embeddings it takes; None takes any.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: file of its weights, a path or URL. Its sha256 is settled before a job
            starts, noted in the output, and checked by every worker.
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made, from which
            published weights are taken instead of downloaded.
    """

    #: Precision that the pipeline rounds embeddings to before this classifier sees them.
    embedding_precision: torch.dtype = torch.float32

    def __init__(
        self,
        pred_column: str,
        embedding_column: str = "image_embedding",
        embedding_size: int | None = None,
        batch_size: int = -1,
        model_path: str | None = None,
        models_dir: str | None = None,
    ) -> None:
        if batch_size == 0 or batch_size < -1:
            raise InputError(f"batch_size is -1 or at least 1, not {batch_size}")
        self.pred_column = pred_column
        self.embedding_column = embedding_column
        self.embedding_size = embedding_size
        self.batch_size = batch_size
        self.model_path = model_path
        self.models_dir = models_dir
        self._sha256: str | None = None
        self._is_ready = False
        self._settled: dict[int, ImageClassifier] = {}
        self._models: dict[str, Model] = {}

    def load_model(self, device: str) -> Model:
        """Load the network, ready to score, on ``device``: float32 (N, D) → float32 (N,).

        A `torch.nn.Module` in eval mode will do; a trailing axis of one is dropped. It is
        called on one thread, before any image is scored.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load_model")

    @property
    def published_file(self) -> PublishedFile | None:
        """The weights it takes without ``model_path``; None where nobody publishes any."""
        return None

    def weights_file(self) -> Path | None:
        """The file of its weights, fetched if it must be and checked; None if it has none.

        Raises:
            WeightsUnavailableError: it cannot be had.
            ChecksumError: it is not the one that was settled or published.
        """
        if self.model_path is not None:
            return local_file(self.model_path, self._sha256)
        published = self.published_file
        if published is None:
            return None
        if self.models_dir is not None:
            url = f"{self.models_dir.rstrip('/')}/{published.file_name}"
            return local_file(url, published.sha256)
        return download(published.url, published.file_name, published.sha256)

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of `weights_file` by name, on the CPU; no pickle is executed.

        Raises:
            WeightsError: there is no file, or it cannot be had or read.
        """
        path = self.weights_file()
        if path is None:
            raise WeightsUnavailableError(f"{type(self).__name__} has no file: give model_path")
        return load_state_dict(path)

    @property
    def weights(self) -> Weights | None:
        """Which file it scores with; None if it has none, or if the embeddings' width decides.

        The sha256 of a file of one's own is known once `for_embedding_size` has settled it.
        """
        if self.model_path is not None:
            return Weights(self.model_path, self._sha256)
        published = self.published_file
        return None if published is None else Weights(published.url, published.sha256)

    def describe(self) -> dict[str, Any]:
        """What tells this classifier from another, for caches and for provenance.

        By default its class, its public attributes, and its weights, whatever path they
        were read from. Looks at no file.

        Raises:
            InputError: an attribute is neither plain data nor can it be pickled.
        """
        attributes = {}
        for name, value in sorted(vars(self).items()):
            if name.startswith("_") or name in _NOT_DESCRIBED:
                continue
            try:
                attributes[name] = _described(value)
            except Exception as exc:
                raise InputError(
                    f"{type(self).__name__}.{name} cannot be told from another value ({exc}): "
                    f"call it _{name} if no score depends on it, or define describe()"
                ) from exc
        described: dict[str, Any] = {"classifier": type(self).__qualname__} | attributes
        weights = self.weights
        if weights is not None:
            described["weights"] = {"source": weights.source, "sha256": weights.sha256}
        return described

    @property
    def is_ready(self) -> bool:
        """Whether its weights were found, tried and are known by their sha256."""
        return self._is_ready

    def for_embedding_size(self, embedding_size: int) -> ImageClassifier:
        """A copy for embeddings of the given width, its weights found and tried; made once.

        Raises:
            EmbeddingWidthError: it takes another width.
            WeightsError: its file cannot be had or used.
        """
        if self.embedding_size not in (None, embedding_size):
            raise EmbeddingWidthError(
                f"{type(self).__name__} takes embeddings of width {self.embedding_size}, "
                f"these have width {embedding_size}; use the CLIP model it was trained on, "
                "or set --embedding-size (embedding_size) of a tower without weights"
            )
        if self._is_ready:
            return self
        if embedding_size not in self._settled:
            settled = copy.copy(self)
            settled._models, settled._settled = {}, {}  # each width has a network of its own
            settled._settle(embedding_size)
            self._settled[embedding_size] = settled
        return self._settled[embedding_size]

    def _settle(self, embedding_size: int) -> None:
        path = self.weights_file()
        if path is not None:
            self._sha256 = file_sha256(path)
            self.model("cpu")  # so that a file that does not fit is refused now
        self._is_ready = True

    def model(self, device: str) -> Model:
        """The network on ``device``, loaded once."""
        if device not in self._models:
            self._models[device] = self.load_model(device)
        return self._models[device]

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score embeddings as the pipeline does, rounded to `embedding_precision` first.

        float32 (N, D) → float32 (N,), on the embeddings' device.
        """
        return self._forward(embeddings.to(self.embedding_precision).to(torch.float32))

    def classify(
        self, embeddings: npt.ArrayLike, device: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Score embeddings, the very values that are given.

        Args:
            embeddings: (N, D), any float type.
            device: a torch device; by default the GPU if there is one.

        Returns:
            float32 (N,).

        Raises:
            EmbeddingWidthError: D is not the width this classifier takes.
        """
        array = np.ascontiguousarray(embeddings, np.float32)
        if array.ndim != 2:
            raise EmbeddingWidthError(f"embeddings must be (N, D), these are {array.shape}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        step = self.batch_size if self.batch_size > 0 else max(len(array), 1)
        batches = torch.from_numpy(array).split(step)
        with torch.inference_mode():
            return np.concatenate([self._forward(b.to(device)).cpu().numpy() for b in batches])

    def _forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        model = self.for_embedding_size(embeddings.shape[1]).model(str(embeddings.device))
        block = _CPU_BLOCK_ROWS if embeddings.device.type == "cpu" else max(len(embeddings), 1)
        scores = in_blocks(model, embeddings, block)
        if scores.numel() != len(embeddings):
            raise InputError(
                f"the model of {type(self).__name__} gives {tuple(scores.shape[1:])} for an "
                "embedding, a classifier has one score: (N,) or (N, 1)"
            )
        return scores.reshape(-1).to(torch.float32)

    def __call__(self, dataset: _Dataset) -> _Dataset:
        """The dataset with this classifier's score column, computed when it is read or saved.

        Raises:
            InputError: it is no `ImageTextPairDataset`.
        """
        if not hasattr(dataset, "with_classifier"):
            raise InputError(f"expected an ImageTextPairDataset, not {type(dataset).__name__}")
        scored: _Dataset = dataset.with_classifier(self)
        return scored

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_models": {}, "_settled": {}}  # every process loads its own


def _described(value: Any) -> bool | int | float | str | None:
    """A value in a word; two that differ are never described alike, if they are data."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if _is_plain(value):
        return repr(value)
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    if isinstance(array, np.ndarray) and array.dtype != object:
        content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    else:
        content = pickle.dumps(value, protocol=4)
    return f"{type(value).__qualname__} of sha256 {hashlib.sha256(content).hexdigest()}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, (bool, int, float, str, type(None)))
