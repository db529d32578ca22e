"""Ring: reduce-scatter, then all-gather, around a ring of ranks.

All-reduce: n * 2(n - 1) messages of p/n elements; 2(n - 1) (a + p/n/B) on links of latency a and bandwidth B.
Each rank sends 2(n - 1)/n * p, the least that any all-reduce can send per rank (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel Distrib. Comput. 69, 2009).
Reduce-scatter and all-gather are half of it each.

With `channels` the array is cut into as many blocks, each of which goes around a ring of its own; with
`bidirectional` each channel is a pair of rings, one each way. With `node` (ranks per node) channel j enters
and leaves each node j ranks further on, so that the channels use different network adapters, as NCCL's do.
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.recipe import Recipe, Rows, Symmetry, divides
from distsim.schedule import Ints, Op


def all_reduce(workers: int, *, channels: int = 1, bidirectional: bool = False, node: int = 1) -> Recipe:
    """At step s, rank r passes chunk r - s (mod n) on to rank r + 1."""
    return _recipe(workers, range(2 * (workers - 1)), 0, channels, bidirectional, node)


def reduce_scatter(workers: int, *, channels: int = 1, bidirectional: bool = False, node: int = 1) -> Recipe:
    """At step s, rank r passes chunk r - 1 - s (mod n) on to rank r + 1, so that chunk c ends at rank c."""
    return _recipe(workers, range(workers - 1), 1, channels, bidirectional, node)


def all_gather(workers: int, *, channels: int = 1, bidirectional: bool = False, node: int = 1) -> Recipe:
    """At step s, rank r passes chunk r - s (mod n) on to rank r + 1: its own first."""
    return _recipe(workers, range(workers - 1, 2 * (workers - 1)), 1, channels, bidirectional, node)


def _recipe(workers: int, laps: range, behind: int, channels: int, bidirectional: bool, node: int) -> Recipe:
    """Part of two laps, of which the first reduces; at lap step s, rank r passes on chunk r - s - behind."""
    divides("node", node, workers)
    rings = channels * (1 + bidirectional)

    def rows(src: Ints) -> Rows:
        step = np.arange(laps.start, laps.stop, dtype=np.int32)[:, None, None]
        ring = np.arange(rings, dtype=np.int32)[:, None]
        turn, way = (ring // 2, 1 - ring % 2 * 2) if bidirectional else (ring, np.int32(1))
        position = _turned(src, -turn, node)
        passed = (position - way * (step + behind)) % workers
        return Rows(
            step=step - laps.start,
            src=src,
            dst=_turned((position + way) % workers, turn, node),
            chunk=ring * workers + _turned(passed, turn, node),
            op=np.where(step < workers - 1, np.int8(Op.REDUCE), np.int8(Op.COPY)),
        )

    return Recipe(chunks=rings * workers, rows=rows, symmetry=Symmetry(kind="rotation", workers=workers, unit=node))


def _turned(rank: Ints, turn: Ints, node: int) -> Ints:
    """Move ranks on by `turn` inside their nodes."""
    if node == 1:
        return rank
    return np.asarray(rank - rank % node + (rank + turn) % node)


def steps(n: int, scatter: bool, gather: bool) -> int:
    """Number of steps of `within` for n positions."""
    return (n - 1) * (scatter + gather)


def within(n: int, position: Ints, scatter: bool, gather: bool) -> Rows:
    """Reduce-scatter, all-gather or both in a group of n positions, each in n - 1 steps from neighbour to neighbour."""
    step = np.arange(0 if scatter else n - 1, 2 * (n - 1) if gather else n - 1, dtype=np.int32)[:, None]
    return Rows(
        step=step if scatter else step - (n - 1),
        src=np.arange(len(position), dtype=np.int32),
        dst=(position + 1) % n,
        chunk=(position - 1 - step) % n,
        op=np.where(step < n - 1, np.int8(Op.REDUCE), np.int8(Op.COPY)),
    )
