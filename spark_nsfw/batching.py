"""Rows of a batch, made so that a row's result does not depend on its neighbours."""

from __future__ import annotations

import torch

__all__ = ["ROW_MULTIPLE", "pad_rows"]

#: With fewer rows than this, or a remainder, a CPU's BLAS takes other kernels, which add
#: up in another order and so change the last bits.
ROW_MULTIPLE = 8


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """Fill up with zeros to a multiple of `ROW_MULTIPLE`: (N, …) → (M, …), M ≥ N."""
    missing = -len(rows) % ROW_MULTIPLE
    if not missing:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
