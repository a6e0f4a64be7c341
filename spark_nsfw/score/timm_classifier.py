"""timm's classification models: pixels → the probability of some labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from spark_nsfw.errors import InputError, WeightsError
from spark_nsfw.score.checkpoint import check_fit, load_state_dict
from spark_nsfw.score.download import Weights, file_sha256, local_file, repository_file
from spark_nsfw.score.pixel_classifier import PixelClassifier
from spark_nsfw.score.pixels import Decode, Transform
from spark_nsfw.score.tower import Precision
from spark_nsfw.storage import absolute

__all__ = ["SHORT_NAMES", "TimmImageClassifier"]

_HUB = "hf-hub:"


@dataclass(frozen=True)
class _Network:
    """What a repository of the hub says of its model.

    Attributes:
        architecture: timm's name.
        label_names: of the outputs, in order.
        data: timm's data config: ``input_size``, ``mean``, ``std``, ``interpolation``,
            ``crop_pct``, ``crop_mode``; what is left out is timm's own for the architecture.
        arguments: further ones of `timm.create_model`.
    """

    architecture: str
    label_names: tuple[str, ...]
    data: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    def create(self) -> nn.Module:
        """The network, with random weights."""
        network: nn.Module = timm.create_model(
            self.architecture, **{**self.arguments, "num_classes": len(self.label_names)}
        )
        return network


#: What ``--detector`` calls the models that are known here.
SHORT_NAMES = {
    "marqo": "hf-hub:Marqo/nsfw-image-detection-384",
    "freepik": "hf-hub:Freepik/nsfw_image_detector",
}

#: Detectors that need no look at the hub to be described, with the labels that mean NSFW.
_KNOWN = {
    SHORT_NAMES["marqo"]: (
        _Network(
            "vit_tiny_patch16_384",
            ("NSFW", "SFW"),
            {
                "input_size": (3, 384, 384),
                "mean": (0.5, 0.5, 0.5),
                "std": (0.5, 0.5, 0.5),
                "interpolation": "bicubic",
                "crop_pct": 1.0,
            },
        ),
        ("NSFW",),
    ),
    SHORT_NAMES["freepik"]: (
        _Network("eva02_base_patch14_448", ("neutral", "low", "medium", "high"), {}),
        ("medium", "high"),
    ),
}


class TimmImageClassifier(PixelClassifier):
    """Any of timm's classification models: the softmax of its NSFW labels, 0 to 1.

    Preprocessing is timm's own for the model. Two detectors are known with their labels:
    ``hf-hub:Marqo/nsfw-image-detection-384`` (``NSFW``) and
    ``hf-hub:Freepik/nsfw_image_detector`` (``medium`` and ``high``).

    Args:
        model_name: ``hf-hub:OWNER/NAME`` of a timm model on the hub, or the name of a timm
            architecture, which needs ``model_path`` and ``label_names``.
        label: the label, or labels, whose probability is the score.
        label_names: of the model's outputs, in order; None takes the hub's.
        pred_column: the column that the scores go to; None makes one of the model's name.
        batch_size: images per forward pass, where no embedder says; None takes what suits
            the device.
        num_threads_per_worker: threads that decode images, where no embedder says; None
            takes what suits the task's cores.
        model_path: its ``model.safetensors`` or PyTorch file, a path or URL; None takes the
            hub's, downloaded once.
        autocast: compute in float16 on a GPU; False computes in float32 everywhere.
        precision: ``float32``, ``float16`` or ``bfloat16`` on any device.
        decode: ``exact`` gives pillow's pixels bit for bit, ``fast`` comes close to them.

    Raises:
        InputError: an unknown architecture or label; or labels that nobody has named.
    """

    def __init__(
        self,
        model_name: str,
        label: str | Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        pred_column: str | None = None,
        batch_size: int | None = None,
        num_threads_per_worker: int | None = None,
        model_path: str | None = None,
        autocast: bool = True,
        precision: Precision | None = None,
        decode: Decode = "fast",
    ) -> None:
        known, known_label = _KNOWN.get(model_name, (None, None))
        labels = known_label if label is None else (label,) if isinstance(label, str) else label
        super().__init__(
            model_name,
            Transform(1),  # `transform` knows better
            (0.0,),
            (1.0,),
            pred_column or _column_of(model_name),
            batch_size=batch_size,
            num_threads_per_worker=num_threads_per_worker,
            autocast=autocast,
            precision=precision,
            model_path=model_path,
        )
        self.decode: Decode = decode
        self._network = known
        self._config: dict[str, Any] | None = None
        self._label_names = None if label_names is None else tuple(label_names)
        if not model_name.startswith(_HUB):
            if not timm.is_model(model_name):
                raise InputError(
                    f"timm has no model {model_name!r}; a model of the hub is named "
                    "hf-hub:OWNER/NAME"
                )
            if model_path is None:
                raise InputError(f"{model_name} is an architecture: give its weights (model_path)")
            self._network = _Network(model_name, (), {})
        if self._label_names is not None and self._network is not None:
            self._network = replace(self._network, label_names=self._label_names)
        if not labels:
            raise InputError(
                f"{model_name}: say which label means NSFW, such as label='nsfw'"
                + (f"; it has {', '.join(self._network.label_names)}" if self._network else "")
            )
        self.labels = tuple(labels)
        if self._network is not None:
            self._refuse_unknown_labels(self._network)

    def _refuse_unknown_labels(self, network: _Network) -> None:
        named = network.label_names
        if len({*named}) < len(named) or len({*self.labels}) < len(self.labels):
            raise InputError(f"{self.model_name}: a label is named twice")
        if len(named) == 1:
            raise InputError(
                f"{self.model_name} has one label, {named[0]!r}, and its softmax is always 1: "
                "write a PixelClassifier for it"
            )
        unknown = [label for label in self.labels if label not in network.label_names]
        if unknown:
            raise InputError(
                f"{self.model_name} has no label {', '.join(map(repr, unknown))}; its labels are "
                f"{', '.join(map(repr, network.label_names)) or 'not named: give label_names'}"
            )

    @property
    def network(self) -> _Network:
        """Architecture, labels and data config; the hub's are known once it is `ready`.

        Raises:
            InputError: it is not `ready`.
        """
        if self._network is None:
            raise InputError(f"{self.model_name} is not ready: nothing is known of it yet")
        return self._network

    @property
    def _data_config(self) -> dict[str, Any]:
        if self._config is None:
            with torch.device("meta"):
                shape = self.network.create()
            data = dict(self.network.data)
            self._config = dict(timm.data.resolve_data_config(data, model=shape))
        return self._config

    @property
    def transform(self) -> Transform:
        """Timm's preprocessing of the model's evaluation, up to normalisation.

        Raises:
            InputError: it takes images that are not square, or a transform that is not
                supported here.
        """
        config = self._data_config
        _, height, width = config["input_size"]
        crop_mode, interpolation = config.get("crop_mode") or "center", config["interpolation"]
        if height != width or crop_mode not in ("center", "squash"):
            raise InputError(
                f"{self.model_name} takes {width} x {height} pixels by {crop_mode!r}: only squares "
                "by 'center' or 'squash' are supported"
            )
        if interpolation not in ("bicubic", "bilinear"):
            raise InputError(f"{self.model_name} resizes by {interpolation!r}: not supported")
        return Transform(
            width,
            resize=math.floor(width / config["crop_pct"]),
            squash=crop_mode == "squash",
            interpolation=interpolation,
            rgb_first=True,
            decode=self.decode,
        )

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the pixels, per RGB channel, on a scale of 0 to 1."""
        config = self._data_config
        return tuple(config["mean"]), tuple(config["std"])

    @property
    def weights(self) -> Weights:
        """Which weights the model has; their sha256 is known once it is `ready`."""
        return Weights(self.model_path or self.model_name, self._sha256)

    def weights_file(self) -> Path:
        """The file of its weights, fetched if it must be and checked.

        Raises:
            WeightsUnavailableError: it cannot be had.
            ChecksumError: it is not the one that was settled.
        """
        if self.model_path is not None:
            return local_file(self.model_path, self._sha256)
        path = repository_file(
            self.model_name.removeprefix(_HUB),
            ["model.safetensors", "pytorch_model.bin"],
            f"the weights of {self.model_name}",
            f"{self._option} (model_path)",
        )
        return local_file(path, self._sha256)

    @property
    def _option(self) -> str:
        """What names its file on the command line."""
        for short, model_name in SHORT_NAMES.items():
            if model_name == self.model_name:
                return f"--detector {short}=FILE"
        return f"--detector {self.model_name}@{'+'.join(self.labels)}=FILE"

    def _settle(self) -> None:
        if self._network is None:
            self._network = self._hub_network()
            if self._label_names is not None:
                self._network = replace(self._network, label_names=self._label_names)
            self._refuse_unknown_labels(self._network)
        self._sha256 = file_sha256(self.weights_file())
        self.load_model("cpu")  # so that a file that does not fit is refused now

    def _hub_network(self) -> _Network:
        """What ``config.json`` says, of the repository or beside ``model_path``.

        Raises:
            WeightsError: it cannot be had, or is not timm's.
        """
        if self.model_path is not None:
            path = str(local_file(absolute(self.model_path).rpartition("/")[0] + "/config.json"))
        else:
            path = repository_file(
                self.model_name.removeprefix(_HUB),
                ["config.json"],
                f"the configuration of {self.model_name}",
                f"{self._option} (model_path), with config.json beside FILE",
            )
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
            data = config.get("pretrained_cfg", config)
            names = (
                config.get("label_names") or data.get("label_names") or config.get("labels") or ()
            )
            wanted = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
            return _Network(
                config["architecture"],
                tuple(names),
                {key: data[key] for key in wanted if key in data},
                dict(config.get("model_args") or {}),
            )
        except (ValueError, KeyError, AttributeError) as exc:
            raise WeightsError(f"{path} is not the configuration of a timm model: {exc!r}") from exc

    def describe(self) -> dict[str, Any]:
        """Model, labels, weights and preprocessing; the hub's are known once it is `ready`."""
        described: dict[str, Any] = {
            "classifier": type(self).__qualname__,
            "pred_column": self.pred_column,
            "model_name": self.model_name,
            "labels": list(self.labels),
            "precision": self.precision or ("autocast" if self.autocast else "float32"),
            "weights": {"source": self.weights.source, "sha256": self.weights.sha256},
        }
        if self._network is not None:
            described["architecture"] = [self._network.architecture, self._network.arguments]
            described["label_names"] = list(self._network.label_names)
            mean, std = self.statistics
            described["preprocessing"] = f"{self.transform}, mean {mean}, std {std}"
        return described

    def load_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network and the softmax of its labels: (N, 3, S, S) → float32 (N,).

        Raises:
            WeightsError: the file cannot be had, or does not fit.
        """
        network, path = self.network, self.weights_file()
        names = network.label_names
        model = network.create()
        tensors = load_state_dict(path)
        check_fit(str(path), tensors, model.state_dict())
        model.load_state_dict(tensors)
        return _LabelProbability(model, [names.index(label) for label in self.labels]).eval()


class _LabelProbability(nn.Module):
    """A network's logits → the probability that one of some labels is the right one."""

    def __init__(self, network: nn.Module, positions: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.positions = list(positions)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(pixels)
        return logits.to(torch.float32).softmax(dim=1)[:, self.positions].sum(dim=1)


def _column_of(model_name: str) -> str:
    """``hf-hub:Marqo/nsfw-image-detection-384`` → ``marqo_nsfw_image_detection_384_score``."""
    name = model_name.removeprefix(_HUB).lower()
    return "".join(c if c.isalnum() else "_" for c in name) + "_score"
