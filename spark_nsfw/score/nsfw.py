"""LAION's NSFW detector: image_embedding → nsfw_score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from spark_nsfw.errors import EmbeddingWidthError, InputError, WeightsMismatchError
from spark_nsfw.score.checkpoint import check_fit, load_state_dict
from spark_nsfw.score.classifier import ImageClassifier
from spark_nsfw.score.download import PublishedFile, file_sha256
from spark_nsfw.score.laion import DETECTORS, read_detector

__all__ = ["NsfwClassifier", "NsfwDetector"]


class NsfwDetector(nn.Module):
    """LAION's detector: normalise, then dense layers with ReLU between and a sigmoid at the end.

    Args:
        widths: of the embedding, the hidden layers and the score: (768, 64, 512, 256, 1).
        categories: embedding dimensions that are looked up instead of taken as numbers,
            each with the number of entries of its vocabulary; empty in every PyTorch port.

    Source: https://github.com/LAION-AI/CLIP-based-NSFW-Detector.
    """

    def __init__(self, widths: Sequence[int], categories: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.zeros(widths[0]))
        self.norm.register_buffer("variance", torch.ones(widths[0]))
        self.num_layers = len(widths) - 1
        for number in range(1, len(widths)):
            self.add_module(f"linear_{number}", nn.Linear(widths[number - 1], widths[number]))
        self.categories = dict(categories or {})
        for dimension, size in self.categories.items():
            codes = torch.zeros(size, dtype=torch.int64)
            self.register_buffer(f"vocabulary_{dimension}", codes)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores of embeddings: float32 (N, D) → float32 (N,), 0 to 1."""
        x = embeddings
        if self.categories:
            x = torch.nan_to_num(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
            for dimension in self.categories:
                x[:, dimension] = self._look_up(dimension, embeddings[:, dimension])
        scale = torch.clamp(torch.sqrt(self.norm.get_buffer("variance")), min=1e-7)
        x = (x - self.norm.get_buffer("mean")) / scale
        for number in range(1, self.num_layers + 1):
            linear = self.get_submodule(f"linear_{number}")
            x = _eigen_linear(linear, x) if number == 1 and self.categories else linear(x)
            x = torch.relu(x) if number < self.num_layers else torch.sigmoid(x)
        return x.squeeze(1)

    def _look_up(self, dimension: int, values: torch.Tensor) -> torch.Tensor:
        """Positions in a vocabulary, from 1; 0 for values that are not in it. float32 (N,).

        Values are compared as ``%f`` prints them: as millionths, with ``-0.000000`` apart
        from ``0.000000``. That is exact: a float32 times 10^6 needs 38 bits of mantissa, so
        float64 holds the product, and rounding it half to even is what printf does.
        """
        vocabulary = self.get_buffer(f"vocabulary_{dimension}")
        listed, positions = vocabulary.sort()
        finite = torch.isfinite(values)
        millionths = torch.round(torch.where(finite, values, 0).to(torch.float64) * 1e6)
        codes = millionths.to(torch.int64) * 2 + torch.signbit(values)
        nearest = torch.searchsorted(listed, codes).clamp(max=len(listed) - 1)
        found = (listed[nearest] == codes) & finite
        return torch.where(found, positions[nearest] + 1, 0).to(torch.float32)


def _eigen_linear(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A dense layer that adds up in the order of TensorFlow's CPU kernel.

    Float32 sums depend on their order, here by up to 2e-6 of a score. Eigen runs a
    chain of fused multiply-adds over each half of the inputs and adds the two. The
    product of two float32 is exact in float64, so the chain is the same everywhere.
    """
    weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
    half = x.shape[1] // 2
    inputs = x.to(torch.float64).reshape(len(x), 2, half).permute(2, 1, 0).unsqueeze(3)
    kernels = weight.to(torch.float64).reshape(-1, 2, half).permute(2, 1, 0).unsqueeze(2)
    sums = x.new_zeros(2, len(x), weight.shape[0])
    for one_input, its_weights in zip(inputs, kernels, strict=True):
        sums = torch.addcmul(sums.to(torch.float64), one_input, its_weights).to(torch.float32)
    return sums[0] + sums[1] + bias


#: dataset2metadata's names → ours.
_PORT_NAMES = {
    "norm.running_mean": "norm.mean",
    "norm.running_var": "norm.variance",
    "dense.": "linear_1.",
    "dense1.": "linear_2.",
    "dense2.": "linear_3.",
    "dense3.": "linear_4.",
}


class NsfwClassifier(ImageClassifier):
    """LAION's NSFW detector on OpenAI CLIP embeddings: 0 to 1, 1 = NSFW.

    Without ``model_path`` it takes LAION's own file for the width of the embeddings
    (768: ViT-L/14, 512: ViT-B/32), downloaded once to the cache directory.

    Args:
        embedding_column: the column that stored embeddings are read from.
        pred_column: the column that the scores go to.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: LAION's zip, NeMo Curator's ``clip_autokeras_binary_nsfw.pth``,
            dataset2metadata's state dict, or safetensors; a path or URL.
        variant: ``torch`` scores as NeMo Curator and DataComp do; ``laion`` as LAION's
            TensorFlow model does, with its categorical lookups, on embeddings that the
            pipeline rounds to float16 as LAION's were. ``laion`` needs LAION's zip.
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made, from
            which LAION's files are taken instead of downloaded.

    Source: https://github.com/LAION-AI/CLIP-based-NSFW-Detector.
    """

    def __init__(
        self,
        embedding_column: str = "image_embedding",
        pred_column: str = "nsfw_score",
        batch_size: int = -1,
        model_path: str | None = None,
        variant: Literal["torch", "laion"] = "torch",
        models_dir: str | None = None,
    ) -> None:
        if variant not in ("torch", "laion"):
            raise InputError(f"--nsfw-variant (variant) is 'torch' or 'laion', not {variant!r}")
        super().__init__(
            "nsfw",
            embedding_column,
            pred_column,
            batch_size=batch_size,
            embedding_size=768,  # ViT-L/14's, until it is told another
            model_path=model_path,
            models_dir=models_dir,
        )
        self._width: int | None = None
        self.variant = variant
        if variant == "laion":
            self.embedding_precision = torch.float16

    def takes(self, embedding_size: int) -> bool:
        """Whether it scores embeddings of this width: any, until it has settled on one."""
        return self._width in (None, embedding_size)

    def _settle(self, embedding_size: int) -> None:
        if self.model_path is None and embedding_size not in DETECTORS:
            raise EmbeddingWidthError(
                "LAION's detectors take embeddings of width "
                f"{' or '.join(map(str, DETECTORS))}, these have width {embedding_size}; use "
                f"{' or '.join(d.clip_model for d in DETECTORS.values())}, or give "
                "--nsfw-checkpoint (model_path)"
            )
        self.embedding_size = self._width = embedding_size
        super()._settle(embedding_size)

    @property
    def published_file(self) -> PublishedFile | None:
        """LAION's file for the embeddings' width; None until that is known."""
        if self._width is None:
            return None
        detector = DETECTORS[self._width]
        return PublishedFile(detector.url, detector.file_name, detector.sha256)

    def describe(self) -> dict[str, Any]:
        """Variant and weights, whatever path they were read from.

        Without weights where the embeddings' width, still unknown, decides which they are.
        """
        described: dict[str, Any] = {
            "classifier": type(self).__qualname__,
            "pred_column": self.pred_column,
            "variant": self.variant,
        }
        weights = self.weights
        if weights is not None:
            described["weights"] = {"source": weights.source, "sha256": weights.sha256}
        return described

    def load_model(self, device: str) -> NsfwDetector:
        """The detector from its file, in any of the known formats.

        Raises:
            InputError: neither a file nor the embeddings' width is known.
            WeightsError: the file cannot be had, or is no detector.
            EmbeddingWidthError: it is for embeddings of another width.
        """
        path = self.weights_file()
        if path is None:
            raise InputError("which detector it is depends on the embeddings: for_embedding_size")
        detector = next((d for d in DETECTORS.values() if d.sha256 == file_sha256(path)), None)
        vocabularies: dict[int, npt.NDArray[np.int64]] = {}
        if detector is not None:
            archive = read_detector(path, detector)
            tensors = {name: torch.tensor(array) for name, array in archive.tensors.items()}
            vocabularies = archive.vocabularies if self.variant == "laion" else {}
        elif self.variant == "laion":
            raise WeightsMismatchError(
                f"{path} has no vocabularies: --nsfw-variant laion (variant) needs LAION's own "
                f"zip, one of {', '.join(d.file_name for d in DETECTORS.values())}, unchanged"
            )
        else:
            tensors = _canonical(load_state_dict(path))
        widths = _widths(str(path), tensors)
        if self._width not in (None, widths[0]):
            raise EmbeddingWidthError(
                f"{path} takes embeddings of width {widths[0]}, "
                f"these have width {self._width}; use the CLIP model it was trained on"
            )
        network = NsfwDetector(widths, {k: len(codes) for k, codes in vocabularies.items()})
        for dimension, codes in vocabularies.items():
            tensors[f"vocabulary_{dimension}"] = torch.tensor(codes)
        check_fit(str(path), tensors, network.state_dict())
        network.load_state_dict(tensors)
        return network.eval().requires_grad_(False).to(device)


def _canonical(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dicts of NeMo Curator and of dataset2metadata → our names.

    dataset2metadata normalises with ``BatchNorm1d(eps=0)``; its scale and shift, where
    trained, are folded into mean and variance.
    """
    renamed = {}
    for name, tensor in tensors.items():
        new_name = name.removeprefix("module.")
        for theirs, ours in _PORT_NAMES.items():
            if new_name.startswith(theirs):
                new_name = new_name.replace(theirs, ours, 1)
        renamed[new_name] = tensor.to(torch.float32)
    renamed.pop("norm.num_batches_tracked", None)
    scale, shift = renamed.pop("norm.weight", None), renamed.pop("norm.bias", None)
    trained = (scale is not None and not torch.all(scale == 1)) or (
        shift is not None and not torch.all(shift == 0)
    )
    if trained:
        raise WeightsMismatchError(
            "norm.weight and norm.bias are trained, LAION's normalisation has none: "
            "this is not a copy of LAION's detector"
        )
    return renamed


def _widths(source: str, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    layers = [name for name in tensors if name.startswith("linear_") and name.endswith(".weight")]
    weights = [tensors[f"linear_{n}.weight"] for n in range(1, len(layers) + 1)
               if f"linear_{n}.weight" in tensors]  # fmt: skip
    if not weights or any(weight.ndim != 2 for weight in weights):
        raise WeightsMismatchError(
            f"{source} is not an NSFW detector: it has no linear_1.weight; "
            f"its tensors are {json.dumps(sorted(tensors)[:20])}"
        )
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
