"""Norms of tensors that may have infinities in them, as masked logits have."""

from __future__ import annotations

import torch
from torch import Tensor


def difference(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference, to which equal infinities and NaNs in the same place add nothing."""
    same = (one == other) | (one.isnan() & other.isnan())
    return float(torch.linalg.vector_norm((one - other).masked_fill(same, 0.0)))


def norm(tensor: Tensor) -> float:
    """Return the norm of what is finite."""
    return float(torch.linalg.vector_norm(tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)))
