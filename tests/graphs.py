"""Task graphs to test the engine with, and references for it that look at everything again at every moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st

from distsim.engine import Timeline
from distsim.taskgraph import Edges, Resources, Routes, TaskGraph

Pair = tuple[int, int]


def graph(
    amount: Sequence[float],
    paths: Sequence[Sequence[int]],
    waits: Sequence[Pair] = (),
    *,
    latency_s: Sequence[float] = (),
    capacity: Sequence[float] = (),
    overhead_s: Sequence[float] = (),
    fair: bool | Sequence[bool] = False,
    joins: int = 0,
    **more: Any,
) -> TaskGraph:
    """Build a graph in which task i moves amount[i] over the resources paths[i]; `waits` are pairs (before, after).

    Resources have capacity 1 and no overhead where nothing else is said. Tasks with one path and latency share
    a route.
    """
    count = len(capacity) or 1 + max((resource for path in paths for resource in path), default=0)
    latencies = list(latency_s) or [0.0] * len(amount)
    keys = [(tuple(path), late) for path, late in zip(paths, latencies, strict=True)]
    routes = list(dict.fromkeys(keys))
    pairs = np.array(waits, dtype=np.int32).reshape(-1, 2)
    return TaskGraph.of(
        amount=np.array(amount, dtype=np.float64),
        route=np.array([routes.index(key) for key in keys], dtype=np.int32),
        resources=Resources(
            capacity=np.array(capacity or [1.0] * count, dtype=np.float64),
            overhead_s=np.array(overhead_s or [0.0] * count, dtype=np.float64),
            fair=np.broadcast_to(fair, count).copy(),
        ),
        routes=Routes(
            ptr=np.cumsum([0, *(len(path) for path, _ in routes)]).astype(np.int64),
            resources=np.array([resource for path, _ in routes for resource in path], dtype=np.int32),
            latency_s=np.array([late for _, late in routes], dtype=np.float64),
        ),
        edges=[Edges(pairs[:, 0], pairs[:, 1])],
        joins=joins,
        **more,
    )


def times(timeline: Timeline) -> tuple[list[float], list[float]]:
    """Return starts and finishes as lists."""
    return timeline.start_s.tolist(), timeline.finish_s.tolist()


def path_of(tasks: TaskGraph, task: int) -> list[int]:
    """Resources of a task."""
    route = int(tasks.route[task])
    path: list[int] = tasks.routes.resources[tasks.routes.ptr[route] : tasks.routes.ptr[route + 1]].tolist()
    return path


def waiters_of(tasks: TaskGraph, task: int) -> list[int]:
    """Who waits for a task."""
    found: list[int] = tasks.following[tasks.next_ptr[task] : tasks.next_ptr[task + 1]].tolist()
    return found


def latency_of(tasks: TaskGraph, task: int) -> float:
    """How long after letting go of its route a task finishes."""
    return float(tasks.routes.latency_s[tasks.route[task]])


@dataclass
class Waiting:
    """What the references know of a task."""

    blockers: int
    start: Any = None
    finish: Any = None


def released(tasks: TaskGraph, state: list[Waiting], task: int) -> list[int]:
    """Let go who waited for a task that has finished; return those with a route that wait for nothing else now."""
    ready, over = [], deque([task])
    while over:
        done = over.popleft()
        for waiter in waiters_of(tasks, done):
            state[waiter].blockers -= 1
            if state[waiter].blockers == 0 and waiter < len(tasks.amount):
                ready.append(waiter)
            elif state[waiter].blockers == 0:  # a join: over at once
                blockers = [other for other in range(tasks.tasks) if waiter in waiters_of(tasks, other)]
                state[waiter].start = state[waiter].finish = max(state[other].finish for other in blockers)
                over.append(waiter)
    return ready


def beginning(tasks: TaskGraph) -> tuple[list[Waiting], list[int]]:
    """Return the state before anything has run, and who is ready then."""
    state = [Waiting(int(many)) for many in tasks.waits]
    first = [task for task in range(tasks.tasks) if not state[task].blockers]
    ready = [task for task in first if task < len(tasks.amount)]
    for task in first:
        if task >= len(tasks.amount):
            state[task].start = state[task].finish = 0
            ready += released(tasks, state, task)
    return state, ready


def queues(tasks: TaskGraph) -> tuple[list[float], list[float]]:
    """Simulate resources in order with a clock and a queue for each; for amounts and latencies above zero.

    At each moment: resources whose time is over are idle again; who has finished wakes those that waited for it;
    the woken join the queues of their resources; whoever is first in all of its queues and finds them idle starts.
    """
    line: list[deque[int]] = [deque() for _ in range(len(tasks.resources))]
    busy_till = [0.0] * len(tasks.resources)
    state, woken = beginning(tasks)
    queued: list[int] = []
    moments = {0.0}
    while moments:
        now = min(moments)
        moments.remove(now)
        for task in range(len(tasks.amount)):
            if state[task].finish == now and task in queued:
                queued.remove(task)
                woken += released(tasks, state, task)
        for task in woken:
            queued.append(task)
            for resource in path_of(tasks, task):
                line[resource].append(task)
        woken = []
        for task in queued:
            path = path_of(tasks, task)
            if state[task].start is not None or any(line[each][0] != task or busy_till[each] > now for each in path):
                continue
            state[task].start, held = now, 0.0
            for each in path:
                line[each].popleft()
                time_s = float(tasks.amount[task] / tasks.resources.capacity[each] + tasks.resources.overhead_s[each])
                busy_till[each], held = now + time_s, max(held, time_s)
                moments.add(busy_till[each])
            state[task].finish = now + held + latency_of(tasks, task)
            moments.add(state[task].finish)
    return [each.start for each in state], [each.finish for each in state]


def demands(tasks: TaskGraph, task: int) -> dict[int, Fraction]:
    """How much of each resource's capacity a task takes per unit of its rate: its overhead is spread over it."""
    resources, moved = tasks.resources, Fraction(float(tasks.amount[task]))
    return {
        each: 1 + Fraction(float(resources.overhead_s[each])) * Fraction(float(resources.capacity[each])) / moved
        for each in path_of(tasks, task)
    }


