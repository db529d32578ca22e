"""TaskGraph: tasks, the resources that they hold, and what each of them waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.compiled import call

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Resources:
    """What tasks hold: links, processors, hosts."""

    capacity: Floats
    """Amount per second, shape (resources,); inf for one in order that never limits."""
    overhead_s: Floats
    """How much longer each task keeps a resource busy."""
    fair: npt.NDArray[np.bool_]
    """Whether tasks share it max-min fairly; otherwise they take it in order."""
    describe: Callable[[int], str] = "resource {}".format

    def __len__(self) -> int:
        return len(self.capacity)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Routes:
    """Sets of resources that tasks hold at once; tasks share routes. A route is fair or in order, never both."""

    ptr: Index
    resources: Ints
    """Resources of route i: resources[ptr[i]:ptr[i + 1]]; at least one."""
    latency_s: Floats
    """How long after letting go of route i a task finishes, shape (routes,)."""


class Edges(NamedTuple):
    """Columns of waits: task `after[i] + after_from` waits for task `before[i] + before_from`; -1 is no wait."""

    before: npt.NDArray[Any]
    after: npt.NDArray[Any]
    before_from: int = 0
    after_from: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskGraph:
    """Tasks and what each of them waits for. The first `len(amount)` have a route; the rest, joins, take no time."""

    amount: Floats
    """What each task with a route moves, in its resources' unit; more than nothing where it shares them."""
    route: Ints
    """Over which route."""
    resources: Resources
    routes: Routes
    waits: Ints
    """Per task, joins included: for how many others it waits."""
    next_ptr: Ints
    following: Ints
    """Who waits for task i: following[next_ptr[i]:next_ptr[i + 1]]."""
    next_in_line: Ints
    """Per task with a route: the one that may start when it lets go of its route, before its latency; -1 for none."""
    describe: Callable[[int], str] = "task {}".format
    """The name of a task in messages."""

    @staticmethod
    def of(
        *,
        amount: Floats,
        route: Ints,
        resources: Resources,
        routes: Routes,
        edges: Sequence[Edges],
        joins: int = 0,
        lines: npt.NDArray[np.integer] | None = None,
        describe: Callable[[int], str] = "task {}".format,
    ) -> TaskGraph:
        """Build a graph from columns of waits.

        `lines` puts the first tasks into lines, by number: those of a line start one after another, in their order.
        """
        tasks = len(amount) + joins
        waits, next_ptr = np.zeros(tasks, np.int32), np.zeros(tasks + 2, np.int32)
        next_in_line = np.full(len(amount), -1, np.int32)
        if lines is not None and len(lines):
            last = np.full(int(lines.max()) + 1, -1, np.int32)
            lined = call(_line_up, len(lines), lines, last, next_in_line, waits)
            next_in_line, waits = (np.asarray(column, np.int32) for column in lined)
        for each in edges:
            counted = call(_count, len(each.before), *each, waits, next_ptr)
            waits, next_ptr = np.asarray(counted[0], np.int32), np.asarray(counted[1], np.int32)
        assert sum(len(each.before) for each in edges) < 2**31, "more waits than 32-bit numbers can count"
        np.cumsum(next_ptr, out=next_ptr)
        following = np.zeros(int(next_ptr[-1]), np.int32)
        for each in edges:
            filled = call(_fill, len(each.before), *each, next_ptr, following)
            next_ptr, following = np.asarray(filled[0], np.int32), np.asarray(filled[1], np.int32)
        return TaskGraph(
            amount=amount,
            route=route,
            resources=resources,
            routes=routes,
            waits=waits,
            next_ptr=next_ptr[:-1],
            following=following,
            next_in_line=next_in_line,
            describe=describe,
        )

    @property
    def tasks(self) -> int:
        """Number of tasks, joins included."""
        return len(self.waits)


def _line_up(lines: Any, last: Any, next_in_line: Any, waits: Any) -> Any:
    """Let each task wait for the one before it in its line; `last` is -1 for every line."""
    for task in range(len(lines)):
        before = last[lines[task]]
        if before >= 0:
            next_in_line[before] = task
            waits[task] += 1
        last[lines[task]] = task
    return next_in_line, waits


def _count(before: Any, after: Any, before_from: int, after_from: int, waits: Any, next_ptr: Any) -> Any:
    """Count the waits of each task, and those who wait for it two places further on."""
    for i in range(len(before)):
        if before[i] >= 0 and after[i] >= 0:
            waits[after[i] + after_from] += 1
            next_ptr[before[i] + before_from + 2] += 1
    return waits, next_ptr


def _fill(before: Any, after: Any, before_from: int, after_from: int, next_ptr: Any, following: Any) -> Any:
    """Enter who waits for each task; the pointer one place further on ends where it belongs."""
    for i in range(len(before)):
        if before[i] >= 0 and after[i] >= 0:
            following[next_ptr[before[i] + before_from + 1]] = after[i] + after_from
            next_ptr[before[i] + before_from + 1] += 1
    return next_ptr, following


def waiting_cycle(graph: TaskGraph, waits: npt.NDArray[Any]) -> str:
    """Find one cycle among the tasks that still wait (`waits` > 0) and say who waits for whom."""
    stuck = waits > 0
    before = np.repeat(np.arange(graph.tasks), np.diff(graph.next_ptr))
    held = stuck[before] & stuck[graph.following]
    blocked_by = dict(zip(graph.following[held].tolist(), before[held].tolist(), strict=True))
    ahead = np.flatnonzero(graph.next_in_line >= 0)
    behind = graph.next_in_line[ahead]
    both = stuck[ahead] & stuck[behind]
    blocked_by = dict(zip(behind[both].tolist(), ahead[both].tolist(), strict=True)) | blocked_by
    path: dict[int, int] = {}
    task = int(np.argmax(stuck))
    while task not in path:
        path[task] = len(path)
        task = blocked_by[task]
    cycle = list(path)[path[task] :]
    lines = [
        f"  {graph.describe(waiter)} waits for {graph.describe(cycle[(i + 1) % len(cycle)])}"
        for i, waiter in enumerate(cycle[:20])
    ]
    more = [f"  ... and {len(cycle) - 20} more"] if len(cycle) > 20 else []
    head = f"{int(stuck.sum())} of {graph.tasks} tasks can never start; {len(cycle)} of them wait in a circle:"
    return "\n".join([head, *lines, *more])
