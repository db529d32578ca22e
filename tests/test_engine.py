"""The engine: closed forms, two references written differently, both loops alike, and who waits for whom."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import engine
from distsim.engine import COMPILE_FROM_TASKS, TaskGraph, Timeline, run
from distsim.errors import DeadlockError


def graph(
    duration_s: Sequence[float],
    routes: Sequence[Sequence[int]] = (),
    waits: Sequence[tuple[int, int]] = (),
    latency_s: Sequence[float] = (),
    **more: Any,
) -> TaskGraph:
    """Build a graph in which task i has routes[i], by default none; `waits` are pairs (before, after)."""
    tasks = len(duration_s)
    paths = [list(path) for path in routes] or [[] for _ in range(tasks)]
    pairs = np.array(waits, dtype=np.int32).reshape(-1, 2)
    return TaskGraph(
        duration_s=np.array(duration_s, dtype=np.float64),
        latency_s=np.array(latency_s if len(latency_s) else [0.0] * tasks, dtype=np.float64),
        route=np.arange(tasks, dtype=np.int32),
        route_ptr=np.cumsum([0, *map(len, paths)]).astype(np.int32),
        route_resources=np.array([resource for path in paths for resource in path], dtype=np.int32),
        resources=1 + max((resource for path in paths for resource in path), default=-1),
        before=pairs[:, 0],
        after=pairs[:, 1],
        **more,
    )


def times(timeline: Timeline) -> tuple[list[float], list[float]]:
    return timeline.start_s.tolist(), timeline.finish_s.tolist()


def test_nothing_takes_no_time() -> None:
    timeline = run(graph([]))
    assert times(timeline) == ([], [])
    assert timeline.makespan_s == 0.0


def test_a_chain_adds_up() -> None:
    chain = graph([1, 2, 3], [[0], [1], [2]], [(0, 1), (1, 2)], [10, 20, 30])
    assert times(run(chain)) == ([0, 11, 33], [11, 33, 66])
    assert run(chain).makespan_s == 66


def test_one_resource_serves_one_after_the_other() -> None:
    assert times(run(graph([3, 1, 2], [[0]] * 3))) == ([0, 3, 4], [3, 4, 6])


def test_without_resources_all_run_at_once() -> None:
    assert times(run(graph([3, 1, 2]))) == ([0, 0, 0], [3, 1, 2])


def test_a_route_is_taken_as_a_whole() -> None:
    """Task 1 needs both resources and so waits for both; task 2 came later and waits for it."""
    busy = graph([4, 1, 1], [[0], [0, 1], [1]])
    assert times(run(busy)) == ([0, 4, 5], [4, 5, 6])


def test_latency_follows_when_the_route_is_free_again() -> None:
    assert times(run(graph([2, 2], [[0], [0]], latency_s=[10, 0]))) == ([0, 2], [12, 4])
    assert times(run(graph([2, 2], [[0], [0]], [(0, 1)], latency_s=[10, 0]))) == ([0, 12], [12, 14])


def test_first_come_first_served_then_by_number() -> None:
    # Tasks 1 and 2 become ready together, at 5; task 3 was ready before them; task 0 holds the resource till 9.
    late = graph([9, 1, 1, 1, 5, 4], [[0], [0], [0], [0], [], []], [(4, 1), (4, 2), (5, 3)])
    assert run(late).start_s.tolist() == [0, 10, 11, 9, 0, 0]


def test_what_was_ready_first_goes_first_even_if_it_still_waits_for_another_resource() -> None:
    """First come, first served per resource: nobody slips past the head of a queue."""
    queue = graph([5, 1, 1], [[0], [0, 1], [1]], [], [])
    assert run(queue).start_s.tolist() == [0, 5, 6]


def test_tasks_that_take_no_time() -> None:
    zero = graph([0, 0, 0, 1], [[0], [0], [], [0]], [(0, 1), (1, 2), (2, 3)])
    assert times(run(zero)) == ([0, 0, 0, 0], [0, 0, 0, 1])
    # What becomes ready at the same time is served by number, however it became ready.
    assert run(graph([0, 5, 7, 1], [[], [0], [0], []], [(0, 1)])).start_s.tolist() == [0, 0, 5, 0]


@dataclass
class Waiting:
    """A task's state in the queueing reference."""

    blockers: int
    queued: bool = False


