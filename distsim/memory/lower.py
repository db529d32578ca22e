"""Lowering: timed operations on named resources become a `TaskGraph` for the engine that also runs exchanges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from distsim import engine
from distsim.engine import Timeline
from distsim.memory.chain import Chain
from distsim.memory.plan import MemoryPlan, name
from distsim.memory.replay import Overlap, Replay, cost
from distsim.taskgraph import Edges, Resources, Routes, TaskGraph


class Timed(NamedTuple):
    """An operation: its name, the resource that it holds, and for how long."""

    name: str
    resource: str
    duration: float


ENGINES: dict[Overlap, tuple[str, ...]] = {
    "none": ("compute",),
    "half": ("compute", "disk"),
    "full": ("compute", "disk write", "disk read"),
}
"""Names of the engines, by number."""


def operations(
    chain: Chain, plan: MemoryPlan, replay: Replay, overlap: Overlap
) -> tuple[list[Timed], list[tuple[int, int]]]:
    """Return a plan's operations without drops, and who of them waits for whom.

    Resources are taken in the order in which operations become ready; what the plan's order decides is in the waits.
    """
    kept = np.flatnonzero(replay.engine >= 0)
    place = {row: number for number, row in enumerate(kept.tolist())}
    rows = plan.rows()
    timed = []
    for row in place:
        op, layer = rows[row]
        duration = cost(chain, op, layer)
        assert duration is not None, "it has been replayed"
        timed.append(Timed(name(op, layer), ENGINES[overlap][int(replay.engine[row])], duration))
    return timed, [(place[before], place[after]) for before, after in replay.waits]


def graph(timed: Sequence[Timed], waits: Iterable[tuple[int, int]]) -> TaskGraph:
    """Build the graph: each operation takes its resource, which serves one at a time, in order."""
    names = list(dict.fromkeys(each.resource for each in timed))
    number = {resource: place for place, resource in enumerate(names)}
    pairs = np.array([*waits], np.int64).reshape(-1, 2)
    count = len(names)
    return TaskGraph.of(
        amount=np.array([each.duration for each in timed], np.float64),
        route=np.array([number[each.resource] for each in timed], np.int32),
        resources=Resources(
            capacity=np.ones(count),
            overhead_s=np.zeros(count),
            fair=np.zeros(count, np.bool_),
            describe=names.__getitem__,
        ),
        routes=Routes(ptr=np.arange(count + 1), resources=np.arange(count, dtype=np.int32), latency_s=np.zeros(count)),
        edges=[Edges(pairs[:, 0], pairs[:, 1])],
        describe=lambda task: timed[task].name,
    )


def simulate(timed: Sequence[Timed], waits: Iterable[tuple[int, int]]) -> Timeline:
    """Run the operations on the engine; times are in the unit of the durations."""
    return engine.run(graph(timed, waits))