def progressive_filling(demand: dict[int, dict[int, Fraction]], capacity: Sequence[float]) -> dict[int, Fraction]:
    """Raise the rates of all flows together; a flow stops where a resource is full (Bertsekas and Gallager)."""
    rate: dict[int, Fraction] = {}
    while len(rate) < len(demand):
        level: dict[int, Fraction] = {}
        for link, most in enumerate(capacity):
            rising = sum((d[link] for flow, d in demand.items() if link in d and flow not in rate), Fraction(0))
            taken = sum((rate[flow] * d[link] for flow, d in demand.items() if link in d and flow in rate), Fraction(0))
            if rising:
                level[link] = (Fraction(most) - taken) / rising
        lowest = min(level.values())
        full = {link for link in level if level[link] == lowest}
        rate |= {flow: lowest for flow, d in demand.items() if flow not in rate and full & set(d)}
    return rate


def exactly(tasks: TaskGraph) -> tuple[list[Fraction], list[Fraction]]:
    """Simulate in fractions: at each moment share everything anew. No two things in order may happen at one time."""
    state, woken = beginning(tasks)
    agenda = [(Fraction(0), task) for task in woken]
    free = [Fraction(0)] * len(tasks.resources)
    left: dict[int, Fraction] = {}
    now = Fraction(0)
    while agenda or left:
        capacity = tasks.resources.capacity.tolist()
        rate = progressive_filling({flow: demands(tasks, flow) for flow in left}, capacity)
        ends = [now + left[flow] / rate[flow] for flow in left]
        then = min([*ends, *(moment for moment, _ in agenda)])
        left = {flow: left[flow] - rate[flow] * (then - now) for flow in left}
        now = then
        over = [flow for flow in left if left[flow] == 0]
        begin = [task for moment, task in agenda if moment == now]
        agenda = [entry for entry in agenda if entry[0] > now]
        for flow in over:
            del left[flow]
            state[flow].finish = now + Fraction(latency_of(tasks, flow))
        for task in begin:
            path, amount = path_of(tasks, task), Fraction(float(tasks.amount[task]))
            if tasks.resources.fair[path[0]]:
                state[task].start, left[task] = now, amount
                continue
            state[task].start = start = max([now, *(free[each] for each in path)])
            held = [
                amount / Fraction(float(tasks.resources.capacity[each]))
                + Fraction(float(tasks.resources.overhead_s[each]))
                for each in path
            ]
            for each, time_s in zip(path, held, strict=True):
                free[each] = start + time_s
            state[task].finish = start + max(held) + Fraction(latency_of(tasks, task))
            over.append(task)
        for task in over:
            for waiter in released(tasks, state, task):
                blockers = [other for other in range(tasks.tasks) if waiter in waiters_of(tasks, other)]
                agenda.append((max(state[other].finish for other in blockers), waiter))
    return [each.start for each in state], [each.finish for each in state]