def queues(tasks: TaskGraph) -> tuple[list[float], list[float]]:
    """Simulate with a clock and a queue for each resource; for durations above zero.

    At each moment: what is over lets go and wakes who waited for it; the woken join the queues of their
    resources, by number; then whoever is first in all of its queues, and finds them idle, starts.
    """
    paths = [route_of(tasks, i) for i in range(tasks.tasks)]
    line: list[deque[int]] = [deque() for _ in range(tasks.resources)]
    idle = [True] * tasks.resources
    state = [Waiting(int((tasks.after == i).sum())) for i in range(tasks.tasks)]
    start, finish = [-1.0] * tasks.tasks, [-1.0] * tasks.tasks
    events = {0.0}
    while events:
        now = min(events)
        events.remove(now)
        for i in range(tasks.tasks):
            if start[i] >= 0 and start[i] + float(tasks.duration_s[i]) == now:
                for resource in paths[i]:
                    idle[resource] = True
            if finish[i] == now:
                for waiter in tasks.after[tasks.before == i].tolist():
                    state[waiter].blockers -= 1
        for i in range(tasks.tasks):
            if not state[i].blockers and not state[i].queued:
                state[i].queued = True
                for resource in paths[i]:
                    line[resource].append(i)
        for i in range(tasks.tasks):
            if not state[i].queued or start[i] >= 0:
                continue
            if all(line[resource][0] == i and idle[resource] for resource in paths[i]):
                start[i] = now
                for resource in paths[i]:
                    idle[resource] = False
                    line[resource].popleft()
                finish[i] = now + float(tasks.duration_s[i]) + float(tasks.latency_s[i])
                events |= {now + float(tasks.duration_s[i]), finish[i]}
    return start, finish


def scan(tasks: TaskGraph) -> tuple[list[float], list[float]]:
    """Look at all tasks again and again: of those whose blockers have run, the one ready first runs next."""
    start: dict[int, float] = {}
    finish: dict[int, float] = {}
    free = [0.0] * tasks.resources
    while len(start) < tasks.tasks:
        ready = []
        for i in range(tasks.tasks):
            blockers = tasks.before[tasks.after == i].tolist()
            if i not in start and all(blocker in finish for blocker in blockers):
                ready.append((max([0.0, *(finish[blocker] for blocker in blockers)]), i))
        moment, i = min(ready)
        start[i] = max([moment, *(free[resource] for resource in route_of(tasks, i))])
        for resource in route_of(tasks, i):
            free[resource] = start[i] + float(tasks.duration_s[i])
        finish[i] = start[i] + float(tasks.duration_s[i]) + float(tasks.latency_s[i])
    return [start[i] for i in range(tasks.tasks)], [finish[i] for i in range(tasks.tasks)]


def route_of(tasks: TaskGraph, i: int) -> list[int]:
    route = int(tasks.route[i])
    path: list[int] = tasks.route_resources[tasks.route_ptr[route] : tasks.route_ptr[route + 1]].tolist()
    return path


@st.composite
def graphs(draw: st.DrawFn, least: int = 0) -> TaskGraph:
    """Draw tasks in any order of numbers that wait for each other without a circle, on up to 4 resources."""
    tasks = draw(st.integers(0, 12))
    resources = draw(st.integers(1, 4))
    path = st.lists(st.integers(0, resources - 1), max_size=3, unique=True)
    rank = draw(st.permutations(range(tasks)))
    waits = [
        (one, other)
        for one, other in draw(st.lists(st.tuples(*[st.integers(0, max(tasks - 1, 0))] * 2), max_size=16))
        if tasks and rank[one] < rank[other]
    ]
    size: dict[str, Any] = {"min_size": tasks, "max_size": tasks}
    return graph(
        draw(st.lists(st.integers(least, 5), **size)),
        draw(st.lists(path, **size)),
        waits,
        draw(st.lists(st.integers(0, 5), **size)),
    )


@settings(max_examples=300)
@given(graphs(least=1))
def test_the_engine_does_what_queues_do(tasks: TaskGraph) -> None:
    assert times(run(tasks)) == queues(tasks)


@settings(max_examples=200)
@given(graphs())
def test_the_engine_runs_in_the_order_of_time_and_number(tasks: TaskGraph) -> None:
    """Zero durations included, where `queues` has no say on what happens within one moment."""
    assert times(run(tasks)) == scan(tasks)


