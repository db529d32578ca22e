"""Bruck: personalised all-to-all in log2 n rounds; parts travel by the binary digits of their distance.

In round k, a part that has 2^k in its distance moves 2^k ranks on. n(n/2) log2 n messages of p/n elements for a
power of two, those of a round together: log2 n (a + p/2/B) round by round, few latencies for many bytes, for
small arrays (Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing
systems", IEEE Trans. Parallel Distrib. Syst. 8, 1997).
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.recipe import Recipe, Rows, joined
from distsim.schedule import Ints, Op


def personalised_all_to_all(workers: int) -> Recipe:
    """At step k, rank r sends to rank r + 2^k the parts that have come this far and have 2^k still to go."""

    def rows(src: Ints) -> Rows:
        parts = []
        for k in range((workers - 1).bit_length()):
            distance = np.arange(workers, dtype=np.int32)[:, None]
            distance = distance[(distance >> k & 1 == 1)[:, 0]]
            origin = (src - distance % (1 << k)) % workers
            chunk = origin * workers + (origin + distance) % workers
            parts.append(Rows(k, src, (src + (1 << k)) % workers, chunk, Op.COPY))
        return joined(parts)

    return Recipe(chunks=workers * workers, rows=rows)
