"""Double tree: two binary trees carry half of the array each, and no rank has children in both.

4(n - 1) messages of p/2 elements, up to the roots and down again; 2 log2 n a + (2 log2 n - 1) p/B for a power of
two. With segments that follow each other every rank sends and receives about as much as in a ring, in far fewer
rounds (Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel
Computing 35, 2009). At places 1..n, a place's level is the number of times that 2 divides it; level l has its
children 2^(l - 1) places away, or nearer by further halves where that place does not exist. Odd places have no
children. Rank r stands at place r + 1 in the first tree and at the next place (cyclically) in the second one, so
whoever stands at an even place in one stands at an odd one, or at place 1, in the other.
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.recipe import Recipe, Rows, chosen, joined
from distsim.schedule import Ints, Op


def all_reduce(workers: int) -> Recipe:
    """Chunk 0 goes through the first tree, chunk 1 through the second one."""
    return Recipe(
        chunks=2, rows=lambda src: joined([_tree(workers, (src + tree) % workers, tree) for tree in range(2)])
    )


def _tree(workers: int, index: Ints, tree: int) -> Rows:
    """Rows of the senders at places index + 1: reduce towards the root at step l, then back."""
    place = index + 1
    top = workers.bit_length() - 1
    weight = place & -place
    level = np.bitwise_count(weight - 1).astype(np.int32)
    near = (place ^ weight) | (weight << 1)  # the parent, if there is such a place
    parent = np.where(near <= workers, near, place ^ weight)
    rises = place != 1 << top
    up = chosen(Rows(level, _rank(place, workers, tree), _rank(parent, workers, tree), tree, Op.REDUCE), rises)
    # Children: one below, and one above, nearer by halves until it exists.
    parts = [up]
    for side in (-1, 1):
        away = weight >> 1
        for _ in range(top):
            away = np.where((side > 0) & (away > 0) & (place + away > workers), away >> 1, away)
        down = Rows(
            2 * top - level, _rank(place, workers, tree), _rank(place + side * away, workers, tree), tree, Op.COPY
        )
        parts.append(chosen(down, away > 0))
    return joined(parts)


def _rank(place: Ints, workers: int, tree: int) -> Ints:
    """Return the rank that stands at a place of a tree."""
    return np.asarray((place - 1 - tree) % workers)
