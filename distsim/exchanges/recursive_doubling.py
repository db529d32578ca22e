"""Recursive doubling: in round k, ranks r and r xor 2^k exchange and add their running sums.

n log2 n messages of p elements and log2 n (a + p/B) for a power of two: fewest rounds, good for small arrays.
With e ranks beyond a power of two q, q log2 q + 2e messages in two rounds more: fold.py (Thakur, Rabenseifner
and Gropp, "Optimization of collective communication operations in MPICH", Int. J. High Perform. Comput. Appl.
19, 2005).
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.fold import Fold
from distsim.exchanges.recipe import Recipe, Rows, Symmetry, joined
from distsim.schedule import Ints, Op


def all_reduce(workers: int) -> Recipe:
    """Of each pair one rank takes the other's gradient in, then the actors exchange, then it gives the sum back."""
    fold = Fold(workers)

    def rows(src: Ints) -> Rows:
        actor, silent = src[fold.acts(src)], src[~fold.acts(src)]
        giving = actor[actor < 2 * fold.pairs]
        first = np.int32(fold.pairs > 0)
        k = np.arange(fold.rounds, dtype=np.int32)[:, None]
        partner = fold.rank_of(fold.actor_of(actor) ^ (np.int32(1) << k))
        return joined(
            [
                Rows(0, silent, silent + 1, 0, Op.REDUCE),
                Rows(first + k, actor, partner, 0, Op.REDUCE),
                Rows(first + fold.rounds, giving, giving - 1, 0, Op.COPY),
            ]
        )

    symmetry = None if fold.pairs else Symmetry(kind="xor", workers=workers, parts="fixed")
    return Recipe(chunks=1, rows=rows, symmetry=symmetry)
