"""pixels → image_embedding: what all towers have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from spark_nsfw.errors import InputError
from spark_nsfw.score.describing import is_foreign, public_attributes
from spark_nsfw.score.download import Weights, file_sha256, local_file
from spark_nsfw.score.pixels import DECODES, Decode, Transform, decode_batch
from spark_nsfw.score.tower import (
    Precision,
    Tower,
    batch_size_on,
    check_speed,
    compute_exactly,
    precision_on,
)

if TYPE_CHECKING:
    from spark_nsfw.score.detector import Detector

__all__ = ["CLIP_MEAN", "CLIP_STD", "ImageEmbedder", "TakesEmbedder"]

#: Of the pixels that OpenAI's CLIP was trained on, per RGB channel, on a scale of 0 to 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


#: What decides where embeddings come from and go to, but not which they are.
_NOT_DESCRIBED = (
    "autocast",
    "batch_size",
    "checkpoint_path",
    "classifiers",
    "decode",
    "engine",
    "image_embedding_column",
    "models_dir",
    "num_threads_per_worker",
)


class TakesEmbedder(Protocol):
    """A dataset of images that can be embedded, such as `spark_nsfw.ImageTextPairDataset`."""

    def with_embedder(self, embedder: ImageEmbedder) -> Any:
        """The same dataset, embedded."""


_Dataset = TypeVar("_Dataset", bound=TakesEmbedder)


class ImageEmbedder:
    """Embeds images; subclass it and give `load_embedding_model` to add a tower of your own.

    ::

        class SiglipEmbedder(ImageEmbedder):
            def __init__(self):
                half = (0.5, 0.5, 0.5)
                super().__init__("siglip", embedding_size=768, mean=half, std=half)

            def load_embedding_model(self, device):
                return open_clip.create_model("ViT-B-16-SigLIP").visual.eval().to(device)

    Args:
        model_name: for people.
        image_embedding_column: the column that the embeddings go to.
        classifiers: applied to the images in the same pass.
        embedding_size: width D of the embeddings.
        image_size: side of the square image that the tower takes, in pixels.
        mean, std: of the pixels it was trained on, per RGB channel, on a scale of 0 to 1.
        batch_size: images per forward pass; None takes what suits the device.
        num_threads_per_worker: threads that decode images; None takes what suits the task's cores.
        normalize_embeddings: divide each embedding by its L2 norm.
        autocast: compute in float16 on a GPU; False computes in float32 everywhere.
        precision: ``float32``, ``float16`` or ``bfloat16`` on any device, whatever
            ``autocast`` says.
        decode: ``exact`` gives the pixels of OpenAI's CLIP bit for bit; ``fast`` takes
            half the time for JPEG and moves scores less than float16 does
            (docs/fidelity.md).
        checkpoint_path: file of its weights, a path or URL. Its sha256 is settled before a
            job starts, noted in the output, and checked by every worker.

    Raises:
        InputError: an argument that cannot work.
    """

    def __init__(
        self,
        model_name: str,
        image_embedding_column: str = "image_embedding",
        classifiers: Sequence[Detector[Any]] = (),
        *,
        embedding_size: int | None = None,
        image_size: int = 224,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        batch_size: int | None = None,
        num_threads_per_worker: int | None = None,
        normalize_embeddings: bool = True,
        autocast: bool = True,
        precision: Precision | None = None,
        decode: Decode = "fast",
        checkpoint_path: str | None = None,
    ) -> None:
        check_speed(batch_size, num_threads_per_worker, precision)
        if decode not in DECODES:
            raise InputError(f"--decode (decode) is one of {', '.join(DECODES)}, not {decode!r}")
        self.model_name = model_name
        self.image_embedding_column = image_embedding_column
        self.classifiers = tuple(classifiers)
        self.batch_size = batch_size
        self.num_threads_per_worker = num_threads_per_worker
        self.normalize_embeddings = normalize_embeddings
        self.autocast = autocast
        self.precision = precision
        self.decode: Decode = decode
        self.checkpoint_path = checkpoint_path
        self._embedding_size = embedding_size
        self._image_size = image_size
        self._mean, self._std = tuple(mean), tuple(std)
        self._sha256: str | None = None
        self._is_ready = False
        self._towers: dict[str, Tower] = {}

    def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Load the network, ready to embed, on ``device``.

        It takes normalised pixels, float (N, 3, S, S) of `precision_on` the device, and gives
        (N, D). A `torch.nn.Module` in eval mode will do; it is brought to that precision.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load_embedding_model")

    @property
    def embedding_size(self) -> int:
        """Width D of the embeddings.

        Raises:
            InputError: it was not given.
        """
        if self._embedding_size is None:
            raise InputError(f"{type(self).__name__} does not say its embedding_size")
        return self._embedding_size

    @property
    def image_size(self) -> int:
        """Side of the square image that the tower takes, in pixels."""
        return self._image_size

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the pixels, per RGB channel, on a scale of 0 to 1."""
        return self._mean, self._std

    @property
    def transform(self) -> Transform:
        """How an image becomes the pixels that the tower takes."""
        return Transform(self.image_size, decode=self.decode)

    @property
    def weights(self) -> Weights | None:
        """Which weights the tower has, if it says; their sha256 is known once it is `ready`."""
        return None if self.checkpoint_path is None else Weights(self.checkpoint_path, self._sha256)

    @property
    def is_ready(self) -> bool:
        """Whether its weights were found and their sha256 is known."""
        return self._is_ready

    def ready(self, device: str | None = None) -> ImageEmbedder:
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
            path = self.weights_file()
            settled._sha256 = None if path is None else file_sha256(path)
            settled._is_ready = True
        return settled

    def weights_file(self) -> str | None:
        """The file of its weights, fetched if it must be and checked; None if it has none."""
        if self.checkpoint_path is None:
            return None
        return str(local_file(self.checkpoint_path, self._sha256))

    def precision_on(self, device: str) -> Precision:
        """The precision it computes in on a device."""
        return precision_on(device, self.precision, self.autocast)

    def describe(self) -> dict[str, Any]:
        """What tells these embeddings from others, for caches and for provenance.

        Looks at no file: the weights have no sha256 until it is `ready`.
        """
        weights = self.weights
        described: dict[str, Any] = {
            "model_name": self.model_name,
            "embedding_size": self.embedding_size,
            "precision": self.precision or ("autocast" if self.autocast else "float32"),
            "normalize_embeddings": self.normalize_embeddings,
            "preprocessing": f"OpenAI CLIP, {self.image_size} px, decode={self.decode}",
        }
        if is_foreign(self):
            described["embedder"] = type(self).__qualname__
            described["preprocessing"] = f"{self.transform}, statistics {self.statistics}"
            described |= public_attributes(self, {*_NOT_DESCRIBED, *described})
        if weights is not None:
            described["weights"] = {"source": weights.source, "sha256": weights.sha256}
        return described

    def tower(self, device: str) -> Tower:
        """The tower, ready to embed: uint8 (N, S, S, 3) → float32 (N, D) on ``device``.

        Loaded once per device and process.

        Raises:
            WeightsUnavailableError: the checkpoint cannot be had.
            WeightsMismatchError: its tensors do not fit the tower.
        """
        if device not in self._towers:
            if self._sha256 is not None and is_foreign(self):
                self.weights_file()  # checked here, since its own code may just open the file
            compute_exactly(device)
            network = self.load_embedding_model(device)
            precision = getattr(torch, self.precision_on(device))
            mean, std = self.statistics
            normalize = self.normalize_embeddings
            tower = Tower(network, mean, std, precision, normalize, self.model_name)
            self._towers[device] = tower.eval().requires_grad_(False).to(device)
        return self._towers[device]

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
        tower = self.tower(device)
        embeddings = np.empty((len(images), self.embedding_size), np.float32)
        with torch.inference_mode():
            step = batch_size_on(device, self.batch_size)
            for start in range(0, len(images), step):
                batch = images[start : start + step]
                pixels = decode_batch(batch, self.transform, start)
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
