"""The engine: `TaskGraph` -> `Timeline`. It knows resources and waits, nothing of training or networks.

A task becomes ready when all that it waits for has finished. It then takes every resource of its route at
once, as soon as all of them are free, first come, first served; holds them for `duration_s`; and finishes
`latency_s` after it has let them go. Order is total and repeatable: by (time ready, task number).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

from distsim.errors import DeadlockError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Index = npt.NDArray[np.int64]

COMPILE_FROM_TASKS = 20_000
"""Below this many tasks, interpreting the loop takes less time than loading the compiled one (measured:
about 0.5 million tasks a second interpreted, 0.3 s to load Numba's cached code)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TaskGraph:
    """Tasks, each a duration on a route of resources, and what each of them waits for."""

    duration_s: Floats
    """How long each task holds its route, shape (tasks,)."""
    latency_s: Floats
    """How long after letting go of its route each task finishes, shape (tasks,)."""
    route: Ints
    """Each task's route: an index into the route table; tasks share routes."""
    route_ptr: Ints
    route_resources: Ints
    """Resources of route i: route_resources[route_ptr[i]:route_ptr[i + 1]]; may be none."""
    resources: int
    """Number of resources."""
    before: Ints
    after: Ints
    """Waits: task after[i] starts only once task before[i] has finished."""
    describe: Callable[[int], str] = "task {}".format
    """The name of a task in error messages."""

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.duration_s)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """When each task took its route and when it finished, in seconds from the start of the run."""

    start_s: Floats
    finish_s: Floats

    @property
    def makespan_s(self) -> float:
        """When the last task finished; 0 for no tasks."""
        return float(self.finish_s.max(initial=0.0))


def run(graph: TaskGraph, compiled: bool | None = None) -> Timeline:
    """Run a task graph to its end.

    `compiled` chooses the compiled or the interpreted loop, which give the same bytes; by default the size
    decides, so that a small simulation never waits for the compiler.

    Raises: DeadlockError naming the tasks of a waiting cycle if some task can never start.
    """
    if compiled is None:
        compiled = graph.tasks >= COMPILE_FROM_TASKS
    next_ptr, following = _successors(graph)
    waiting = np.bincount(graph.after, minlength=graph.tasks)
    columns = (graph.duration_s, graph.latency_s, graph.route, graph.route_ptr, graph.route_resources)
    zeros = np.zeros(graph.tasks)
    state = (next_ptr, following, waiting.copy(), zeros.copy(), zeros, np.zeros(graph.resources))
    loop = _compiled_loop() if compiled else _loop
    # Lists make the interpreted loop several times faster than NumPy scalars do.
    arguments = columns + state if compiled else tuple(column.tolist() for column in columns + state)
    start, finish, finished = loop(*arguments)
    if finished < graph.tasks:
        raise DeadlockError(_waiting_cycle(graph, waiting, next_ptr, following))
    return Timeline(start_s=np.asarray(start), finish_s=np.asarray(finish))


def _loop(
    duration: Any,
    latency: Any,
    route: Any,
    route_ptr: Any,
    route_resources: Any,
    next_ptr: Any,
    following: Any,
    waiting: Any,
    ready_s: Any,
    finish_s: Any,
    free_s: Any,
) -> Any:
    """The whole event loop: plain Python that Numba compiles as it stands."""
    ready = [(0.0, 0) for _ in range(0)]  # empty, and typed for the compiler
    for task in range(len(waiting)):
        if waiting[task] == 0:
            heappush(ready, (0.0, task))
    finished = 0
    while len(ready) > 0:
        start, task = heappop(ready)
        first, last = route_ptr[route[task]], route_ptr[route[task] + 1]
        for i in range(first, last):
            start = max(start, free_s[route_resources[i]])
        for i in range(first, last):
            free_s[route_resources[i]] = start + duration[task]
        finish = start + duration[task] + latency[task]
        ready_s[task] = start  # from here on the column means: when it started
        finish_s[task] = finish
        finished += 1
        for i in range(next_ptr[task], next_ptr[task + 1]):
            waiter = following[i]
            ready_s[waiter] = max(ready_s[waiter], finish)
            waiting[waiter] -= 1
            if waiting[waiter] == 0:
                heappush(ready, (ready_s[waiter], waiter))
    return ready_s, finish_s, finished


@cache
def _compiled_loop() -> Callable[..., Any]:
    """The loop compiled by Numba; from Numba's cache where the machine lets it keep one."""
    import numba

    try:
        compiled: Callable[..., Any] = numba.njit(cache=True)(_loop)
    except RuntimeError:  # no folder that can be written: compile anew in each process
        compiled = numba.njit(_loop)
    return compiled


def _successors(graph: TaskGraph) -> tuple[Index, Index]:
    """Who waits for task i: following[next_ptr[i]:next_ptr[i + 1]], in ascending task number."""
    order = np.lexsort((graph.after, graph.before))
    counts = np.bincount(graph.before, minlength=graph.tasks)
    return np.concatenate(([0], np.cumsum(counts))), graph.after[order].astype(np.int64)


def _waiting_cycle(graph: TaskGraph, waiting: Index, next_ptr: Index, following: Index) -> str:
    """Find one cycle of tasks that wait for each other and say who waits for whom."""
    waiting = waiting.copy()
    ready: list[int] = np.flatnonzero(waiting == 0).tolist()
    while ready:
        task = ready.pop()
        for waiter in following[next_ptr[task] : next_ptr[task + 1]].tolist():
            waiting[waiter] -= 1
            if waiting[waiter] == 0:
                ready.append(waiter)
    stuck = waiting > 0
    blocked_by = {
        int(after): int(before)
        for before, after in zip(graph.before[stuck[graph.before]], graph.after[stuck[graph.before]], strict=True)
    }
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
