"""The engine: `TaskGraph` -> `Timeline`. It knows resources and waits, nothing of training or networks.

A task becomes ready when all that it waits for has finished, and the one before it in its line has let go of its
route. It then moves its `amount` over all resources of
its route at once (cut-through), and finishes the route's `latency_s` after the last of it. Resources are of two
kinds:

- fair: tasks that hold a resource at the same time share it max-min fairly: all rates rise together until a
  resource is full, the tasks on it keep that rate, and the others go on rising (progressive filling; Bertsekas
  and Gallager, "Data Networks", 1992, section 6.5.2);
- in order: a task takes its resources once all of them are free, first come, first served, and keeps each for
  as long as its amount takes there.

A resource with an overhead is busy that much longer for each task. Order is total and repeatable: by time, and at
one time in the order in which things were scheduled (tasks that wait for nothing by number). The loop itself is in
loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.compiled import COMPILE_FROM, call
from distsim.errors import DeadlockError
from distsim.loop import run_tasks
from distsim.taskgraph import Floats, TaskGraph, waiting_cycle

ROOM = 1024
"""Events and flows at once that the loop has room for beyond those that it starts with. Where that is not enough
it starts over with more: growing inside the loop makes compiled code twenty times slower (reference counts)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Timeline:
    """When each task took its route and when it finished, in seconds from the start of the run; shape (tasks,)."""

    start_s: Floats
    finish_s: Floats

    @property
    def makespan_s(self) -> float:
        """When the last task finished; 0 for no tasks."""
        return float(self.finish_s.max(initial=0.0))


class Links(NamedTuple):
    """State of each resource."""

    free_s: Any
    """In order: when it is free again."""
    first_place: Any
    """Fair: the first flow on it, -1 for none."""
    flows_on: Any
    """How many flows are on it."""
    seen: Any
    """The last turn of sharing in which it took part."""
    left: Any
    weight: Any
    rising_on: Any
    """While sharing: capacity not yet given away, demand of the flows whose rates still rise, their number."""


class Flows(NamedTuple):
    """State of the flows under way, one slot each. Place slot * hops + hop is its entry in that resource's list."""

    task: Any
    rate: Any
    to_move: Any
    """Amount left at `since_s`."""
    since_s: Any
    due_s: Any
    """When it ends at its present rate."""
    leads: Any
    """Whether its component's event is in its name."""
    follows: Any
    """The next flow that ends with it, -1 for none."""
    seen: Any
    next_place: Any
    before_place: Any
    """Per place: its neighbours, -1 for none."""
    spare: Any
    """Slots that are free."""


class Agenda(NamedTuple):
    """What is to happen: entries, and buckets of them in a heap."""

    number: Any
    next: Any
    """Per entry: what, and the next entry of its bucket, or of those to spare."""
    bucket_s: Any
    bucket_serial: Any
    bucket_entry: Any
    """Per bucket, in the order of the heap: when, how many were opened before it, and its first entry."""


class Lists(NamedTuple):
    """Room for the tasks that finish together, what has changed, and the flows of a component."""

    finished: Any
    changed: Any
    members: Any


def run(graph: TaskGraph, compiled: bool | None = None, stopped: npt.NDArray[np.bool_] | None = None) -> Timeline:
    """Run a task graph to its end; tasks in `stopped`, shape (tasks,), never start, nor does what waits for them.

    `compiled` chooses the compiled or the interpreted loop, which give the same bytes; by default the size
    decides, so that a small simulation never waits for the compiler.

    Raises: DeadlockError naming the tasks of a waiting cycle if some task can never start, unless `stopped` is given.
    """
    resources, routes = graph.resources, graph.routes
    hops = int(np.diff(routes.ptr).max(initial=1))
    at_once = int((graph.waits == 0).sum())
    if compiled is None:
        crowd = at_once if resources.fair.any() else 0  # each that ends may change the rates of all others
        compiled = graph.tasks + crowd * crowd // 32 >= COMPILE_FROM
    room, enough = ROOM + at_once, False
    to_wait_for = graph.waits if stopped is None else graph.waits + stopped  # a wait that nothing ends
    while not enough:
        start, finish, waits, enough = call(
            run_tasks,
            graph.tasks,
            graph.amount,
            graph.route,
            to_wait_for.copy(),
            graph.next_ptr,
            graph.following,
            graph.next_in_line,
            routes.ptr,
            routes.resources,
            routes.latency_s,
            resources.fair[routes.resources[routes.ptr[:-1]]],  # a route's first resource speaks for all of it
            resources.capacity,
            resources.overhead_s,
            np.zeros(graph.tasks),
            np.zeros(graph.tasks),
            _links(len(resources)),
            _flows(min(len(graph.amount), room), hops),
            _agenda(room),
            Lists(*(np.zeros(room, np.int64) for _ in range(3))),
            hops,
            compiled=compiled,
        )
        room *= 8
    left = np.asarray(waits)
    start_s, finish_s = np.asarray(start), np.asarray(finish)
    finish_s[: len(graph.route)] += routes.latency_s[graph.route]
    if stopped is not None:
        never = left > 0
        return Timeline(start_s=np.where(never, np.nan, start_s), finish_s=np.where(never, np.nan, finish_s))
    if (left > 0).any():
        raise DeadlockError(waiting_cycle(graph, left))
    return Timeline(start_s=start_s, finish_s=finish_s)


def queued(graph: TaskGraph, timeline: Timeline) -> bool:
    """Return whether any task was ready before it could take resources in order: it stood in line for them."""
    routes = graph.routes
    in_order = np.flatnonzero(~graph.resources.fair[routes.resources[routes.ptr[:-1]]][graph.route])
    if not len(in_order):
        return False
    ready_s = np.zeros(graph.tasks)
    np.maximum.at(ready_s, graph.following, np.repeat(timeline.finish_s, np.diff(graph.next_ptr)))
    ahead = np.flatnonzero(graph.next_in_line >= 0)
    let_go_s = timeline.finish_s[ahead] - routes.latency_s[graph.route[ahead]]
    np.maximum.at(ready_s, graph.next_in_line[ahead], let_go_s)
    return bool((timeline.start_s[in_order] > ready_s[in_order] * (1 + 1e-12)).any())


def _agenda(room: int) -> Agenda:
    number, serial, entry = (np.zeros(room, np.int64) for _ in range(3))
    return Agenda(number, np.arange(1, room + 1), np.zeros(room), serial, entry)


def _links(count: int) -> Links:
    free_s, left, weight = (np.zeros(count) for _ in range(3))
    first_place, flows_on, seen, rising_on = (np.zeros(count, np.int64) for _ in range(4))
    return Links(free_s, first_place - 1, flows_on, seen, left, weight, rising_on)


def _flows(slots: int, hops: int) -> Flows:
    task, follows, seen = (np.zeros(slots, np.int64) for _ in range(3))
    rate, to_move, since_s, due_s = (np.zeros(slots) for _ in range(4))
    after, before = (np.zeros(slots * hops, np.int64) for _ in range(2))
    spare = np.arange(slots)[::-1].copy()
    return Flows(task, rate, to_move, since_s, due_s, np.zeros(slots, np.bool_), follows, seen, after, before, spare)
