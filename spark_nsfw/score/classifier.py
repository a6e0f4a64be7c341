"""image_embedding → score."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from spark_nsfw.errors import (
    EmbeddingWidthError,
    InputError,
    WeightsMismatchError,
    WeightsUnavailableError,
)
from spark_nsfw.score.blocks import in_blocks
from spark_nsfw.score.download import (
    PublishedFile,
    Weights,
    check_fit,
    download,
    file_sha256,
    load_state_dict,
    local_file,
)
from spark_nsfw.score.laion import DETECTORS, read_detector

if TYPE_CHECKING:
    from spark_nsfw.dataset import ImageTextPairDataset

__all__ = [
    "AESTHETIC_FILE",
    "AestheticClassifier",
    "ImageClassifier",
    "NsfwClassifier",
    "NsfwDetector",
]

#: A loaded classifier: embeddings float32 (N, D) → scores float32 (N,), on one device.
Model = Callable[[torch.Tensor], torch.Tensor]


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

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """The dataset with this classifier's score column, computed when it is read or saved.

        Raises:
            InputError: it is no `ImageTextPairDataset`.
        """
        if not hasattr(dataset, "with_classifier"):
            raise InputError(f"expected an ImageTextPairDataset, not {type(dataset).__name__}")
        return dataset.with_classifier(self)

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
            raise InputError(f"variant is 'torch' or 'laion', not {variant!r}")
        super().__init__(pred_column, embedding_column, None, batch_size, model_path, models_dir)
        self.variant = variant
        if variant == "laion":
            self.embedding_precision = torch.float16

    def _settle(self, embedding_size: int) -> None:
        if self.model_path is None and embedding_size not in DETECTORS:
            raise EmbeddingWidthError(
                "LAION's detectors take embeddings of width "
                f"{' or '.join(map(str, DETECTORS))}, these have width {embedding_size}; use "
                f"{' or '.join(d.clip_model for d in DETECTORS.values())}, or give model_path"
            )
        self.embedding_size = embedding_size
        super()._settle(embedding_size)

    @property
    def published_file(self) -> PublishedFile | None:
        """LAION's file for the embeddings' width; None until that is known."""
        if self.embedding_size is None:
            return None
        detector = DETECTORS[self.embedding_size]
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
                f"{path} has no vocabularies: variant 'laion' needs LAION's own zip, one of "
                f"{', '.join(d.file_name for d in DETECTORS.values())}, unchanged"
            )
        else:
            tensors = _canonical(load_state_dict(path))
        widths = _widths(str(path), tensors)
        if self.embedding_size not in (None, widths[0]):
            raise EmbeddingWidthError(
                f"{path} takes embeddings of width {widths[0]}, "
                f"these have width {self.embedding_size}; use the CLIP model it was trained on"
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


#: LAION-Aesthetics V2, trained on the SAC, LAION-Logos and AVA ratings.
AESTHETIC_FILE = PublishedFile(
    url="https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    file_name="sac+logos+ava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)

#: Position in the published network's ``layers`` → (inputs, outputs); between them lies dropout.
_AESTHETIC_LAYERS = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


class AestheticClassifier(ImageClassifier):
    """LAION-Aesthetics V2 on OpenAI CLIP ViT-L/14 embeddings: about 1 to 10, 10 = pleasing.

    Args:
        embedding_column: the column that stored embeddings are read from.
        pred_column: the column that the scores go to.
        batch_size: embeddings per forward pass of `classify`; -1 takes all at once.
        model_path: ``sac+logos+ava1-l14-linearMSE.pth`` or another file of its tensors,
            a path or URL; None takes the published one, downloaded once.
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made.

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    def __init__(
        self,
        embedding_column: str = "image_embedding",
        pred_column: str = "aesthetic_score",
        batch_size: int = -1,
        model_path: str | None = None,
        models_dir: str | None = None,
    ) -> None:
        super().__init__(pred_column, embedding_column, 768, batch_size, model_path, models_dir)

    @property
    def published_file(self) -> PublishedFile:
        """The file of its authors."""
        return AESTHETIC_FILE

    def load_model(self, device: str) -> nn.Linear:
        """The network as the one affine map that it is.

        Five linear layers with nothing but dropout between them are one: multiplied out
        in float64 it gives the same scores, at a thousandth of the cost.

        Raises:
            WeightsError: the file cannot be had, or holds another network.
        """
        tensors = {name: tensor.to(torch.float64) for name, tensor in self.load_weights().items()}
        expected = {}
        for position, (num_inputs, num_outputs) in _AESTHETIC_LAYERS.items():
            expected[f"layers.{position}.weight"] = torch.empty(num_outputs, num_inputs)
            expected[f"layers.{position}.bias"] = torch.empty(num_outputs)
        check_fit(str(self.weights_file()), tensors, expected)
        weight, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
        for position in _AESTHETIC_LAYERS:
            layer = tensors[f"layers.{position}.weight"]
            weight, bias = layer @ weight, layer @ bias + tensors[f"layers.{position}.bias"]
        network = nn.Linear(768, 1)
        network.load_state_dict({"weight": weight, "bias": bias})
        return network.requires_grad_(False).to(device)
