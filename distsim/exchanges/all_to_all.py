"""All-to-all: every worker sends its full gradient to every other one, and each averages for itself.

n(n - 1) messages of p elements in a single round, a + (n - 1) p/B: the least latency, the most bytes.
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.recipe import Recipe, Rows, Symmetry
from distsim.schedule import Ints, Op, Source


def all_reduce(workers: int) -> Recipe:
    """Rows go in shifts, so that no two neighbouring rows meet at a sender or receiver."""

    def rows(src: Ints) -> Rows:
        shift = np.arange(1, workers, dtype=np.int32)[:, None]
        return Rows(0, src, (src + shift) % workers, 0, Op.REDUCE, Source.INPUT)

    return Recipe(chunks=1, rows=rows, symmetry=Symmetry(kind="rotation", workers=workers, parts="fixed"))
