"""Hierarchical: reduce-scatter inside each node, all-reduce across nodes, all-gather inside each node.

Nodes are `node` consecutive ranks; across nodes, ranks of equal place in their nodes exchange, each their share
p/g. Inside a node of g ranks everybody sends straight to everybody (`inside=direct`, for switches) or around a
ring; across N nodes goes a ring or halving-doubling. With direct and ring: 2n(g - 1) messages of p/g elements
inside, 2n(N - 1) of p/n across; 2a + 2(g - 1)/g * p/B and 2(N - 1) (a + p/n/B). (Jia et al., "Highly scalable deep
learning training system with mixed-precision", arXiv:1807.11205, 2018; Thakur, Rabenseifner and Gropp 2005.)
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import numpy as np

from distsim.exchanges import direct, halving_doubling, ring
from distsim.exchanges.fold import Fold
from distsim.exchanges.recipe import Recipe, Rows, Symmetry, divides, joined
from distsim.schedule import Ints

Inside = Literal["direct", "ring"]
Across = Literal["ring", "halving-doubling"]
PHASES: dict[str, ModuleType] = {"direct": direct, "ring": ring, "halving-doubling": halving_doubling}


def all_reduce(workers: int, *, node: int | None = None, inside: Inside = "direct", across: Across = "ring") -> Recipe:
    """Three phases; chunk c is summed at place c // N of node c mod N."""
    return recipe(workers, node or usual_node(workers), inside, across, scatter=True, gather=True)


def reduce_scatter(
    workers: int, *, node: int | None = None, inside: Inside = "direct", across: Across = "ring"
) -> Recipe:
    """Inside nodes, then across them."""
    return recipe(workers, node or usual_node(workers), inside, across, scatter=True, gather=False)


def all_gather(workers: int, *, node: int | None = None, inside: Inside = "direct", across: Across = "ring") -> Recipe:
    """Across nodes, then inside them."""
    return recipe(workers, node or usual_node(workers), inside, across, scatter=False, gather=True)


def usual_node(workers: int) -> int:
    """Return the largest divisor up to 8, the ranks of most nodes."""
    return next(size for size in range(8, 0, -1) if workers % size == 0)


def recipe(workers: int, node: int, inside: Inside, across: Across, scatter: bool, gather: bool) -> Recipe:
    """Make a reduce-scatter, an all-gather or both in two levels."""
    divides("node", node, workers)
    nodes = workers // node
    near, far = PHASES[inside], PHASES[across]
    # In an all-reduce, the parts of ranks of equal place in their nodes lie side by side: one message inside nodes.
    together = scatter and gather
    each_place, each_node = (nodes, 1) if together else (1, node)

    def rows(src: Ints) -> Rows:
        local, home = src % node, src // node
        of_nodes = np.arange(nodes, dtype=np.int32) * np.int32(each_node)
        first = near.steps(node, True, False) if scatter else 0
        second = first + far.steps(nodes, scatter, gather)

        def inner(among: Rows, first_step: int) -> Rows:
            step, at, dst, place, op = (np.asarray(column)[..., None] for column in among[:5])
            chunk = place * np.int32(each_place) + of_nodes
            return Rows(step + first_step, src[at], dst + (home * node)[at], chunk, op)

        parts = []
        if scatter:
            parts.append(inner(near.within(node, local, True, False), 0))
        among = far.within(nodes, home, scatter, gather)
        own = local[among.src]
        chunk = among.chunk * each_node + own * each_place
        parts.append(Rows(among.step + first, src[among.src], among.dst * node + own, chunk, among.op))
        if gather:
            parts.append(inner(near.within(node, local, False, True), second))
        return joined(parts)

    symmetry = None
    order: Literal["places", "ranks"] = "places" if together else "ranks"
    if across == "ring":
        symmetry = Symmetry(kind="rotation", workers=workers, unit=node, parts=order)
    elif not Fold(nodes).pairs:
        symmetry = Symmetry(kind="xor", workers=workers, unit=node, parts=order)
    return Recipe(chunks=workers, rows=rows, symmetry=symmetry, coalesced=together)
