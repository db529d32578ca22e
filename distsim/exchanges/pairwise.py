"""Pairwise: personalised all-to-all in which rank r exchanges with rank r xor k in round k.

n(n - 1) messages of p/n elements; for a power of two (n - 1) (a + p/n/B) if rounds follow each other, and a + (n
- 1)/n * p/B if nothing holds them back. Otherwise there are as many rounds as for the next power of two, and
ranks whose partner does not exist pause (Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", Int. J. High Perform. Comput. Appl. 19, 2005).
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.recipe import Recipe, Rows, chosen
from distsim.schedule import Ints, Op, Source


def personalised_all_to_all(workers: int) -> Recipe:
    """At step k - 1, rank r sends its part for rank r xor k there."""

    def rows(src: Ints) -> Rows:
        k = np.arange(1, 1 << (workers - 1).bit_length(), dtype=np.int32)[:, None]
        dst = src ^ k
        return chosen(Rows(k - 1, src, dst, src * workers + dst, Op.COPY, Source.INPUT), dst < workers)

    return Recipe(chunks=workers * workers, rows=rows)
