"""Least makespan of a chain with overlapping copies by brute force: tick by tick, every choice at every tick.

Written from the rules of the model alone, for whole-number times of at least 1. At every tick any engine that is idle
may start anything that it can, or stay idle, and anything may be dropped; then a unit of time passes. All states that
can be reached are visited, in the order of time. Only for two to four layers with small numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

IDLE = ("", 0, 0)
Running = tuple[str, int, int]


@dataclass(frozen=True)
class State:
    """What is resident, what is on disk, the live gradients, and (operation, layer, ticks left) per engine."""

    resident: frozenset[int]
    disk: frozenset[int]
    gradients: frozenset[int]
    backwards: int
    compute: Running = IDLE
    write: Running = IDLE
    read: Running = IDLE


@dataclass(frozen=True)
class Problem:
    """A chain in whole numbers, as in the solved examples, with a budget."""

    size: tuple[int, ...]
    fwd: tuple[int, ...]
    bwd: tuple[int, ...]
    write: tuple[int, ...]
    read: tuple[int, ...]
    needs: str
    budget: int
    shared: bool
    """Writes and reads share an engine."""

    def backward_reads(self, layer: int) -> set[int]:
        return {"input": {layer - 1}, "output": {layer}, "both": {layer - 1, layer}}[self.needs]

    def memory(self, state: State) -> int:
        """What is resident, what is being made or read, and gradients, those being made among them."""
        sizes = sum(self.size[i] for i in state.resident) + sum(self.size[i] for i in state.gradients)
        for operation, layer, _ in (state.compute, state.read):
            sizes += self.size[layer] if operation in ("F", "R") else 0
        return sizes

    def in_use(self, state: State) -> set[int]:
        """What is being read by an operation that is running."""
        used = {0}
        operation, layer, _ = state.compute
        used |= {layer - 1} if operation == "F" else self.backward_reads(layer) if operation == "B" else set()
        return used | ({state.write[1]} if state.write != IDLE else set())

    def moves(self, state: State) -> Iterator[State]:
        """All that can be decided at one moment, one decision at a time."""
        layers = len(self.fwd)
        there = state.resident
        for i in there - self.in_use(state):
            yield replace(state, resident=there - {i})
        if state.compute == IDLE:
            for i in range(1, layers + 1):
                if i - 1 in there and i not in there and state.read[1] != i:
                    yield replace(state, compute=("F", i, self.fwd[i - 1]))
            if state.backwards > layers:
                if layers in there:
                    yield replace(state, gradients=frozenset({layers}), backwards=layers)
            elif self.backward_reads(state.backwards) <= there:
                i = state.backwards
                yield replace(state, compute=("B", i, self.bwd[i - 1]), gradients=frozenset({i, i - 1}))
        for i in range(1, layers + 1):
            if state.write == IDLE and i in there and not (self.shared and state.read != IDLE):
                yield replace(state, write=("W", i, self.write[i - 1]))
            free = state.read == IDLE and not (self.shared and state.write != IDLE)
            if free and i in state.disk and i not in there and state.compute[:2] != ("F", i):
                yield replace(state, read=("R", i, self.read[i - 1]))

    def tick(self, state: State) -> State:
        """Let a unit of time pass."""
        for engine in ("compute", "write", "read"):
            operation, layer, left = getattr(state, engine)
            running: dict[str, Any] = {engine: (operation, layer, left - 1) if left > 1 else IDLE}
            state = replace(state, **running)
            if left != 1:
                continue
            if operation in ("F", "R"):
                state = replace(state, resident=state.resident | {layer})
            elif operation == "W":
                state = replace(state, disk=state.disk | {layer})
            else:
                state = replace(state, gradients=frozenset({layer - 1}), backwards=layer - 1)
        return state

    def least_makespan(self) -> int | None:
        """Visit all states; None if none has done all backwards."""
        first = State(frozenset({0}), frozenset(), frozenset(), len(self.fwd) + 1)
        seen: set[State] = set()
        now, time = {first}, 0
        while now:
            if any(state.backwards == 0 for state in now):
                return time
            todo = list(now)
            reached: set[State] = set()
            while todo:
                state = todo.pop()
                if state in seen or self.memory(state) > self.budget:
                    continue
                seen.add(state)
                reached.add(state)
                todo += self.moves(state)
            now = {self.tick(state) for state in reached} - seen
            time += 1
        return None
