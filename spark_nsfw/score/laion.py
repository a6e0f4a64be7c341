"""LAION's NSFW detectors: TensorFlow SavedModels in a zip, read without TensorFlow.

Source: https://github.com/LAION-AI/CLIP-based-NSFW-Detector (MIT licence). The two
archives are pinned by their sha256, so where each tensor starts is a constant.

AutoKeras took a few of the embedding's dimensions for categories. Such a value is
printed with six decimals, looked up in a vocabulary and replaced by its position
there (1 for the first, 0 for a value that is not listed).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spark_nsfw.errors import WeightsError

__all__ = ["DETECTORS", "Detector", "DetectorTensors", "read_detector"]


@dataclass(frozen=True)
class Detector:
    """One of LAION's archives.

    Attributes:
        clip_model: the timm tower whose embeddings it scores.
        file_name: name of the zip, also below `url`.
        sha256: of the zip, in hex.
        widths: of the embedding, the hidden layers and the score.
        offsets_bytes: where mean, variance, kernel 1, bias 1, kernel 2 … start.
        categories: dimension → graph node that holds its vocabulary.
    """

    clip_model: str
    file_name: str
    sha256: str
    widths: tuple[int, ...]
    offsets_bytes: tuple[int, ...]
    categories: dict[int, str]

    @property
    def url(self) -> str:
        """Where LAION publishes it."""
        return (
            "https://raw.githubusercontent.com/LAION-AI/CLIP-based-NSFW-Detector/main/"
            + self.file_name
        )


#: By width of the embedding.
DETECTORS = {
    768: Detector(
        clip_model="vit_large_patch14_clip_quickgelu_224.openai",
        file_name="clip_autokeras_binary_nsfw.zip",
        sha256="905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a",
        widths=(768, 64, 512, 256, 1),
        offsets_bytes=(
            0,
            3072,
            6152,
            202760,
            203016,
            334088,
            336136,
            860424,
            861448,
            862472,
        ),
        categories={
            180: "Const_12",
            316: "Const_14",
            413: "Const_16",
            440: "Const_18",
            644: "Const_20",
        },
    ),
    512: Detector(
        clip_model="vit_base_patch32_clip_quickgelu_224.openai",
        file_name="clip_autokeras_nsfw_b32.zip",
        sha256="78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b",
        widths=(512, 32, 32, 1),
        offsets_bytes=(0, 2048, 4104, 69640, 69768, 73864, 73992, 74120),
        categories={92: "Const_8", 133: "Const_10", 312: "Const_12"},
    ),
}


@dataclass(frozen=True)
class DetectorTensors:
    """What a detector's archive holds.

    Attributes:
        tensors: float32 by name: ``norm.mean`` and ``norm.variance`` (D,), then
            ``linear_1.weight`` (out, in), ``linear_1.bias`` (out,) and so on.
        vocabularies: dimension → int64 (V,), the codes of its listed values in order.
    """

    tensors: dict[str, npt.NDArray[np.float32]]
    vocabularies: dict[int, npt.NDArray[np.int64]]


def read_detector(path: str | Path, detector: Detector) -> DetectorTensors:
    """Read the archive of a detector.

    Raises:
        WeightsError: the zip lacks what it must hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2]: name for name in archive.namelist()}
            variables = archive.read(names["variables.data-00000-of-00001"])
            graph = archive.read(names["saved_model.pb"])
    except (zipfile.BadZipFile, KeyError, OSError) as exc:
        raise WeightsError(f"{path} is not LAION's archive of a detector: {exc}") from exc

    offsets = iter(detector.offsets_bytes)

    def next_tensor(*shape: int) -> npt.NDArray[np.float32]:
        count = int(np.prod(shape))
        return np.frombuffer(variables, "<f4", count, next(offsets)).reshape(shape)

    width = detector.widths[0]
    tensors = {"norm.mean": next_tensor(width), "norm.variance": next_tensor(width)}
    layers = zip(detector.widths, detector.widths[1:], strict=False)
    for number, (num_inputs, num_outputs) in enumerate(layers, start=1):
        kernel = next_tensor(num_inputs, num_outputs)
        tensors[f"linear_{number}.weight"] = np.ascontiguousarray(kernel.T)
        tensors[f"linear_{number}.bias"] = next_tensor(num_outputs)

    constants = dict(_string_constants(graph, set(detector.categories.values())))
    vocabularies = {
        dimension: np.array([_code_of_text(text) for text in constants[node]], np.int64)
        for dimension, node in detector.categories.items()
    }
    return DetectorTensors(tensors, vocabularies)


def _code_of_text(text: bytes) -> int:
    """A printed value as an integer: twice the millionths, plus the sign bit."""
    digits = text.decode("ascii")
    sign = digits.startswith("-")
    whole, _, decimals = digits.removeprefix("-").partition(".")
    millionths = int(whole) * 10**6 + int(decimals.ljust(6, "0"))
    return (-millionths if sign else millionths) * 2 + sign


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: (number, varint or bytes).

    Source: https://protobuf.dev/programming-guides/encoding/
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        tag = varint()
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[position : position + length]
        position += length


def _children(message: memoryview, number: int) -> Iterator[memoryview]:
    for found, value in _fields(message):
        if found == number and isinstance(value, memoryview):
            yield value


def _string_constants(graph: bytes, nodes: set[str]) -> Iterator[tuple[str, list[bytes]]]:
    """The string tensors of the named constant nodes of a SavedModel's graph.

    Field numbers are those of TensorFlow's saved_model, meta_graph, graph, node_def,
    attr_value and tensor .proto files.
    """
    for meta_graph in _children(memoryview(graph), 2):
        for graph_def in _children(meta_graph, 2):
            for node in _children(graph_def, 1):
                name = bytes(next(_children(node, 1))).decode()
                if name not in nodes:
                    continue
                for attribute in _children(node, 5):
                    if bytes(next(_children(attribute, 1))) != b"value":
                        continue
                    for value in _children(attribute, 2):
                        for tensor in _children(value, 8):
                            yield name, [bytes(text) for text in _children(tensor, 8)]
