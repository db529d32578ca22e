"""Halving-doubling: reduce-scatter by halving the vector, then all-gather by the same way back.

In round k, an all-reduce's ranks r and r xor 2^k exchange half of what they still sum: p/2, p/4, ... elements, the
largest part between neighbours (distance doubling). 2n log2 n messages and 2 log2 n a + 2(n - 1)/n * p/B for a power
of two: the ring's bytes in fewer rounds. So that halves lie in one piece, actor v ends up with the chunk whose number
has v's bits in reverse order. Reduce-scatter and all-gather by themselves must leave chunk c with rank c; they begin
and end with the largest distance instead.

With e ranks beyond a power of two q, pairs are folded (fold.py): 2q log2 q + 2e messages, of which 2e have p elements.
(Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", Int. J. High Perform.
Comput. Appl. 19, 2005; Rabenseifner, "Optimization of collective reduction operations", ICCS 2004.)
"""

from __future__ import annotations

import numpy as np

from distsim.exchanges.fold import Fold
from distsim.exchanges.recipe import Recipe, Rows, Symmetry, chosen, joined, reversed_bits
from distsim.schedule import Ints, Op


def all_reduce(workers: int) -> Recipe:
    """Reduce-scatter among the actors, then all-gather among them; a chunk for each actor."""
    fold = Fold(workers)

    def rows(src: Ints) -> Rows:
        among = _rows(fold, src, scatter=True, gather=True, near_first=True)
        return among._replace(src=src[among.src])

    symmetry = None if fold.pairs else Symmetry(kind="xor", workers=workers, parts="reversed")
    return Recipe(chunks=fold.actors, rows=rows, symmetry=symmetry, coalesced=True)


def reduce_scatter(workers: int) -> Recipe:
    """The first half; the actor of a pair then gives the other one its chunk."""
    return _recipe(workers, scatter=True, gather=False)


def all_gather(workers: int) -> Recipe:
    """The second half; the actor of a pair first takes the other one's chunk."""
    return _recipe(workers, scatter=False, gather=True)


def _recipe(workers: int, scatter: bool, gather: bool) -> Recipe:
    def rows(src: Ints) -> Rows:
        among = within(workers, src, scatter, gather)
        return among._replace(src=src[among.src])

    symmetry = None if Fold(workers).pairs else Symmetry(kind="xor", workers=workers)
    return Recipe(chunks=workers, rows=rows, symmetry=symmetry, coalesced=True)


def steps(n: int, scatter: bool, gather: bool) -> int:
    """Number of steps of `within` for n positions."""
    fold = Fold(n)
    return fold.rounds * (scatter + gather) + 2 * (fold.pairs > 0)


def within(n: int, position: Ints, scatter: bool, gather: bool) -> Rows:
    """Reduce-scatter, all-gather or both in a group of n positions, each of which has a part."""
    return _rows(Fold(n), position, scatter, gather, near_first=False)


def _rows(fold: Fold, position: Ints, scatter: bool, gather: bool, near_first: bool) -> Rows:
    acts = fold.acts(position)
    every = np.arange(fold.actors if near_first else fold.ranks, dtype=np.int32)
    actor, silent = np.flatnonzero(acts).astype(np.int32), np.flatnonzero(~acts).astype(np.int32)
    paired = actor[position[actor] < 2 * fold.pairs]
    mine, other = position[silent], position[paired] - 1  # of a pair: who is silent
    first = int(fold.pairs > 0)
    last = steps(fold.ranks, scatter, gather) - 1
    parts = []
    if scatter:
        parts.append(Rows(0, silent[:, None], mine[:, None] + 1, every, Op.REDUCE))
    elif gather:
        parts.append(Rows(0, silent, mine + 1, mine, Op.COPY))
    bits = range(fold.rounds)
    way = [(bit, Op.REDUCE) for bit in reversed(bits)] * scatter + [(bit, Op.COPY) for bit in bits] * gather
    parts += [_round(fold, position, actor, near_first, first + i, *each) for i, each in enumerate(way)]
    if gather:
        parts.append(Rows(last, paired[:, None], other[:, None], every, Op.COPY))
    else:
        parts.append(Rows(last, paired, other, other, Op.COPY))
    return joined(parts)


def _round(fold: Fold, position: Ints, actor: Ints, near_first: bool, step: int, bit: int, op: Op) -> Rows:
    """Actors whose places differ in one bit exchange: places agree above it with the receiver's (reduce) or their own.

    An actor's part is the chunk of its place, or with `near_first` off those of its pair. The chunks of a message lie
    side by side.
    """
    number = fold.actor_of(position[actor])
    place = reversed_bits(number, fold.rounds) if near_first else number
    partner = place ^ np.int32(1 << bit)
    to = fold.rank_of(reversed_bits(partner, fold.rounds) if near_first else partner)
    block = (partner if op == Op.REDUCE else place) & np.int32(-1 << bit)
    part = np.add(block[:, None], np.arange(1 << bit, dtype=np.int32))
    if near_first or not fold.pairs:
        return Rows(step, actor[:, None], to[:, None], part, op)
    part = part[:, :, None]
    both = np.arange(-1, 1, dtype=np.int32)  # the silent rank's chunk, where there is one, and the actor's
    rows = Rows(step, actor[:, None, None], to[:, None, None], fold.rank_of(part) + both, op)
    return chosen(rows, (part < fold.pairs) | (both == 0))
