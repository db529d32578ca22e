"""Where the samples of a micro-batch are in a tensor of the full batch.

Shapes tell, and values where these leave a choice. Batches may come first (B, ...), elsewhere (T, B, ...), or flattened
with another dimension, (B*T, ...) or (T*B, ...); micro-batches may be padded to a smaller length than the full batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MOST_PRODUCTS = 2**28
"""Subtractions that looking for one tensor's rows in another one may cost."""

Kind = Literal["samples", "same", "shorter", "pairs", "rows"]


class Cut(NamedTuple):
    """A way to cut out of a tensor of the full batch what a micro-batch has."""

    kind: Kind
    """The tensor has a batch dimension; none; none, and less padding; two of them, for pairs of samples; rows that the
    full batch has somewhere."""
    take: Callable[[Tensor], Tensor]
    padded: bool = False
    """The full batch has more padding."""
    layout: tuple[int, bool] | None = None
    """Of samples: the dimension, and whether each one's numbers are next to one another in it."""
    rows: Tensor | None = None
    """Which rows of the full batch's."""


WHOLE = Cut("same", lambda full: full)


def slice_of(full: Tensor, shape: Sequence[int], samples: int, first: int, count: int) -> Tensor | None:
    """Return samples `first` to `first + count - 1`, of `samples`, of a tensor of the full batch, in this shape.

    Padding is cut off at the end. A tensor without a batch dimension is returned whole. None where shapes do not tell,
    as for tensors whose size depends on the data.
    """
    return next((cut.take(full) for cut in cuts(full.shape, shape, samples, first, count)), None)


def cuts(full: Sequence[int], shape: Sequence[int], samples: int, first: int, count: int) -> list[Cut]:
    """Return all ways to cut a tensor of `shape` out of the full batch's, the likeliest ones first."""
    if len(full) != len(shape) or any(short > long for long, short in zip(full, shape, strict=True)):
        return []
    shares = {dim: (full[dim] // samples, shape[dim] // count) for dim in range(len(shape))}
    fitting = [
        dim
        for dim, (long, short) in shares.items()
        if full[dim] == long * samples and shape[dim] == short * count and 1 <= short <= long
    ]
    # Dimensions that keep their share come before padded ones, leading ones before others.
    fitting.sort(key=lambda dim: (shares[dim][0] != shares[dim][1], dim))
    found = [cut for dim in fitting for cut in _along(dim, *shares[dim], tuple(full), tuple(shape), samples, first)]
    single = [dim for dim in sorted(fitting) if shares[dim] == (1, 1) and count < samples]
    for dim, other in combinations(single, 2):
        found.append(Cut("pairs", partial(_both, dims=(dim, other), first=first, shape=shape)))
    if tuple(full) == tuple(shape):
        found.append(WHOLE)
    else:
        rows = torch.arange(shape[0]) if tuple(full[1:]) == tuple(shape[1:]) else None
        found.append(Cut("shorter", partial(_shorter, shape=shape), padded=True, rows=rows))
    return found


def _along(
    dim: int, long: int, short: int, full: tuple[int, ...], shape: tuple[int, ...], samples: int, first: int
) -> Iterator[Cut]:
    """Yield ways to cut along one dimension, which has `long` numbers of each sample: next to one another, or not."""
    count = shape[dim] // short
    padded = full[:dim] + full[dim + 1 :] != shape[:dim] + shape[dim + 1 :] or long != short

    def outermost(tensor: Tensor) -> Tensor:
        parts = tensor.reshape(*full[:dim], samples, long, *full[dim + 1 :])
        return _shorter(parts.narrow(dim, first, count).narrow(dim + 1, 0, short).flatten(dim, dim + 1), shape)

    def innermost(tensor: Tensor) -> Tensor:
        parts = tensor.reshape(*full[:dim], long, samples, *full[dim + 1 :])
        return _shorter(parts.narrow(dim, 0, short).narrow(dim + 1, first, count).flatten(dim, dim + 1), shape)

    yield Cut("samples", outermost, padded, (dim, True))
    if long > 1:
        yield Cut("samples", innermost, padded, (dim, False))


def _both(tensor: Tensor, dims: tuple[int, int], first: int, shape: Sequence[int]) -> Tensor:
    for dim in dims:
        tensor = tensor.narrow(dim, first, shape[dim])
    return _shorter(tensor, shape)


def _shorter(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def rows(index: Tensor) -> Cut:
    """Return the cut that takes rows one by one."""
    return Cut("rows", lambda full: full[index], rows=index)


def matching_rows(full: Tensor, tensor: Tensor, limit: float) -> Tensor | None:
    """Return which rows of `full` a tensor's rows are, together within `limit` as a norm, or None if they are not.

    So what is gathered from a batch is found, as the tokens of an expert, or what is sorted. A row that could be two of
    `full`, or is all zeros (of a dropout, say), tells nothing: None.
    """
    if tensor.dim() < 2 or full.shape[1:] != tensor.shape[1:] or not len(tensor) <= len(full):
        return None
    if len(full) * tensor.numel() > MOST_PRODUCTS:
        return None
    if not bool((tensor != 0).flatten(1).any(dim=1).all()):
        return None
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(tensor.flatten(1), full.flatten(1), compute_mode=exact)
    nearest, index = distances.min(dim=1)
    if not float(torch.linalg.vector_norm(nearest)) <= limit or bool(((distances <= limit).sum(dim=1) > 1).any()):
        return None
    return index
