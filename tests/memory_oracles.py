"""Brute force for memory planning: each operation and each drop is a move, nothing is left out and nothing guessed.

It shares no code with the planners or the checker, but for the names of the operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import heappop, heappush

from distsim.memory.chain import Chain

State = tuple[frozenset[str], frozenset[str], int, frozenset[str]]
"""Resident activations (`a3`, `A3` for abar_3), what is on disk, the next backward (L + 1 before LOSS), and what has
run forward, where that may happen only once."""


def moves(chain: Chain, state: State, once: bool) -> Iterator[tuple[State, float, float]]:
    """Yield (next state, time, memory during it) for all that can be done in a state."""
    here, disk, turn, ran = state
    size, saved, layers = chain.size, chain.saved, chain.layers

    def has(i: int) -> bool:
        return i == 0 or f"a{i}" in here or f"A{i}" in here

    memory = float(size[0]) + (float(size[turn]) if turn <= layers else 0.0)
    for each in here:
        memory += float(size[int(each[1:])] if each[0] == "a" or saved is None else saved[int(each[1:]) - 1])
    before, after = chain.tmp(True), chain.tmp(False)
    for each in here:
        yield (here - {each}, disk, turn, ran), 0.0, memory
        if each[0] == "A":
            yield (here - {each} | {"a" + each[1:]}, disk, turn, ran), 0.0, memory
    for i in range(1, layers + 1):
        a, whole = f"a{i}", f"A{i}"
        if has(i - 1) and not has(i) and not (once and a in ran):
            forward, run = float(chain.forward[i - 1]), ran | {a} if once else ran
            peak = memory + float(before[i - 1])
            yield (here | {a}, disk, turn, run), forward, peak + float(size[i])
            if saved is not None:
                yield (here | {whole}, disk, turn, run), forward, peak + float(saved[i - 1])
        if chain.write is not None and chain.read is not None:
            if has(i) and a not in disk:
                yield (here, disk | {a}, turn, ran), float(chain.write[i - 1]), memory
            if a in disk and not has(i):
                yield (here | {a}, disk, turn, ran), float(chain.read[i - 1]), memory + float(size[i])
        if chain.write_saved is not None and chain.read_saved is not None and saved is not None:
            if whole in here and whole not in disk:
                yield (here, disk | {whole}, turn, ran), float(chain.write_saved[i - 1]), memory
            if whole in disk and not has(i):
                yield (here | {whole}, disk, turn, ran), float(chain.read_saved[i - 1]), memory + float(saved[i - 1])
    if turn == layers + 1 and has(layers):
        yield (here, disk, layers, ran), 0.0, memory + float(size[layers])
    if 1 <= turn <= layers:
        if saved is not None:
            ready = f"A{turn}" in here and has(turn - 1)
        else:
            ready = (chain.needs == "output" or has(turn - 1)) and (chain.needs == "input" or has(turn))
        if ready:
            peak = memory + float(size[turn - 1] + after[turn - 1])
            yield (here - {f"A{turn}"}, disk, turn - 1, ran), float(chain.backward[turn - 1]), peak


def brute_force(chain: Chain, budget: float = math.inf, once: bool = False) -> tuple[float, float] | None:
    """Return the least time within a budget and the least peak with that time, None if there is no schedule."""
    start: State = (frozenset(), frozenset(), chain.layers + 1, frozenset())
    best = {start: (0.0, float(chain.size[0]))}
    queue, count = [(0.0, float(chain.size[0]), 0, start)], 0
    done: set[State] = set()
    while queue:
        time, peak, _, state = heappop(queue)
        if state in done:
            continue
        done.add(state)
        if state[2] == 0:
            return time, peak
        for after, duration, memory in moves(chain, state, once):
            way = time + duration, max(peak, memory)
            if memory <= budget and way < best.get(after, (math.inf, math.inf)):
                best[after] = way
                count += 1
                heappush(queue, (*way, count, after))
    return None


def brute_front(chain: Chain, once: bool = False) -> list[tuple[float, float]]:
    """Return (budget, time) of all breakpoints, ascending budgets."""
    points = []
    found = brute_force(chain, once=once)
    while found is not None:
        points.append((found[1], found[0]))
        found = brute_force(chain, math.nextafter(found[1], -math.inf), once)
    return points[::-1]
