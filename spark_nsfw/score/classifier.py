"""image_embedding → score."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from spark_nsfw.errors import EmbeddingWidthError, InputError
from spark_nsfw.schema import EMBEDDING_NORM
from spark_nsfw.score.blocks import in_blocks
from spark_nsfw.score.detector import Detector

__all__ = ["ImageClassifier", "Model"]

#: A loaded classifier: embeddings float32 (N, D) → scores (N,) or (N, K), on one device.
Model = Callable[[torch.Tensor], torch.Tensor]

#: On a CPU every forward pass has this many rows, so that a score depends on nothing but
#: its embedding.
_CPU_BLOCK_ROWS = 128


class ImageClassifier(Detector[Model]):
    """Scores image embeddings; subclass it and give `load_model` to add one of your own.

    ::

        class WatermarkClassifier(ImageClassifier):
            def __init__(self, model_path):
                super().__init__("watermark", embedding_size=768, model_path=model_path)

            def load_model(self, device):
                model = nn.Sequential(nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
                model.load_state_dict(self.load_weights())
                return model.eval().to(device)

    Its arguments are NeMo Curator's, in their order; see `spark_nsfw.score.detector.Detector`
    for those that are not listed here.

    Args:
        embedding_column: the column that stored embeddings are read from.
        embedding_size: width D of the embeddings it takes; None takes any.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
    """

    #: Precision that the pipeline rounds embeddings to before this classifier sees them.
    embedding_precision: torch.dtype = torch.float32

    #: Whether its model takes CLIP's projection before it was normalised, ``e * norm``.
    takes_projection: bool = False

    def __init__(
        self,
        model_name: str,
        embedding_column: str = "image_embedding",
        pred_column: str | None = None,
        pred_type: Any = float,
        batch_size: int = -1,
        embedding_size: int | None = None,
        model_path: str | None = None,
        models_dir: str | None = None,
    ) -> None:
        super().__init__(model_name, pred_column, pred_type, batch_size, model_path, models_dir)
        self.embedding_column = embedding_column
        self.embedding_size = embedding_size
        self._settled: dict[int, ImageClassifier] = {}

    def load_model(self, device: str) -> Model:
        """Load the network, ready to score, on ``device``: float32 (N, D) → (N,) or (N, K).

        A `torch.nn.Module` in eval mode will do; a trailing axis of one is dropped. It is
        called on one thread, before any image is scored.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load_model")

    def takes(self, embedding_size: int) -> bool:
        """Whether it scores embeddings of this width."""
        return self.embedding_size in (None, embedding_size)

    def for_embedding_size(self, embedding_size: int) -> ImageClassifier:
        """A copy for embeddings of the given width, its weights found and tried; made once.

        Raises:
            EmbeddingWidthError: it takes another width.
            WeightsError: its file cannot be had or used.
        """
        if not self.takes(embedding_size):
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
        self._sha256 = self.weights_sha256()
        if self._sha256 is not None:
            self.model("cpu")  # so that a file that does not fit is refused now
        self._is_ready = True

    def score(self, embeddings: torch.Tensor, norms: torch.Tensor | None = None) -> torch.Tensor:
        """Score embeddings as the pipeline does, rounded to `embedding_precision` first.

        Args:
            embeddings: float32 (N, D).
            norms: float32 (N,), of the projections that they were normalised from; needed
                where the classifier ``takes_projection``.

        Returns:
            float32 (N,) or (N, K), on the embeddings' device.

        Raises:
            InputError: the classifier ``takes_projection``, and there are no norms.
        """
        if self.takes_projection:
            if norms is None:
                raise InputError(f"{type(self).__name__} needs {EMBEDDING_NORM} beside embeddings")
            # An embedder that normalises changes nothing here but the last bit.
            embeddings = nn.functional.normalize(embeddings, dim=1) * norms.unsqueeze(1)
        return self._forward(embeddings.to(self.embedding_precision).to(torch.float32))

    def classify(
        self, embeddings: npt.ArrayLike, device: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Score embeddings, the very values that are given.

        Args:
            embeddings: (N, D), any float type; the projections themselves where the
                classifier ``takes_projection``.
            device: a torch device; by default the GPU if there is one.

        Returns:
            What the model gives: float32 (N,) or (N, K).

        Raises:
            EmbeddingWidthError: D is not the width this classifier takes.
            InputError: it ``takes_projection``, and all of them are of unit length.
        """
        array = np.ascontiguousarray(embeddings, np.float32)
        if array.ndim != 2:
            raise EmbeddingWidthError(f"embeddings must be (N, D), these are {array.shape}")
        if self.takes_projection and len(array) and _all_are_unit(array):
            raise InputError(
                f"{type(self).__name__} takes CLIP's projections as they are before they are "
                "normalised, and all of these have unit length: multiply each by its "
                f"{EMBEDDING_NORM}"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        step = max(len(array), 1)
        if self.batch_size is not None and self.batch_size > 0:
            step = self.batch_size
        batches = torch.from_numpy(array).split(step)
        with torch.inference_mode():
            return np.concatenate([self._forward(b.to(device)).cpu().numpy() for b in batches])

    def _forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        model = self.for_embedding_size(embeddings.shape[1]).model(str(embeddings.device))
        block = _CPU_BLOCK_ROWS if embeddings.device.type == "cpu" else max(len(embeddings), 1)
        return self._checked(in_blocks(model, embeddings, block), len(embeddings))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_settled": {}}


def _all_are_unit(rows: npt.NDArray[np.float32]) -> bool:
    """Whether rows are normalised; to half precision, perhaps."""
    return bool(np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) < 2e-3))
