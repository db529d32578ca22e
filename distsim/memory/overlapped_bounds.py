"""What is known of a chain and a budget before the search of `overlapped_search.py` begins: tables, and how long it
takes at least from the end of each backward on.

A set of activations is a number: bit i - 1 stands for a_i. What computes has a code: 0 nothing, i for F_i, L + i for
B_i, 2 L + 1 for LOSS.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Tables(NamedTuple):
    """A chain and a budget as arrays; by layer or activation, with an entry 0 for nothing, unless it says otherwise."""

    layers: int
    budget: float
    half: bool
    """Writes and reads share an engine."""
    duration: Floats
    """By code of what computes."""
    allocates: Floats
    """By code: what it makes and its temporaries."""
    reads: Ints
    """By code: the set that cannot be dropped until it ends."""
    write: Floats
    read: Floats
    size: Floats
    wanted: Ints
    """By next backward (L + 1 before LOSS): the set that may still be read."""
    tail: Floats
    """All backwards from the one on that reads a_i last."""
    forward_sum: Floats
    """F_1 .. F_i."""
    backward_sum: Floats
    """B_1 .. B_i."""
    set_size: Floats
    """By set, and so are the next five."""
    set_least: Floats
    """Its smallest size."""
    set_forward: Floats
    """Its forwards."""
    set_copies: Floats
    """Reading it without pause."""
    set_longest: Floats
    """Its longest read."""
    set_read: Floats
    """From its first read to the end, if nothing but the reader and the order of backwards holds it up."""
    others: Ints
    """By backward (L + 1: LOSS): the set that is wanted later and that it does not read itself."""
    lack: Floats
    """By backward: how much of `others` is not resident at its end, at least; nothing is made while it runs."""


class Moments(NamedTuple):
    """What may be on disk, not resident, at the end of backward k (L + 1: LOSS): entries [start[k], start[k + 1])."""

    start: Ints
    stored: Ints
    """A set on disk."""
    after: Floats
    """Time left at least, if nothing else can be read; sets of which a part is as good are left out."""


def at_moments(t: Tables, work: int) -> Moments:
    """List the moments; with the closer bound of `from_moment` as far as it takes no more than so much `work`."""
    start = np.zeros(t.layers + 3, np.int64)
    room = (t.layers + 2) << t.layers
    kept, after = np.empty(room, np.int64), np.empty(room)
    times = np.empty(1 << t.layers)
    stays, values = np.zeros(1, np.int64), np.zeros((1, 1 << t.layers))  # after the last backward nothing is left
    count = 0
    for k in range(1, t.layers + 2):
        start[k] = count
        others = t.others[k]
        if k > 1:
            stays, values, work = from_moment(t, k, stays, values, work)
        if t.lack[k] <= 0:
            continue
        by_volume(t, k, times)
        stored = 0
        while True:
            if len(stays):
                shortest = np.inf
                for index in range(len(stays)):
                    if not stays[index] & stored:
                        shortest = min(shortest, values[index, stays[index] | stored])
                times[stored] = max(times[stored], shortest)
            needed = times[stored] < np.inf
            for i in range(t.layers):
                if stored >> i & 1 and times[stored & ~(1 << i)] <= times[stored]:
                    needed = False
            if needed:
                kept[count], after[count] = stored, times[stored]
                count += 1
            stored = (stored - others) & others
            if stored == 0:
                break
    start[t.layers + 2] = count
    return Moments(start, kept[:count].copy(), after[:count].copy())


def by_volume(t: Tables, k: int, times: Floats) -> None:
    """For each set on disk as backward k ends: the time left, by the amount that has to come back.

    Nothing is computed as a backward ends, so what of `others` does not fit beside it is read or computed afterwards:
    the reader has these reads with the backwards after each, the computing engine these forwards and all backwards.
    """
    others = t.others[k]
    loaded = 0
    while True:
        rest = others & ~loaded
        computed, cheapest = 0, np.inf
        while True:
            if t.set_size[loaded] + t.set_size[computed] >= t.lack[k]:
                cheapest = min(cheapest, t.set_forward[computed])
            computed = (computed - rest) & rest
            if computed == 0:
                break
        times[loaded] = max(t.backward_sum[k - 1] + cheapest, t.set_read[loaded])
        for i in range(t.layers):  # not all that is on disk has to be read
            if loaded >> i & 1:
                times[loaded] = min(times[loaded], times[loaded & ~(1 << i)])
        loaded = (loaded - others) & others
        if loaded == 0:
            break


def from_moment(t: Tables, k: int, before: Ints, earlier: Floats, work: int) -> tuple[Ints, Floats, int]:
    """Return the sets that can be resident beside backward k as it ends, and how long it takes from there at least.

    `values[index, known]`: with `stays[index]` resident, and `known`, which contains it, resident or on disk; all else
    is lost until it is computed. `before` and `earlier` are the same of k - 1. From the end of k to the end of k - 1 it
    takes as long as backward k - 1 and what is computed then; as that backward and the reads of what it reads itself;
    and as all that is read then, but for the last read, which may go on. All that has been resident is taken to be on
    disk, and an engine that is still busy as k ends to be free: both only make it shorter. Returns no sets where that
    is more than `work`, and what is left of it.
    """
    others, reads = t.others[k], t.reads[t.layers + k]
    room = t.set_size[others] - t.lack[k]
    stays = np.empty(1 << t.layers, np.int64)
    count, held = 0, 0
    while True:
        if t.set_size[held] <= room:
            stays[count] = held
            count += 1
        held = (held - others) & others
        if held == 0:
            break
    work -= count * max(1, len(before)) << (k - 1)
    if len(before) == 0 or work < 0:
        return stays[:0], earlier, 0
    wanted, needs = t.others[k - 1], t.reads[t.layers + k - 1]
    backward = t.duration[t.layers + k - 1]
    values = np.full((count, others + 1), np.inf)
    for index in range(count):
        there = stays[index] | reads
        rest = others & ~stays[index]
        stored = 0
        while True:
            known = there | stored
            shortest = np.inf
            for after in range(len(before)):
                if backward + earlier[after, wanted] >= shortest:
                    continue
                new = (before[after] | needs) & ~there
                lost = t.wanted[k - 1] & ~(known | new)
                again = 0  # what is computed on the way, and perhaps written, but does not stay
                while True:
                    value = earlier[after, (known | new | again) & wanted]
                    loaded = new & known
                    while value + backward < shortest:
                        gap = max(backward + t.set_copies[loaded & needs], t.set_copies[loaded] - t.set_longest[loaded])
                        gap = max(gap, backward + computing(t, again | (new & ~loaded), loaded, there, known))
                        shortest = min(shortest, gap + value)
                        if loaded == 0:
                            break
                        loaded = (loaded - 1) & new & known
                    again = (again - lost) & lost
                    if again == 0:
                        break
            values[index, stays[index] | stored] = shortest
            stored = (stored - rest) & rest
            if stored == 0:
                break
    return stays[:count].copy(), values, work


def computing(t: Tables, made: int, loaded: int, there: int, known: int) -> float:
    """Return how long it takes at least to compute the set `made`; inf if something that is lost is needed for it.

    `there` is resident, `loaded` is read meanwhile and not computed, what else is `known` may be read or computed.
    """
    chain, longest = 0.0, float(t.set_forward[made])
    for i in range(t.layers, 0, -1):
        if not made >> (i - 1) & 1:
            chain = 0.0
            continue
        chain += t.duration[i]
        below = 1 << i >> 2  # a_(i-1); nothing for a_0, which is always there
        if below & ~(there | made):
            if below & loaded:
                longest = max(longest, t.read[i - 1] + chain)
            elif below & known:
                longest = max(longest, min(t.read[i - 1], t.duration[i - 1]) + chain)
            else:
                return np.inf
    return longest
