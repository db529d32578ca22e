"""Any number of ranks as a power of two: the first ranks stand in pairs, and of each pair one acts for both.

With n = q + e, q the largest power of two, ranks 2i and 2i + 1 are such a pair for i < e, and 2i + 1 acts for
them; the others act for themselves. (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH", Int. J. High Perform. Comput. Appl. 19, 2005, section 4.5.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distsim.schedule import Bools, Ints


@dataclass(frozen=True, slots=True)
class Fold:
    """`ranks` ranks, played by as many actors as there are in the largest power of two."""

    ranks: int

    @property
    def rounds(self) -> int:
        """log2 of the number of actors."""
        return self.ranks.bit_length() - 1

    @property
    def actors(self) -> int:
        """The largest power of two that is not above the ranks."""
        return 1 << self.rounds

    @property
    def pairs(self) -> int:
        """Number of pairs of ranks."""
        return self.ranks - self.actors

    def acts(self, rank: Ints) -> Bools:
        """Whether a rank is an actor."""
        return np.asarray((rank >= 2 * self.pairs) | (rank % 2 == 1))

    def actor_of(self, rank: Ints) -> Ints:
        """Number of the actor for a rank."""
        return np.where(rank < 2 * self.pairs, rank // 2, rank - np.int32(self.pairs))

    def rank_of(self, actor: Ints) -> Ints:
        """Rank of an actor."""
        return np.where(actor < self.pairs, 2 * actor + 1, actor + np.int32(self.pairs))
