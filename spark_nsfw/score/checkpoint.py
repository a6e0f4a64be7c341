"""Checkpoint file → tensors by name.

Nothing here executes what a file says: tensors come from safetensors, from
``torch.load(weights_only=True)``, or from TorchScript's own reader, which
OpenAI's files need.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spark_nsfw.errors import WeightsError, WeightsMismatchError

__all__ = ["check_fit", "load_state_dict"]


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name, on the CPU.

    Reads safetensors, PyTorch's zip and legacy formats and TorchScript archives;
    nested ``state_dict`` and ``model`` entries are opened.

    Raises:
        WeightsError: the file is none of these, or damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if head[:2] == b"PK" and _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the format is deprecated; OpenAI's files stay
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:  # torch would advise to run what is in the file
        raise WeightsError(
            f"{path} is no checkpoint of tensors: neither safetensors nor PyTorch's nor "
            "TorchScript's format, or damaged, or with objects that are not tensors"
        ) from exc
    except Exception as exc:  # each reader has its own exceptions for a damaged file
        raise WeightsError(f"{path} cannot be read as a checkpoint: {exc}") from exc
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds no tensors by name, but a {type(loaded).__name__}")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors")
    return tensors


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def check_fit(
    source: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors that do not fit a network in name and shape, one by one.

    Raises:
        WeightsMismatchError: names every tensor that is missing, unknown or of another shape.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unknown {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if problems:
        listed = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsMismatchError(f"{source} does not fit the network: {listed}{more}")
