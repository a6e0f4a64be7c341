"""pixels → score: detectors with a tower of their own, which need no CLIP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spark_nsfw.score.detector import Detector
from spark_nsfw.score.pixels import Transform, decode_batch
from spark_nsfw.score.tower import (
    Precision,
    Tower,
    batch_size_on,
    check_speed,
    compute_exactly,
    precision_on,
)

__all__ = ["PixelClassifier"]


class PixelClassifier(Detector[Tower]):
    """Scores decoded images; subclass it and give `load_model` to add a detector of your own.

    ::

        class BlurClassifier(PixelClassifier):
            def __init__(self, model_path):
                half = (0.5, 0.5, 0.5)
                super().__init__("blur", Transform(224), half, half, model_path=model_path)

            def load_model(self, device):
                model = nn.Sequential(timm.create_model("resnet18", num_classes=1), nn.Sigmoid())
                model.load_state_dict(self.load_weights())
                return model.eval()

    An image is decoded once, whatever number of detectors look at it. See
    `spark_nsfw.score.detector.Detector` for the arguments that are not listed here.

    Args:
        transform: how an image becomes the pixels that the model takes.
        mean, std: of the pixels that it was trained on, per RGB channel, on a scale of 0 to 1.
        batch_size: images per forward pass, where no embedder says; None takes what suits
            the device.
        num_threads_per_worker: threads that decode images, where no embedder says; None
            takes what suits the task's cores.
        autocast: compute in float16 on a GPU; False computes in float32 everywhere.
        precision: ``float32``, ``float16`` or ``bfloat16`` on any device, whatever
            ``autocast`` says.
    """

    def __init__(
        self,
        model_name: str,
        transform: Transform,
        mean: Sequence[float],
        std: Sequence[float],
        pred_column: str | None = None,
        pred_type: Any = float,
        *,
        batch_size: int | None = None,
        num_threads_per_worker: int | None = None,
        autocast: bool = True,
        precision: Precision | None = None,
        model_path: str | None = None,
        models_dir: str | None = None,
    ) -> None:
        super().__init__(model_name, pred_column, pred_type, batch_size, model_path, models_dir)
        check_speed(batch_size, num_threads_per_worker, precision)
        self.num_threads_per_worker = num_threads_per_worker
        self.autocast = autocast
        self.precision = precision
        self._transform = transform
        self._mean, self._std = tuple(mean), tuple(std)
        self._settled: dict[str | None, PixelClassifier] = {}

    def load_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Load the network, ready to score, on ``device``.

        It takes normalised pixels, float (N, 3, S, S) of `precision_on` the device, and gives
        (N,) or (N, K). A `torch.nn.Module` in eval mode will do; it is brought to that
        precision.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load_model")

    @property
    def transform(self) -> Transform:
        """How an image becomes the pixels that the model takes."""
        return self._transform

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the pixels, per RGB channel, on a scale of 0 to 1."""
        return self._mean, self._std

    def ready(self, device: str | None = None) -> PixelClassifier:
        """A copy whose weights are found, tried, and known by their sha256; made once.

        Every worker checks its own copy of the file against that sha256.

        Args:
            device: a torch device; settles the precision that it computes in there. None
                leaves that to each worker.

        Raises:
            WeightsError: its file cannot be had or used.
        """
        if device not in self._settled:
            settled = copy.copy(self)
            settled._models, settled._settled = {}, {}
            if device is not None:
                settled.precision = self.precision_on(device)
            if not self._is_ready:
                settled._settle()
                settled._is_ready = True
            self._settled[device] = settled
        return self._settled[device]

    def _settle(self) -> None:
        """Find its weights, and try whether they fit."""
        self._sha256 = self.weights_sha256()
        if self._sha256 is not None:
            self.load_model("cpu")

    def precision_on(self, device: str) -> Precision:
        """The precision it computes in on a device."""
        return precision_on(device, self.precision, self.autocast)

    def describe(self) -> dict[str, Any]:
        """What tells this detector from another, preprocessing included."""
        described = super().describe()
        described.pop("autocast", None)
        described["precision"] = self.precision or ("autocast" if self.autocast else "float32")
        described["preprocessing"] = f"{self.transform}, mean {self._mean}, std {self._std}"
        return described

    def _loaded(self, device: str) -> Tower:
        """uint8 (N, S, S, 3) → float32 (N, K)."""
        compute_exactly(device)
        network = self.load_model(device)
        precision = getattr(torch, self.precision_on(device))
        tower = Tower(network, *self.statistics, precision, False, self.model_name)
        return tower.eval().requires_grad_(False).to(device)

    def score(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score uint8 (N, S, S, 3) → float32 (N,) or (N, K), on the pixels' device."""
        return self._checked(self.model(str(pixels.device))(pixels), len(pixels))

    def classify(
        self, images: Sequence[bytes], device: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Score encoded images.

        Args:
            images: N files' bytes.
            device: a torch device; by default the GPU if there is one.

        Returns:
            What the model gives: float32 (N,) or (N, K).

        Raises:
            InputError: one of them is not bytes.
            ImageError: one of them cannot be decoded, which one is said;
                `spark_nsfw.Scorer` gives such images a row with a status instead.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        ready = self.ready(device)
        scores = []
        step = batch_size_on(device, self.batch_size)
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            pixels = torch.from_numpy(decode_batch(batch, ready.transform, start))
            with torch.inference_mode():
                scores.append(ready.score(pixels.to(device)).cpu())
        return torch.cat(scores).numpy() if scores else np.zeros(0, np.float32)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_settled": {}}
