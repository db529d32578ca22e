"""Tree: k-nomial reduce to rank 0, then k-nomial broadcast; binomial with radix 2.

All-reduce: 2(n - 1) messages of p elements, each phase in L = ceil(log_k n) rounds. A binomial reduce takes L (a
+ p/B); a broadcast takes that if a rank sends to its children one after another, and L a + L(L + 1)/2 * p/B if to
all at once over one link (n = 2^L). The parent of a rank is the rank without its lowest digit, to base k, that is
not 0. Broadcast and reduce are half of it each (Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", Int. J. High Perform. Comput. Appl. 19, 2005). `segments` lets the parts of a
large array follow each other down the tree, where they are sent in turn: in rounds, or on links taken in order.
"""

from __future__ import annotations

import numpy as np

from distsim.errors import ConfigError
from distsim.exchanges.recipe import Recipe, Rows, chosen, joined
from distsim.schedule import Ints, Op


def all_reduce(workers: int, *, radix: int = 2) -> Recipe:
    """Reduce, then broadcast."""
    levels = _levels(workers, radix)
    return Recipe(chunks=1, rows=lambda src: joined([_up(workers, radix, src), _down(workers, radix, src, levels)]))


def broadcast(workers: int, *, radix: int = 2) -> Recipe:
    """Ranks that have the array pass it on, to the largest subtree first."""
    _levels(workers, radix)
    return Recipe(chunks=1, rows=lambda src: _down(workers, radix, src, 0))


def reduce(workers: int, *, radix: int = 2) -> Recipe:
    """Ranks that have heard all of their children pass the sum on."""
    _levels(workers, radix)
    return Recipe(chunks=1, rows=lambda src: _up(workers, radix, src))


def _levels(workers: int, radix: int) -> int:
    """Number of digits that ranks have to base `radix`."""
    if radix < 2:
        raise ConfigError(f"radix={radix}: a tree's radix is at least 2 (binomial)")
    levels = 0
    while radix**levels < workers:
        levels += 1
    return levels


def _up(workers: int, radix: int, src: Ints) -> Rows:
    """At step l, ranks whose lowest digit but 0 is digit l send to their parents."""
    parts = []
    for level in range(_levels(workers, radix)):
        weight = np.int64(radix**level)
        ends_here = src[(src % weight == 0) & (src // weight % radix > 0)]
        parts.append(Rows(level, ends_here, ends_here - ends_here // weight % radix * weight, 0, Op.REDUCE))
    return joined(parts)


def _down(workers: int, radix: int, src: Ints, first_step: int) -> Rows:
    """The same backwards."""
    parts = []
    levels = _levels(workers, radix)
    for level in reversed(range(levels)):
        weight = radix**level
        parent = src[src % (weight * radix) == 0]
        child = parent + np.arange(1, min(radix, -(-workers // weight)), dtype=np.int64)[:, None] * weight
        parts.append(chosen(Rows(first_step + levels - 1 - level, parent, child, 0, Op.COPY), child < workers))
    return joined(parts)
