"""Direct: every rank sends its part of chunk c straight to rank c, which sums and sends the sum to everybody.

All-reduce: 2n(n - 1) messages of p/n elements; 2a + 2(n - 1)/n * p/B where nothing blocks: as few bytes as the
ring and only two latencies, but every pair of ranks talks at once (Thakur, Rabenseifner and Gropp, "Optimization
of collective communication operations in MPICH", Int. J. High Perform. Comput. Appl. 19, 2005: the pairwise
exchange of long messages, without its rounds). Reduce-scatter and all-gather are half of it each; broadcast
scatters the root's array and then gathers it everywhere, reduce reduce-scatters and gathers at the root.

Personalised all-to-all: n(n - 1) messages of p/n elements in n - 1 rounds; in round k, rank r sends to rank r +
k, so that every rank has one sender and one receiver at a time. a + (n - 1)/n * p/B if nothing holds them back.
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.recipe import Recipe, Rows, Symmetry, chosen, joined
from distsim.schedule import Ints, Op, Source


def all_reduce(workers: int) -> Recipe:
    """Reduce-scatter at step 0, all-gather at step 1."""
    return _recipe(workers, scatter=True, gather=True)


def reduce_scatter(workers: int) -> Recipe:
    """Every rank sends its part of chunk c to rank c."""
    return _recipe(workers, scatter=True, gather=False)


def all_gather(workers: int) -> Recipe:
    """Every rank sends its chunk to everybody."""
    return _recipe(workers, scatter=False, gather=True)


def _recipe(workers: int, scatter: bool, gather: bool) -> Recipe:
    def rows(src: Ints) -> Rows:
        among = within(workers, src, scatter, gather)
        return among._replace(src=src[among.src])

    return Recipe(chunks=workers, rows=rows, symmetry=Symmetry(kind="rotation", workers=workers))


def broadcast(workers: int) -> Recipe:
    """The root, rank 0, sends chunk c to rank c; then each sends its chunk to all but the root."""

    def rows(src: Ints) -> Rows:
        to = _others(workers, src)
        root = src[src == 0]
        scatter = Rows(0, root, _others(workers, root), _others(workers, root), Op.COPY)
        return joined([scatter, chosen(Rows(1, src, to, src, Op.COPY), to != 0)])

    return Recipe(chunks=workers, rows=rows)


def reduce(workers: int) -> Recipe:
    """Every rank sends its part of chunk c to rank c; then each sends its sum to the root, rank 0."""

    def rows(src: Ints) -> Rows:
        to, away = _others(workers, src), src[src != 0]
        return joined([Rows(0, src, to, to, Op.REDUCE), Rows(1, away, 0, away, Op.COPY)])

    return Recipe(chunks=workers, rows=rows)


def personalised_all_to_all(workers: int) -> Recipe:
    """At step k - 1, rank r sends its part for rank r + k there."""

    def rows(src: Ints) -> Rows:
        shift, to = np.arange(1, workers, dtype=np.int32)[:, None], _others(workers, src)
        return Rows(shift - 1, src, to, src * workers + to, Op.COPY, Source.INPUT)

    return Recipe(chunks=workers * workers, rows=rows)


def steps(n: int, scatter: bool, gather: bool) -> int:
    """Number of steps of `within` for n positions."""
    return scatter + gather if n > 1 else 0


def within(n: int, position: Ints, scatter: bool, gather: bool) -> Rows:
    """Reduce-scatter, all-gather or both in a group of n positions, each in one step."""
    at, to = np.arange(len(position), dtype=np.int32), _others(n, position)
    first = Rows(0, at, to, to, Op.REDUCE)
    second = Rows(int(scatter), at, to, position, Op.COPY)
    if scatter and gather:
        return joined([first, second])
    return first if scatter else second


def _others(n: int, rank: Ints) -> Ints:
    """All other ranks, by shifts, so that neighbouring rows never meet at a receiver; shape (n - 1, len(rank))."""
    return np.asarray((rank + np.arange(1, n, dtype=np.int32)[:, None]) % n)
