"""The search behind `overlapped.py`, compiled: A* from one moment at which something ends to the next.

A state is the next backward q (L + 1 before LOSS), what each engine does and until when, the set of activations that
are resident and the set of those on disk (codes and sets as in `overlapped_bounds.py`; a writer or reader has i or 0).

Every operation may be taken to start at 0 or as another one ends: otherwise let the first that does not, and what is
dropped for it, happen earlier until something ends; nothing else notices. And what is dropped may be taken to stay
until room is needed: more is resident then, and making it anew is left out. So what follows a state is: for each
idle engine something to start, or nothing; a smallest set of drops that makes room for it; then the next end.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from distsim.memory.overlapped_bounds import Floats, Ints, Moments, Tables

COMPUTE, WRITE, READ, NEXT = 0, 1, 2, 3
"""Columns of what engines do, and of the next backward."""


class States(NamedTuple):
    """The states made so far, a row for each, and where to find those that are equal but for their times."""

    time: Floats
    until: Floats
    """Shape (states, 3): when each engine is free; an idle one is since `time`."""
    doing: Ints
    """Shape (states, 4): what computes, is written, is read; the next backward."""
    resident: Ints
    disk: Ints
    parent: Ints
    begun: Ints
    """Shape (states, 3): what was started at the parent's time; 0 for nothing."""
    following: Ints
    """Next state with the same key; -1 for none."""
    dead: Ints
    """1 for those that another one is better than."""
    keys: Ints
    """A hash table with open addressing; -1 for nothing."""
    first: Ints
    """Its states."""


class Lists(NamedTuple):
    """Lists of numbers, made as they are asked for; list k is at [at[k], at[k] + length[k]) of the columns."""

    at: Ints
    length: Ints
    used: Ints
    a: Floats
    b: Floats
    c: Floats


def search(
    t: Tables, moments: Moments, s: States, now_lists: Lists, then_lists: Lists, floor: float, plain: bool
) -> tuple[float, float, int, int]:
    """Find a schedule of least makespan, which is known to be at least `floor`; with `plain` without any short cut.

    Returns its makespan, a lower bound, how many states were made (-1: there was too little room in `s` or the lists),
    and its last state.
    """
    best, goal = np.inf, 0
    decided = np.empty((len(s.time), 4), np.int64)
    s.doing[0, NEXT] = t.layers + 1
    heap = [(floor, 0.0, 0)]
    new = 1
    while heap:
        f, _, node = heappop(heap)
        if f >= best:
            break
        if s.dead[node] or (not plain and behind(t, s, node)):
            continue
        count = decisions(t, s, node, decided)
        for index in range(max(count, 0)):
            go_on(t, s, node, decided[index], new)
            time = s.time[new]
            if not plain and wasteful(t, s.doing[node, NEXT], s.disk[node], decided[index], time - s.time[node]):
                continue
            key = key_of(t, s, new)
            alike = first_of(s, key)
            if as_early(s, alike, new):
                continue
            f2 = max(f, time)
            if not plain:
                least = bound_now(t, s, new, now_lists)
                if least >= 0 and time + least < best:
                    least = max(least, bound_then(t, s, new, moments, then_lists))
                count = -1 if least < 0 else count
                f2 = max(f2, time + least)
            if f2 >= best:
                continue
            other = alike
            while other >= 0:
                if later(s, other, new):
                    s.dead[other] = 1
                other = s.following[other]
            slot = find(s.keys, key)
            s.keys[slot], s.first[slot], s.following[new] = key, new, alike
            if s.doing[new, NEXT]:
                heappush(heap, (f2, -time, new))  # of equal bounds the latest state first
            else:
                best, goal = time, new
            new += 1
            if new == len(s.time):
                return best, f, -1, goal
        if count < 0:
            return best, f, -1, goal
    return best, best, new, goal


def bit(i: int) -> int:
    """Return the set of a_i alone; of 0 the empty set."""
    return 1 << i >> 1


def after_running(t: Tables, c: int, q: int) -> int:
    """Return which backward is next once what computes has ended, if that is a backward; otherwise the next one."""
    return q - 1 if t.layers < c <= 2 * t.layers else q


