"""Rows of a batch, shaped so that a row's result does not depend on its neighbours.

A CPU's BLAS takes other kernels for other numbers of rows, and they add up in another
order, which changes the last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["in_blocks"]


def in_blocks(
    model: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, block: int
) -> torch.Tensor:
    """Apply a model to blocks of exactly ``block`` rows, the last filled up with zeros.

    (N, …) → (N, …), N ≥ 1.
    """
    missing = -len(rows) % block
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
    # A model that squeezes gives a single row no axis at all.
    return torch.cat([torch.atleast_1d(model(p)) for p in padded.split(block)])[: len(rows)]
