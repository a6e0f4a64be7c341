"""What tells a model from another, in plain words: for provenance and for caches."""

from __future__ import annotations

import hashlib
import inspect
import pickle
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from spark_nsfw.errors import InputError

__all__ = ["code_sha256", "is_foreign", "public_attributes"]


#: Packages whose classes are nobody's own.
_NOT_OWN = {"spark_nsfw", "builtins", "typing", "abc", "torch", "timm"}


def is_foreign(model: object) -> bool:
    """Whether its class is a user's own."""
    return not type(model).__module__.startswith("spark_nsfw.")


def code_sha256(model: object) -> str | None:
    """The sha256 of the source of a user's own class, in hex; None if there is none to be had.

    Of the whole module, since a score may depend on its functions, and of those that hold the
    base classes; of the class alone where the module has no file, as in a notebook.
    """
    sources = []
    for kind in type(model).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in _NOT_OWN:
            continue
        for source_of in (sys.modules.get(kind.__module__), kind):
            try:
                sources.append(inspect.getsource(source_of))  # type: ignore[arg-type]
                break
            except (OSError, TypeError):  # it has no file, or is None
                continue
    if not sources:
        return None
    return hashlib.sha256("\0".join(dict.fromkeys(sources)).encode()).hexdigest()


def public_attributes(model: object, left_out: Collection[str]) -> dict[str, Any]:
    """The attributes of a model whose names do not begin with an underscore, as plain values.

    Raises:
        InputError: one is neither plain data nor can it be pickled.
    """
    attributes = {}
    for name, value in sorted(vars(model).items()):
        if name.startswith("_") or name in left_out:
            continue
        try:
            attributes[name] = _described(value)
        except Exception as exc:
            raise InputError(
                f"{type(model).__name__}.{name} cannot be told from another value ({exc}): "
                f"call it _{name} if no score depends on it, or define describe()"
            ) from exc
    return attributes


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
