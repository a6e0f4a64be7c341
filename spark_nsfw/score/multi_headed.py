"""Unsafe Diffusion's multi-headed safety classifier: five columns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import nn

from spark_nsfw.errors import (
    ChecksumError,
    InputError,
    StorageError,
    WeightsError,
    WeightsUnavailableError,
)
from spark_nsfw.files import exists, find_file
from spark_nsfw.score.checkpoint import check_fit, load_state_dict
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.download import Weights, file_sha256, local_file

__all__ = ["HEADS", "MultiHeadedClassifier"]

#: In the order of the columns.
HEADS = ("sexual", "violent", "disturbing", "hateful", "political")

_COLUMNS = tuple(f"mhsc_{head}_score" for head in HEADS)

#: The tensors of one head: Linear, ReLU, Dropout, BatchNorm1d, Linear, sigmoid.
_HEAD_SHAPES = {
    "0.weight": (384, 768),
    "0.bias": (384,),
    "3.weight": (384,),
    "3.bias": (384,),
    "3.running_mean": (384,),
    "3.running_var": (384,),
    "4.weight": (1, 384),
    "4.bias": (1,),
}

#: PyTorch's default, which the heads were trained with.
_BATCH_NORM_EPS = 1e-5


class MultiHeadedClassifier(ImageClassifier):
    """Five kinds of unsafe images, on OpenAI CLIP ViT-L/14 projections: 0 to 1, 1 = unsafe.

    A score above 0.5 is its authors' threshold. They state no licence, so nothing is
    downloaded: get the five files from their repository.

    It takes the projection as it is before CLIP normalises it, not the embedding: stored
    embeddings need the column ``embedding_norm`` beside them.

    Args:
        embedding_column: the column that stored embeddings are read from.
        pred_columns: the columns that the scores go to, in the order of `HEADS`.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: a directory with ``sexual.pt``, ``violent.pt``, ``disturbing.pt``,
            ``hateful.pt`` and ``political.pt`` (or ``mhsc_sexual.pt`` …), or one file of all
            their tensors, named ``sexual.0.weight`` …; a path or URL.
        models_dir: such a directory, where there is no ``model_path``.

    Source: Qu et al., "Unsafe Diffusion", CCS 2023;
    https://github.com/YitingQu/unsafe-diffusion, ``checkpoints/multi-headed``.
    """

    takes_projection = True

    def __init__(
        self,
        embedding_column: str = "image_embedding",
        pred_columns: Sequence[str] = _COLUMNS,
        batch_size: int = -1,
        model_path: str | None = None,
        models_dir: str | None = None,
    ) -> None:
        if len(pred_columns) != len(HEADS):
            raise InputError(f"pred_columns are {len(HEADS)}, one each for {', '.join(HEADS)}")
        super().__init__(
            "mhsc",
            embedding_column,
            pred_columns[0],
            batch_size=batch_size,
            embedding_size=768,
            model_path=model_path or models_dir,
            models_dir=models_dir,
        )
        self.pred_columns = tuple(pred_columns)

    @property
    def result_fields(self) -> list[pa.Field]:
        """A score for each head."""
        return [pa.field(column, pa.float32()) for column in self.pred_columns]

    def weights_sha256(self) -> str:
        """The sha256 of its file; of a directory, that of the five files' own.

        It is what ``sha256sum sexual.pt violent.pt disturbing.pt hateful.pt political.pt |
        sha256sum`` prints, whatever the files are called.

        Raises:
            WeightsUnavailableError: a file is missing or cannot be read.
        """
        files = self._files()
        if isinstance(files, Path):
            return file_sha256(files)
        lines = [f"{file_sha256(path)}  {head}.pt\n" for head, path in files.items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of all heads, such as ``sexual.0.weight``.

        Raises:
            WeightsError: a file is missing, cannot be read, or is not the one that was settled.
        """
        found = self.weights_sha256()
        if self._sha256 not in (None, found):
            raise ChecksumError(
                f"the five files of {self.model_path} are not the expected ones: sha256 {found} "
                f"over all found, {self._sha256} expected"
            )
        files = self._files()
        if isinstance(files, Path):
            return load_state_dict(files)
        return {
            f"{head}.{name}": tensor
            for head, path in files.items()
            for name, tensor in load_state_dict(path).items()
        }

    def _files(self) -> Path | dict[str, Path]:
        """The one file, or each head's, on this machine.

        Raises:
            WeightsUnavailableError: one is missing or cannot be read.
        """
        if self.model_path is None:
            raise WeightsUnavailableError(
                f"{type(self).__name__} needs model_path (--detector multi_headed=DIR), a "
                "directory with the files of "
                "https://github.com/YitingQu/unsafe-diffusion, checkpoints/multi-headed"
            )
        try:
            if find_file(self.model_path) is not None:
                return local_file(self.model_path)
            return {head: local_file(self._head_url(head)) for head in HEADS}
        except (StorageError, InputError) as exc:
            raise WeightsUnavailableError(f"{self.model_path}: {exc}") from exc

    def _head_url(self, head: str) -> str:
        directory = str(self.model_path).rstrip("/")
        urls = [f"{directory}/{head}.pt", f"{directory}/mhsc_{head}.pt"]
        for url in urls:
            if exists(url):
                return url
        raise WeightsUnavailableError(
            f"{directory} has neither {head}.pt nor mhsc_{head}.pt: it must hold a file for each "
            f"of {', '.join(HEADS)}"
        )

    @property
    def weights(self) -> Weights | None:
        """Which files it scores with; their common sha256 is known once it is ready."""
        return None if self.model_path is None else Weights(self.model_path, self._sha256)

    def load_model(self, device: str) -> nn.Module:
        """All heads at once: the projection, float32 (N, 768) → float32 (N, 5).

        Raises:
            WeightsError: a file cannot be had, or holds another network.
        """
        tensors = {
            name: tensor
            for name, tensor in self.load_weights().items()
            if not name.endswith("num_batches_tracked")
        }
        expected = {
            f"{head}.{name}": torch.empty(shape, device="meta")
            for head in HEADS
            for name, shape in _HEAD_SHAPES.items()
        }
        check_fit(str(self.model_path), tensors, expected)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise WeightsError(f"{self.model_path}: not all of its numbers are finite")
        return _Heads(tensors).eval().requires_grad_(False).to(device)


class _Heads(nn.Module):
    """The five networks side by side, batch norm multiplied into the layer that follows it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()

        def stacked(name: str) -> torch.Tensor:
            return torch.stack([tensors[f"{head}.{name}"].to(torch.float64) for head in HEADS])

        scale = stacked("3.weight") / torch.sqrt(stacked("3.running_var") + _BATCH_NORM_EPS)
        shift = stacked("3.bias") - stacked("3.running_mean") * scale
        last = stacked("4.weight").squeeze(1)  # (5, 384)
        self.hidden = nn.Linear(768, len(HEADS) * 384)
        self.hidden.weight.data = stacked("0.weight").reshape(-1, 768).to(torch.float32)
        self.hidden.bias.data = stacked("0.bias").reshape(-1).to(torch.float32)
        self.register_buffer("last", (last * scale).to(torch.float32))
        bias = stacked("4.bias").squeeze(1) + (last * shift).sum(dim=1)
        self.register_buffer("bias", bias.to(torch.float32))

    def forward(self, projections: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.hidden(projections)).unflatten(1, (len(HEADS), 384))
        logits = (hidden * self.get_buffer("last")).sum(dim=2) + self.get_buffer("bias")
        return torch.sigmoid(logits)