@st.composite
def graphs(
    draw: st.DrawFn,
    *,
    sharing: Sequence[bool],
    least: int = 1,
    most: int = 12,
    uneven: bool = False,
    alone: bool = False,
    apart: bool = False,
) -> TaskGraph:
    """Draw tasks in any order of numbers that wait for each other without a circle, some of them joins.

    They hold one to three of up to four resources of a kind in `sharing` (fair or in order); with `apart` each
    has resources of its own. With `uneven`, amounts and latencies are such that no two things that happen in
    order happen at one time, unless one wakes both; with `alone` each wakes one at most.
    """
    tasks, joins = draw(st.integers(0, most)), draw(st.integers(0, 3))
    kinds = draw(st.lists(st.sampled_from(list(sharing)), min_size=4, max_size=4))
    per_kind = [[each for each in range(4) if kinds[each] == kind] for kind in (False, True)]
    paths = []
    for task in range(tasks):
        choices = draw(st.sampled_from([kind for kind in per_kind if kind]))
        path = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=3, unique=True))
        paths.append([4 * task + each for each in path] if apart else path)
    resources = 4 * tasks if apart else 4
    every = tasks + joins
    rank = draw(st.permutations(range(every)))
    ends = st.integers(0, max(every - 1, 0))
    waits = [
        (one, other)
        for one, other in draw(st.lists(st.tuples(ends, ends), max_size=20))
        if every and rank[one] < rank[other]
    ]
    if alone:
        waits = [pair for i, pair in enumerate(waits) if pair[0] not in {before for before, _ in waits[:i]}]
    sized: dict[str, Any] = {"min_size": tasks, "max_size": tasks}
    amount = np.array(draw(st.lists(st.integers(least, 9), **sized)), dtype=np.float64)
    latency_s = np.array(draw(st.lists(st.integers(min(least, 1), 5), **sized)), dtype=np.float64)
    if uneven:  # dyadic, so that sums are exact
        noise = np.random.default_rng(draw(st.integers(0, 2**32))).integers(1, 2**24, (2, tasks)) / 2**24
        amount, latency_s = amount + noise[0], latency_s + noise[1]
    count: dict[str, Any] = {"min_size": 4, "max_size": 4}
    times_apart = max(resources // 4, 1)
    return graph(
        amount.tolist(),
        paths,
        waits,
        latency_s=latency_s.tolist(),
        capacity=draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), **count)) * times_apart,
        overhead_s=draw(st.lists(st.sampled_from([0.0, 0.0, 0.25, 2.0]), **count)) * times_apart,
        fair=kinds * times_apart,
        joins=joins,
    )