def used(t: Tables, q: int, c: int, r: int, resident: int) -> float:
    """Return what is resident while c runs and r is read."""
    gradient = t.size[q] if q <= t.layers else 0.0
    reading = t.size[r] if r else 0.0
    return float(t.size[0] + t.set_size[resident] + gradient + t.allocates[c] + reading)


def next_drop(t: Tables, may: int, short: float, drop: int) -> int:
    """Return the next set after `drop` (-1: the first) within `may` that makes room and is smallest; -1: no more."""
    if short <= 0:
        return 0 if drop < 0 else -1
    drop = (max(drop, 0) - may) & may
    while drop and not (t.set_size[drop] >= short and t.set_size[drop] - t.set_least[drop] < short):
        drop = (drop - may) & may
    return drop if drop else -1


def decisions(t: Tables, s: States, node: int, out: Ints) -> int:
    """List what can run from now on: (computing, written, read, what stays resident); -1: `out` is too small."""
    layers, q, disk = t.layers, int(s.doing[node, NEXT]), s.disk[node]
    c0, w0, r0 = int(s.doing[node, COMPUTE]), int(s.doing[node, WRITE]), int(s.doing[node, READ])
    count = 0
    for c in range(c0, c0 + 1 if c0 else 2 * layers + 2):
        held = int(s.resident[node])
        wanted = t.wanted[after_running(t, c, q)]
        if c and c != c0:
            if c <= layers:
                useless = bool(bit(c) & held) or r0 == c or not bit(c) & wanted
            else:
                useless = c != (2 * layers + 1 if q > layers else layers + q)
            if useless or t.reads[c] & ~held:
                continue
            if layers < c <= 2 * layers:
                held &= wanted | t.reads[c] | bit(w0)  # nothing else is read any more
        short = used(t, q, c, r0, held) - t.budget
        drop = next_drop(t, held & ~t.reads[c] & ~bit(w0), short, -1)
        while drop >= 0:
            left = held & ~drop
            for w in range(w0, w0 + 1 if w0 or (t.half and r0) else layers + 1):
                if w != w0 and (not bit(w) & left & wanted or bit(w) & disk):
                    continue
                for r in range(r0, r0 + 1 if r0 or (t.half and w) else layers + 1):
                    if r != r0 and (bit(r) & left or r == c or not bit(r) & disk & wanted):
                        continue
                    if not c and not w and not r:
                        continue
                    may, short_too = left & ~t.reads[c] & ~bit(w), used(t, q, c, r, left) - t.budget
                    too = next_drop(t, may, short_too, -1)
                    while too >= 0:
                        if count == len(out):
                            return -1
                        out[count, 0], out[count, 1], out[count, 2], out[count, 3] = c, w, r, left & ~too
                        count += 1
                        too = next_drop(t, may, short_too, too)
            drop = next_drop(t, held & ~t.reads[c] & ~bit(w0), short, drop)
    return count


def go_on(t: Tables, s: States, node: int, decision: Ints, new: int) -> None:
    """Write to row `new` the state in which the first of what runs has ended."""
    now, q, disk, resident = s.time[node], int(s.doing[node, NEXT]), int(s.disk[node]), int(decision[3])
    then = np.inf
    for engine in range(3):
        what = int(decision[engine])
        begun = what if what != s.doing[node, engine] else 0
        lasts = t.duration[what] if engine == COMPUTE else t.write[what] if engine == WRITE else t.read[what]
        s.begun[new, engine] = begun
        s.until[new, engine] = now + lasts if begun else s.until[node, engine]
        if what:
            then = min(then, s.until[new, engine])
    for engine in range(3):
        what = int(decision[engine])
        ended = s.until[new, engine] <= then
        s.doing[new, engine] = 0 if ended else what
        if not what or ended:
            s.until[new, engine] = then  # free from now on
        if what and ended:
            if engine == WRITE:
                disk |= bit(what)
            elif engine == READ or what <= t.layers:
                resident |= bit(what)
            else:
                q = t.layers if what == 2 * t.layers + 1 else q - 1
    c = int(s.doing[new, COMPUTE])
    useful = t.wanted[after_running(t, c, q)] | t.reads[c]
    s.time[new], s.doing[new, NEXT], s.parent[new] = then, q, node
    s.resident[new], s.disk[new] = resident & (useful | bit(int(s.doing[new, WRITE]))), disk & useful


