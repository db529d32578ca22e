"""Chains of tasks that wait for each other: the one that decided when a run was over, and the longest of latencies."""

from __future__ import annotations

from typing import Any

import numpy as np

from distsim.compiled import call
from distsim.engine import Timeline
from distsim.errors import DeadlockError
from distsim.taskgraph import TaskGraph, waiting_cycle


def path(graph: TaskGraph, timeline: Timeline) -> list[int]:
    """Return the tasks of the critical path, first to last; of several that finish last, the lowest number."""
    if not graph.tasks:
        return []
    nobody = np.full(graph.tasks, -1, np.int32)
    let_go_s = timeline.finish_s[: len(graph.route)] - graph.routes.latency_s[graph.route]
    times = (timeline.finish_s, let_go_s, nobody, np.zeros(graph.tasks))
    columns = (graph.next_ptr, graph.following, graph.next_in_line)
    last = np.asarray(call(_last_before, graph.tasks + len(graph.following), *columns, *times))
    chain = [int(np.argmax(timeline.finish_s))]
    while last[chain[-1]] >= 0:
        chain.append(int(last[chain[-1]]))
    return chain[::-1]


def longest_chain_s(graph: TaskGraph) -> float:
    """Return the longest chain of latencies in a graph, in seconds: its makespan if amounts took no time.

    Raises: DeadlockError as `run` does.
    """
    columns = (
        graph.routes.latency_s,
        graph.route,
        graph.waits.copy(),
        graph.next_ptr,
        graph.following,
        graph.next_in_line,
    )
    arguments = (*columns, np.zeros(graph.tasks), np.empty(graph.tasks, np.int32))
    longest, waits = call(_longest_chain, graph.tasks, *arguments)
    left = np.asarray(waits)
    if (left > 0).any():
        raise DeadlockError(waiting_cycle(graph, left))
    return float(longest)


def _last_before(
    next_ptr: Any, following: Any, next_in_line: Any, finish_s: Any, let_go_s: Any, last: Any, until_s: Any
) -> Any:
    """Return for each task the one that it waits for longest, the lowest number among equals.

    What is next in line waits until the one before has let go of its route, everybody else until it has finished.
    """
    for task in range(len(finish_s)):
        begin = next_ptr[task]
        for i in range(begin - 1, next_ptr[task + 1]):
            if i < begin:
                waiter = next_in_line[task] if task < len(next_in_line) else -1
                if waiter < 0:
                    continue
                until = let_go_s[task]
            else:
                waiter, until = following[i], finish_s[task]
            if last[waiter] < 0 or until > until_s[waiter]:
                last[waiter], until_s[waiter] = task, until
    return last


def _longest_chain(
    latency_s: Any,
    route: Any,
    waits: Any,
    next_ptr: Any,
    following: Any,
    next_in_line: Any,
    ready_s: Any,
    queue: Any,
) -> Any:
    """Return the greatest sum of latencies along a chain of waits, and for how many others each task waits.

    `ready_s` comes as zeros; `queue` is room for all tasks.
    """
    timed, longest, end = len(route), 0.0, 0
    for task in range(len(waits)):
        if waits[task] == 0:
            queue[end] = task
            end += 1
    position = 0
    while position < end:
        task = queue[position]
        position += 1
        start = finish = ready_s[task]
        if task < timed:
            finish += latency_s[route[task]]
        longest = max(longest, finish)
        begin = next_ptr[task]
        for i in range(begin - 1, next_ptr[task + 1]):
            if i < begin:
                waiter = next_in_line[task] if task < timed else -1
                if waiter < 0:
                    continue
                ready_s[waiter] = max(ready_s[waiter], start)
            else:
                waiter = following[i]
                ready_s[waiter] = max(ready_s[waiter], finish)
            waits[waiter] -= 1
            if waits[waiter] == 0:
                queue[end] = waiter
                end += 1
    return longest, waits