@settings(max_examples=100)
@given(graphs(), st.floats(0.001, 1000))
def test_the_compiled_loop_gives_the_same_bytes(tasks: TaskGraph, unit: float) -> None:
    uneven = np.random.default_rng(tasks.tasks).random(tasks.tasks) * unit
    tasks.duration_s[:] *= uneven
    interpreted, compiled = run(tasks, compiled=False), run(tasks, compiled=True)
    assert interpreted.start_s.tobytes() == compiled.start_s.tobytes()
    assert interpreted.finish_s.tobytes() == compiled.finish_s.tobytes()
    assert interpreted.start_s.dtype == compiled.start_s.dtype == np.float64
    assert run(tasks).finish_s.tobytes() == interpreted.finish_s.tobytes()


@given(graphs())
def test_the_graph_is_left_as_it_was(tasks: TaskGraph) -> None:
    before = [column.tobytes() for column in (tasks.duration_s, tasks.latency_s, tasks.route, tasks.before)]
    run(tasks)
    run(tasks, compiled=False)
    assert before == [column.tobytes() for column in (tasks.duration_s, tasks.latency_s, tasks.route, tasks.before)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_deadlock_names_the_tasks_of_the_circle(compiled: bool) -> None:
    # 1 -> 2 -> 3 -> 1 is the circle; 4 waits for it, 0 and 5 run.
    stuck = graph([1] * 6, [], [(0, 1), (1, 2), (2, 3), (3, 1), (3, 4), (0, 5)], describe="the {} thing".format)
    with pytest.raises(DeadlockError) as caught:
        run(stuck, compiled)
    head, *lines = str(caught.value).splitlines()
    assert head == "4 of 6 tasks can never start; 3 of them wait in a circle:"
    assert sorted(lines) == [
        "  the 1 thing waits for the 3 thing",
        "  the 2 thing waits for the 1 thing",
        "  the 3 thing waits for the 2 thing",
    ]
    # Each line goes on where the last one ended.
    ends = [line.strip().split(" waits for ") for line in lines]
    assert [end for _, end in ends] == [begin for begin, _ in [*ends[1:], ends[0]]]


def test_a_task_cannot_wait_for_itself() -> None:
    with pytest.raises(DeadlockError, match=r"1 of 2 .*1 of them wait in a circle:\n  task 1 waits for task 1$"):
        run(graph([1, 1], [], [(1, 1)]))


def test_a_long_circle_is_cut_short() -> None:
    n = 50
    circle = [(i, (i + 1) % n) for i in range(n)]
    with pytest.raises(DeadlockError, match=r"50 of them wait in a circle") as caught:
        run(graph([1] * n, [], circle))
    assert str(caught.value).splitlines()[-1] == "  ... and 30 more"
    assert len(str(caught.value).splitlines()) == 22


def big(tasks: int) -> TaskGraph:
    """One resource, tasks of 1 s; every tenth waits for the one before it."""
    later = np.arange(10, tasks, 10)
    return graph([1.0] * tasks, [[0]] * tasks, np.stack([later - 1, later], axis=1).tolist())


def test_large_graphs_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = []
    compiled = engine._compiled_loop

    def noted() -> Any:
        loops.append("compiled")
        return compiled()

    monkeypatch.setattr(engine, "_compiled_loop", noted)
    small, large = run(big(COMPILE_FROM_TASKS - 1)), run(big(100_000))
    assert loops == ["compiled"]
    assert small.makespan_s == COMPILE_FROM_TASKS - 1
    assert large.makespan_s == 100_000
    assert sorted(large.start_s.tolist()) == list(range(100_000))
    assert large.finish_s.tobytes() == run(big(100_000), compiled=False).finish_s.tobytes()


def test_a_small_graph_never_loads_the_compiler() -> None:
    code = """
import sys
import numpy as np
from distsim.engine import TaskGraph, run
none = np.zeros(0, dtype=np.int32)
one = TaskGraph(duration_s=np.ones(1), latency_s=np.ones(1), route=np.zeros(1, dtype=np.int32),
                route_ptr=np.zeros(2, dtype=np.int32), route_resources=none, resources=0, before=none, after=none)
assert run(one).makespan_s == 2.0
assert "numba" not in sys.modules
run(one, compiled=True)
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