def wasteful(t: Tables, q: int, disk: int, decision: Ints, gap: float) -> bool:
    """Whether an engine that stays idle for `gap` could do something meanwhile that does no harm.

    Nothing else starts and nothing is dropped before the gap ends. So what fits into gap and room changes nothing else,
    and afterwards more is resident (which may be dropped again) or on disk than otherwise.
    """
    c, w, r, resident = int(decision[0]), int(decision[1]), int(decision[2]), int(decision[3])
    if c and w and r:
        return False
    wanted = t.wanted[after_running(t, c, q)]
    spare = t.budget - used(t, q, c, r, resident)
    writes, reads = not w and not (t.half and r), not r and not (t.half and w)
    for i in range(1, t.layers + 1):
        if not bit(i) & wanted:
            continue
        if bit(i) & resident:
            if writes and not bit(i) & disk and t.write[i] <= gap:
                return True
        elif t.size[i] <= spare and i != c and i != r:
            if reads and bit(i) & disk and t.read[i] <= gap:
                return True
            if not c and not t.reads[i] & ~resident and t.duration[i] <= gap and t.allocates[i] <= spare:
                return True
    return False


def key_of(t: Tables, s: States, node: int) -> int:
    """Pack all but the times of a state into a number."""
    width, engines = t.layers + 1, s.doing[node]
    key = int(engines[NEXT]) * 2 * width + int(engines[COMPUTE])
    key = (key * width + int(engines[WRITE])) * width + int(engines[READ])
    return (key << t.layers | int(s.resident[node])) << t.layers | int(s.disk[node])


