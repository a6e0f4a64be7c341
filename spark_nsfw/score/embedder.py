"""pixels → image_embedding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import timm
import torch
from torch import nn

from spark_nsfw.errors import ImageError, InputError
from spark_nsfw.score.checkpoint import check_fit, load_state_dict
from spark_nsfw.score.download import Weights, file_sha256, hub_file, local_file
from spark_nsfw.score.pixels import DECODES, Decode, decode_image
from spark_nsfw.score.staging import staged_file
from spark_nsfw.score.tower import (
    PRECISIONS,
    Precision,
    Tower,
    create_network,
    network_shape,
    with_timm_names,
)

if TYPE_CHECKING:
    from spark_nsfw.score.classifier import ImageClassifier

__all__ = ["RANDOM_SEED", "TakesEmbedder", "TimmImageEmbedder"]

#: Random towers must be the same in every worker.
RANDOM_SEED = 0


class TakesEmbedder(Protocol):
    """A dataset of images that can be embedded, such as `spark_nsfw.ImageTextPairDataset`."""

    def with_embedder(self, embedder: TimmImageEmbedder) -> Any:
        """The same dataset, embedded."""


_Dataset = TypeVar("_Dataset", bound=TakesEmbedder)


class TimmImageEmbedder:
    """A CLIP image tower from timm.

    Args:
        model_name: of timm, such as ``vit_large_patch14_clip_quickgelu_224.openai``.
        pretrained: load timm's weights for that name from the model hub.
        batch_size: images per forward pass.
        num_threads_per_worker: threads that decode images.
        image_embedding_column: the column that the embeddings go to.
        normalize_embeddings: divide each embedding by its L2 norm.
        classifiers: applied to the embeddings in the same pass.
        autocast: compute in float16 on a GPU; False computes in float32 everywhere.
        checkpoint_path: weights from a file instead: timm's or open_clip's safetensors
            or PyTorch file, or OpenAI's ``ViT-L-14.pt``; a path or URL.
        precision: ``float32``, ``float16`` or ``bfloat16`` on any device, whatever
            ``autocast`` says.
        embedding_size: width D of the tower's projection; None takes the model's own.
        decode: ``exact`` gives the pixels of OpenAI's CLIP bit for bit; ``fast`` takes
            half the time for JPEG and moves scores less than float16 does
            (docs/fidelity.md).
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made, from
            which ``pretrained`` takes the weights instead of the hub.

    Without ``pretrained`` or ``checkpoint_path`` the weights are random, from a fixed
    seed: for trying things out; the scores mean nothing.

    Raises:
        InputError: an argument that cannot work, such as an unknown model name.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        batch_size: int = 64,
        num_threads_per_worker: int = 4,
        image_embedding_column: str = "image_embedding",
        normalize_embeddings: bool = True,
        classifiers: Sequence[ImageClassifier] = (),
        autocast: bool = True,
        checkpoint_path: str | None = None,
        precision: Precision | None = None,
        embedding_size: int | None = None,
        decode: Decode = "fast",
        models_dir: str | None = None,
    ) -> None:
        if not timm.is_model(model_name):
            raise InputError(
                f"timm has no model {model_name!r}; "
                f"close names: {', '.join(_close_names(model_name)) or 'none'}; "
                "timm.list_models() lists them all"
            )
        if batch_size < 1:
            raise InputError(f"batch size is at least 1, not {batch_size}")
        if num_threads_per_worker < 1:
            raise InputError(f"the number of threads is at least 1, not {num_threads_per_worker}")
        if precision not in (None, *PRECISIONS):
            raise InputError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
        if decode not in DECODES:
            raise InputError(f"decode is one of {', '.join(DECODES)}, not {decode!r}")
        self.decode: Decode = decode
        self.model_name = model_name
        self.pretrained = pretrained
        self.batch_size = batch_size
        self.num_threads_per_worker = num_threads_per_worker
        self.image_embedding_column = image_embedding_column
        self.normalize_embeddings = normalize_embeddings
        self.classifiers = tuple(classifiers)
        self.autocast = autocast
        self.checkpoint_path = checkpoint_path
        self.precision = precision
        self.models_dir = models_dir
        self._embedding_size = embedding_size
        self._sha256: str | None = None
        self._is_ready = False
        self._towers: dict[str, Tower] = {}

    @property
    def _shape(self) -> nn.Module:
        return network_shape(self.model_name, self._embedding_size)

    @property
    def embedding_size(self) -> int:
        """Width D of the embeddings."""
        shape: Any = self._shape
        return int(shape.num_classes or shape.num_features)

    @property
    def image_size(self) -> int:
        """Side of the square image that the tower takes, in pixels."""
        return int(self._config["input_size"][-1])

    @property
    def _config(self) -> dict[str, Any]:
        return dict(timm.data.resolve_data_config({}, model=self._shape))

    @property
    def weights(self) -> Weights:
        """Which weights the tower has; their sha256 is known once it is `ready`."""
        if self.checkpoint_path is None and not self.pretrained:
            return Weights(f"random (seed {RANDOM_SEED})", None, is_random=True)
        return Weights(self.checkpoint_path or self.model_name, self._sha256)

    @property
    def is_ready(self) -> bool:
        """Whether its weights were found and their sha256 is known."""
        return self._is_ready

    def ready(self, device: str | None = None) -> TimmImageEmbedder:
        """A copy whose weights are found, downloaded if need be, and known by their sha256.

        Every worker checks its own copy of the file against that sha256.

        Args:
            device: a torch device; settles the precision that it computes in there. None
                leaves that to each worker.

        Raises:
            WeightsError: the file cannot be had, or is not the one that was staged.
        """
        settled = copy.copy(self)
        if device is not None:
            settled.precision = self.precision_on(device)
        if not self._is_ready:
            path = self._file()
            settled._sha256 = None if path is None else file_sha256(path)
            settled._is_ready = True
        return settled

    def _file(self) -> str | None:
        """The local checkpoint file, fetched if it must be; None for random weights."""
        if self.checkpoint_path is not None:
            return str(local_file(self.checkpoint_path, self._sha256))
        if self.pretrained and self.models_dir is not None:
            url, sha256 = staged_file(self.models_dir, self.model_name)
            return str(local_file(url, self._sha256 or sha256))
        if self.pretrained:
            return str(local_file(hub_file(self.model_name), self._sha256))
        return None

    def precision_on(self, device: str) -> Precision:
        """The precision it computes in on a device."""
        if self.precision is not None:
            return self.precision
        return "float16" if self.autocast and torch.device(device).type == "cuda" else "float32"

    def describe(self) -> dict[str, Any]:
        """What tells these embeddings from others, for caches and for provenance.

        Looks at no file: the weights have no sha256 until it is `ready`.
        """
        weights = self.weights
        return {
            "model_name": self.model_name,
            "embedding_size": self.embedding_size,
            "weights": {"source": weights.source, "sha256": weights.sha256},
            "precision": self.precision or ("autocast" if self.autocast else "float32"),
            "normalize_embeddings": self.normalize_embeddings,
            "preprocessing": f"OpenAI CLIP, {self.image_size} px, decode={self.decode}",
        }

    def load_embedding_model(self, device: str) -> Tower:
        """The tower, ready to embed: uint8 (N, S, S, 3) → float32 (N, D) on ``device``.

        Loaded once per device and process.

        Raises:
            WeightsUnavailableError: the checkpoint cannot be had.
            WeightsMismatchError: its tensors do not fit the tower.
        """
        if device not in self._towers:
            self._towers[device] = self._load(device)
        return self._towers[device]

    def _load(self, device: str) -> Tower:
        path = self._file()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            network = create_network(self.model_name, self._embedding_size)
        if path is not None:
            tensors = with_timm_names(load_state_dict(path), network)
            check_fit(path, tensors, network.state_dict())
            network.load_state_dict(tensors)
        config = self._config
        precision = getattr(torch, self.precision_on(device))
        tower = Tower(network, config["mean"], config["std"], precision, self.normalize_embeddings)
        return tower.eval().requires_grad_(False).to(device)

    def embed(self, images: Sequence[bytes], device: str | None = None) -> npt.NDArray[np.float32]:
        """Embed encoded images.

        Args:
            images: N files' bytes.
            device: a torch device; by default the GPU if there is one.

        Returns:
            float32 (N, D), each of L2 norm 1 unless ``normalize_embeddings`` is off.

        Raises:
            InputError: one of them is not bytes.
            ImageError: one of them cannot be decoded, which one is said;
                `spark_nsfw.Scorer` gives such images a row with a status instead.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        tower = self.load_embedding_model(device)
        embeddings = np.empty((len(images), self.embedding_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = images[start : start + self.batch_size]
                pixels = np.empty((len(batch), self.image_size, self.image_size, 3), np.uint8)
                for row, image_bytes in enumerate(batch):
                    given: Any = image_bytes
                    if not isinstance(given, (bytes, bytearray, memoryview)):
                        kind = type(given).__name__
                        raise InputError(f"images[{start + row}] is no bytes but {kind}")
                    try:
                        pixels[row] = decode_image(image_bytes, self.image_size, decode=self.decode)
                    except ImageError as exc:
                        raise type(exc)(f"images[{start + row}]: {exc}") from exc
                embedded = tower(torch.from_numpy(pixels).to(device))
                embeddings[start : start + len(batch)] = embedded.cpu().numpy()
        return embeddings

    def __call__(self, dataset: _Dataset) -> _Dataset:
        """The dataset with embeddings and scores, computed when it is read or saved.

        Raises:
            InputError: it is no `ImageTextPairDataset`.
        """
        if not hasattr(dataset, "with_embedder"):
            raise InputError(f"expected an ImageTextPairDataset, not {type(dataset).__name__}")
        embedded: _Dataset = dataset.with_embedder(self)
        return embedded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_towers": {}}  # every process loads its own


def _close_names(model_name: str) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(model_name, timm.list_models() + timm.list_pretrained(), n=3)
