"""A few tensors out of a large safetensors file, near or far, without reading the rest.

The format: 8 bytes length of the header, the header as JSON (name → dtype, shape and the
range of bytes behind the header), the tensors. https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import torch

from spark_nsfw.errors import InputError, WeightsError, WeightsUnavailableError
from spark_nsfw.storage import open_input, parts

__all__ = ["Header", "read_header", "read_tensors"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Longer headers are refused by the reference implementation, too.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: name → ``dtype``, ``shape`` and ``data_offsets``.
        metadata: texts that were written along.
        num_bytes: where the tensors begin.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    num_bytes: int


def read_header(url: str) -> Header:
    """The header of a safetensors file.

    Args:
        url: a path, any URL of `spark_nsfw.storage`, or ``http(s)``.

    Raises:
        WeightsUnavailableError: it cannot be read.
        WeightsError: it is not a safetensors file.
    """
    try:
        num_bytes = int.from_bytes(_read_range(url, 0, 8), "little")
        if num_bytes > _MAX_HEADER_BYTES:
            raise ValueError("no header at its start")
        tensors = json.loads(_read_range(url, 8, num_bytes))
        if not isinstance(tensors, dict) or not all(isinstance(t, dict) for t in tensors.values()):
            raise ValueError("its header lists no tensors")
        metadata = tensors.pop("__metadata__", {})
    except (ValueError, EOFError) as exc:
        raise WeightsError(f"{url} is not a safetensors file, or damaged: {exc}") from exc
    return Header(tensors, metadata, 8 + num_bytes)


def read_tensors(url: str, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Some tensors of a safetensors file, on the CPU, in the order of the names.

    Args:
        url: as for `read_header`.
        names: of tensors of floats.

    Raises:
        WeightsUnavailableError: it cannot be read.
        WeightsError: it is not a safetensors file, or has no such tensors.
    """
    header = read_header(url)
    missing = [name for name in names if name not in header.tensors]
    if missing:
        raise WeightsError(f"{url} has no {', '.join(missing)}")
    tensors = {}
    for name in names:
        try:
            entry = header.tensors[name]
            start, end = map(int, entry["data_offsets"])
            content = _read_range(url, header.num_bytes + start, end - start)
            flat = torch.frombuffer(bytearray(content), dtype=_DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(tuple(entry["shape"]))
        except (ValueError, KeyError, TypeError, RuntimeError, EOFError) as exc:
            raise WeightsError(f"{url}: tensor {name} cannot be read: {exc!r}") from exc
    return tensors


def _read_range(url: str, start: int, num_bytes: int) -> bytes:
    """Bytes of a file.

    Raises:
        WeightsUnavailableError: it cannot be read.
        EOFError: it ends before.
    """
    try:
        if parts(url)[0] in ("http", "https"):
            content = _http_range(url, start, num_bytes)
        else:
            with open_input(url, buffer_bytes=1 << 16) as stream:
                stream.seek(start)
                content = stream.read(num_bytes)
    except (OSError, HTTPException, InputError) as exc:
        raise WeightsUnavailableError(f"{url} cannot be read: {exc}") from exc
    if len(content) < num_bytes:
        raise EOFError(f"it ends before byte {start + num_bytes:,}")
    return content


def _http_range(url: str, start: int, num_bytes: int) -> bytes:
    wanted = {"Range": f"bytes={start}-{start + num_bytes - 1}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=wanted), timeout=60) as answer:
        if answer.status != 206:  # the whole file would come
            raise OSError("its server sends no ranges of bytes; download it, and give its path")
        return bytes(answer.read(num_bytes))
