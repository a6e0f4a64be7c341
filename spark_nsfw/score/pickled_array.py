"""A pickled numpy array → the array, without executing the pickle.

Not even numpy's own functions are called while it is read: stand-ins note what they are
told, and the array is built from the bytes that are left.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spark_nsfw.errors import WeightsError

__all__ = ["is_pickle", "read_pickled_array"]

_FLOATS = ("f2", "f4", "f8")


def is_pickle(path: str | Path) -> bool:
    """Whether a file begins as pickles do, of protocol 2 or later.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5  # then comes the protocol


def read_pickled_array(path: str | Path) -> npt.NDArray[Any]:
    """The array of floats that a pickle holds, and nothing else.

    Raises:
        WeightsError: it holds anything else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            loaded = _Unpickler(file).load()
        if not isinstance(loaded, _Array):
            raise ValueError(f"it is a {type(loaded).__name__}")
        return loaded.build()
    except Exception as exc:  # a damaged pickle can fail in any way
        raise WeightsError(f"{path} is not a pickle of one numpy array of floats: {exc}") from exc


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, kind: str, *_: Any) -> None:
        self.kind = kind
        self.byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]


class _Array:
    """Stands in for a `numpy.ndarray` that is being rebuilt."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def build(self) -> npt.NDArray[Any]:
        _, shape, dtype, is_column_major, content = self.state
        if not isinstance(dtype, _Dtype) or dtype.kind not in _FLOATS:
            raise ValueError("its values are not floats")
        values = np.frombuffer(content, np.dtype(dtype.byte_order + dtype.kind))
        return values.reshape(shape, order="F" if is_column_major else "C")


#: All that the pickle of an array names; numpy 2 has moved its module.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    """Knows numpy's array and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is never called")
        return _STAND_INS[module, name]
