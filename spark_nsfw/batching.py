"""Rows of a batch, shaped so that a row's result does not depend on its neighbours.

A CPU's BLAS takes other kernels for other numbers of rows, and they add up in another
order, which changes the last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["in_blocks", "pad_rows"]


def pad_rows(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Fill up with zeros to a multiple: (N, …) → (M, …), M ≥ N."""
    missing = -len(rows) % multiple
    if not missing:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def in_blocks(
    model: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, block: int
) -> torch.Tensor:
    """Apply a model to blocks of exactly ``block`` rows: (N, …) → (N, …)."""
    results = [model(piece) for piece in pad_rows(rows, block).split(block)]
    return torch.cat(results)[: len(rows)] if results else rows.new_zeros(0)
