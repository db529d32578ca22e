"""Chain: rank 0 - 1 - 2 - ... passes the array on (broadcast) or adds to it (reduce).

n - 1 messages of p elements; (n - 1)(a + p/B). With k segments that follow each other: (n - 2 + k) rounds
of p/k elements, close to p/B for large arrays whatever n is (Pjesivac-Grbovic et al., "Performance analysis of
MPI collective operations", Cluster Computing 10, 2007, on pipelined chains).
"""

from __future__ import annotations

from distsim.exchanges.recipe import Recipe, Rows
from distsim.schedule import Ints, Op


def broadcast(workers: int) -> Recipe:
    """Rank r sends to rank r + 1 at step r."""

    def rows(src: Ints) -> Rows:
        giving = src[src < workers - 1]
        return Rows(giving, giving, giving + 1, 0, Op.COPY)

    return Recipe(chunks=1, rows=rows)


def reduce(workers: int) -> Recipe:
    """Rank r sends to rank r - 1 at step n - 1 - r."""

    def rows(src: Ints) -> Rows:
        giving = src[src > 0]
        return Rows(workers - 1 - giving, giving, giving - 1, 0, Op.REDUCE)

    return Recipe(chunks=1, rows=rows)
