"""Networks that OpenVINO computes instead of torch, on a CPU (extra ``openvino``)."""

from __future__ import annotations

import threading
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from spark_nsfw.errors import InputError
from spark_nsfw.score.tower import CPU_BLOCK_IMAGES, Precision

__all__ = ["OpenVinoNetwork", "refuse_openvino"]

#: What OpenVINO calls the precisions that it is as exact in as torch.
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def refuse_openvino(precision: Precision) -> None:
    """Refuse the engine where it is not installed, and a precision that it does not have.

    Raises:
        InputError: says how to install it, or what to give.
    """
    if precision not in _PRECISIONS:
        raise InputError(
            f"--engine openvino (engine) computes in {' or '.join(_PRECISIONS)}, not {precision}: "
            "give another --precision, or --engine torch"
        )
    if find_spec("openvino") is None:
        raise InputError(
            "--engine openvino (engine): OpenVINO is not installed here; "
            "pip install 'spark-nsfw[openvino]'"
        )


def _converted(network: nn.Module, shape: tuple[int, ...]) -> Any:
    """OpenVINO's model of a network, for one shape of its input.

    By its front end for PyTorch: `openvino.convert_model` would do, but reports its use to Intel.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: that shapes are fixed, which they are
        traced = torch.jit.trace(network, torch.zeros(shape), check_trace=False)
        decoder = TorchScriptPythonDecoder(traced)  # in use as long as there is no model
        front_end = FrontEndManager().load_by_framework("pytorch")
        model = front_end.convert(front_end.load(decoder))
    model.reshape(list(shape))
    return model


class OpenVinoNetwork:
    """A network, compiled for this CPU and for blocks of eight images.

    It may be called by as many threads at a time as torch computes with; each call takes one
    core. Its results do not depend on how many there are.

    Args:
        network: on the CPU, in eval mode, float32; (8, 3, S, S) → (8, D).
        image_size: S, in pixels.
        precision: that it computes in.

    Raises:
        InputError: OpenVINO is not installed, or does not compute in that precision.
    """

    def __init__(self, network: nn.Module, image_size: int, precision: Precision) -> None:
        refuse_openvino(precision)
        import openvino

        self._shape = (CPU_BLOCK_IMAGES, 3, image_size, image_size)
        num_threads = torch.get_num_threads()
        self._compiled: Any = openvino.Core().compile_model(
            _converted(network, self._shape),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
                "NUM_STREAMS": num_threads,
                "INFERENCE_NUM_THREADS": num_threads,
                # Every worker would take the machine's first cores for itself.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._requests = threading.local()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels, float (8, 3, S, S) → float32 (8, D)."""
        if tuple(pixels.shape) != self._shape:
            raise ValueError(f"pixels are {tuple(pixels.shape)}, not {self._shape}")
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._compiled.create_infer_request()
        given = request.infer([pixels.to(torch.float32).numpy()])[0]
        return torch.from_numpy(np.array(given, np.float32))  # the request's memory is used again
