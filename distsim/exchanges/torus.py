"""Torus, 2-D: reduce-scatter along rows, all-reduce along columns, all-gather along rows, all around rings.

With R rows of C ranks, rank r in row r // C: each rank sends only to its neighbours in its row and column, and
along columns only p/C. 2(C - 1) (a + p/C/B) + 2(R - 1) (a + p/n/B): latencies of about 4 sqrt(n) in place of the
ring's 2n (Mikami et al., "Massively distributed SGD: ImageNet/ResNet-50 training in a flash", arXiv:1811.05233,
2018). That is the hierarchical exchange with rings, and the rows as nodes.
"""

from __future__ import annotations

from math import isqrt

from distsim.exchanges import hierarchical
from distsim.exchanges.recipe import Recipe, divides


def all_reduce(workers: int, *, rows: int | None = None) -> Recipe:
    """Along rows, along columns, along rows."""
    return hierarchical.recipe(workers, _columns(workers, rows), "ring", "ring", scatter=True, gather=True)


def reduce_scatter(workers: int, *, rows: int | None = None) -> Recipe:
    """Along rows, then along columns."""
    return hierarchical.recipe(workers, _columns(workers, rows), "ring", "ring", scatter=True, gather=False)


def all_gather(workers: int, *, rows: int | None = None) -> Recipe:
    """Along columns, then along rows."""
    return hierarchical.recipe(workers, _columns(workers, rows), "ring", "ring", scatter=False, gather=True)


def _columns(workers: int, rows: int | None) -> int:
    """Length of a row; rows are the largest divisor up to the square root unless given (1 for primes)."""
    if rows is None:
        rows = next(number for number in range(isqrt(workers), 0, -1) if workers % number == 0)
    return workers // divides("rows", rows, workers)