def find(keys: Ints, key: int) -> int:
    """Return the slot of a key, or the one where it belongs."""
    mask = len(keys) - 1
    mixed = (key ^ (key >> 29)) * 0x1E3779B97F4A7C15
    slot = (mixed ^ (mixed >> 32)) & mask
    while keys[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    return int(slot)


def first_of(s: States, key: int) -> int:
    """Return the first state with a key; -1 for none."""
    slot = find(s.keys, key)
    return int(s.first[slot]) if s.keys[slot] == key else -1


def later(s: States, one: int, other: int) -> bool:
    """Whether a state is at least as late as another one in all."""
    return bool(
        s.time[one] >= s.time[other]
        and s.until[one, COMPUTE] >= s.until[other, COMPUTE]
        and s.until[one, WRITE] >= s.until[other, WRITE]
        and s.until[one, READ] >= s.until[other, READ]
    )


def as_early(s: States, other: int, node: int) -> bool:
    """Whether a state in a list is as early in all as this one; then whatever follows this one can follow that one."""
    while other >= 0:
        if later(s, node, other):
            return True
        other = s.following[other]
    return False


def behind(t: Tables, s: States, node: int) -> bool:
    """Whether a state that is as early in all has one more activation resident or on disk, or has ended something.

    What it has more it may drop, and it may wait; so it leads to an end that is as early.
    """
    key, sets = key_of(t, s, node), 2 * t.layers
    c, w, r = int(s.doing[node, COMPUTE]), int(s.doing[node, WRITE]), int(s.doing[node, READ])
    width, q = t.layers + 1, int(s.doing[node, NEXT])
    for i in range(1, t.layers + 1):
        if not bit(i) & t.wanted[q]:
            continue
        if not bit(i) & s.disk[node]:
            more = key + bit(i) - (i * width << sets if w == i else 0)
            if as_early(s, first_of(s, more), node):
                return True
        if not bit(i) & s.resident[node]:
            more = key + (bit(i) << t.layers) - (i << sets if r == i else i * width * width << sets if c == i else 0)
            if as_early(s, first_of(s, more), node):
                return True
    return False


def keep(lists: Lists, start: int, end: int, a: float, b: float, c: float) -> int:
    """Add an entry to those in [start, end) unless one is as good, take out what is not better; -1: no room."""
    for at in range(start, end):
        if lists.a[at] <= a and lists.b[at] <= b and lists.c[at] <= c:
            return end
    new = start
    for at in range(start, end):
        if not (a <= lists.a[at] and b <= lists.b[at] and c <= lists.c[at]):
            lists.a[new], lists.b[new], lists.c[new] = lists.a[at], lists.b[at], lists.c[at]
            new += 1
    if new == len(lists.a):
        return -1
    lists.a[new], lists.b[new], lists.c[new] = a, b, c
    return new + 1


def bound_now(t: Tables, s: States, node: int, lists: Lists) -> float:
    """Return how long it takes from here at least; -1: no room.

    Whatever is wanted and not there is computed, or read if it is on disk: the computing engine has all backwards left
    and these forwards, the reader these reads, each followed by the backwards from there on.
    """
    c, w, r, q = int(s.doing[node, COMPUTE]), int(s.doing[node, WRITE]), int(s.doing[node, READ]), s.doing[node, NEXT]
    rest, now = s.until[node], s.time[node]
    left = after_running(t, c, q)
    on_disk = int(s.disk[node]) | bit(w)
    missing = t.wanted[left] & ~(int(s.resident[node]) | bit(r) | (bit(c) if c <= t.layers else 0))
    computing = rest[COMPUTE] - now + t.backward_sum[min(left, t.layers)] + t.set_forward[missing & ~on_disk]
    reading = (max(rest[READ], rest[WRITE]) if t.half else rest[READ]) - now
    least = rest[READ] - now + t.tail[r] if bit(r) & t.wanted[left] else 0.0
    choice = missing & on_disk
    if lists.at[choice] < 0:
        start = lists.used[0]
        end, loaded = start, choice
        while True:
            end = keep(lists, start, end, t.set_forward[choice & ~loaded], t.set_read[loaded], 0.0)
            if end < 0:
                return -1.0
            if loaded == 0:
                break
            loaded = (loaded - 1) & choice
        lists.at[choice], lists.length[choice], lists.used[0] = start, end - start, end
    shortest = np.inf
    for at in range(lists.at[choice], lists.at[choice] + lists.length[choice]):
        loading = reading + lists.b[at] if lists.b[at] > 0 else 0.0
        shortest = min(shortest, max(computing + lists.a[at], loading))
    return float(max(least, shortest))


def bound_then(t: Tables, s: States, node: int, moments: Moments, lists: Lists) -> float:
    """Return how long it takes from here at least, for what is on disk at the end of some backward; -1: no room.

    Until then all that is computed before it has to be, and all that is on disk then has to be written: one after
    another, and what has not been computed yet not before that.
    """
    c, w, r, q = int(s.doing[node, COMPUTE]), int(s.doing[node, WRITE]), int(s.doing[node, READ]), s.doing[node, NEXT]
    rest_c, rest_w = s.until[node, COMPUTE] - s.time[node], s.until[node, WRITE] - s.time[node]
    on_disk = int(s.disk[node]) | bit(w)
    there = int(s.resident[node]) | bit(r) | (bit(c) if c <= t.layers else 0)
    left = after_running(t, c, q)
    made = 0 if q > t.layers else t.layers  # above that nothing has been computed yet, as far as can be seen
    while (there | on_disk) >> made:
        made += 1
    missing = t.wanted[left] & ~there & ~on_disk & ((1 << made) - 1)
    lead = rest_c if c == made else 0.0
    computing = rest_c + t.forward_sum[t.layers] - t.forward_sum[made]
    longest = 0.0
    for k in range(1, left + 1):
        if moments.start[k] == moments.start[k + 1]:
            continue
        name = k << t.layers | (on_disk & t.others[k])
        if lists.at[name] < 0:
            start = end = lists.used[0]
            for entry in range(moments.start[k], moments.start[k + 1]):
                total, latest = 0.0, 0.0
                for i in range(t.layers, 0, -1):
                    if bit(i) & moments.stored[entry] & ~on_disk:
                        total += t.write[i]
                        latest = max(latest, t.forward_sum[i] + total)
                end = keep(lists, start, end, total, latest, moments.after[entry])
                if end < 0:
                    return -1.0
            lists.at[name], lists.length[name], lists.used[0] = start, end - start, end
        until = computing + t.set_forward[missing & ~t.others[k]]
        if k <= t.layers:
            until += t.backward_sum[min(left, t.layers)] - t.backward_sum[k - 1]
        shortest = np.inf
        for at in range(lists.at[name], lists.at[name] + lists.length[name]):
            wait = until
            if lists.a[at] > 0:
                wait = max(until, rest_w + lists.a[at], lead + lists.b[at] - t.forward_sum[made])
            shortest = min(shortest, wait + lists.c[at])
        longest = max(longest, shortest)
    return float(longest)
