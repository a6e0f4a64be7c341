"""Results of some rows → Arrow columns of all rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["embedding_array", "spread"]


def spread(values: pa.Array, present: npt.NDArray[np.bool_]) -> pa.Array:
    """Values (K,) on the K rows of N that are present; null on the others."""
    if present.all():
        return values
    positions = np.cumsum(present) - 1
    return values.take(pa.array(positions, pa.int64(), mask=~present))


def embedding_array(
    embeddings: npt.NDArray[np.float32], present: npt.NDArray[np.bool_]
) -> pa.ListArray:
    """float32 (K, D) and bool (N,) with K True → list array of N, null where not present."""
    lengths = np.where(present, embeddings.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(embeddings.reshape(-1)), mask=pa.array(~present)
    )
