"""The engine: closed forms, references written differently, both loops alike, room, and who waits for whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import graph, graphs, latency_of, path_of, queues, times, waiters_of
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import engine
from distsim.chain import longest_chain_s
from distsim.compiled import COMPILE_FROM, call
from distsim.engine import Timeline, queued, run
from distsim.errors import DeadlockError
from distsim.taskgraph import Edges, TaskGraph

BOTH = (False, True)


def same_bytes(one: Timeline, other: Timeline) -> bool:
    return one.start_s.tobytes() == other.start_s.tobytes() and one.finish_s.tobytes() == other.finish_s.tobytes()


def test_nothing_takes_no_time() -> None:
    timeline = run(graph([], []))
    assert times(timeline) == ([], [])
    assert timeline.makespan_s == 0.0
    assert longest_chain_s(graph([], [])) == 0.0


@pytest.mark.parametrize("fair", BOTH)
def test_a_chain_adds_up(fair: bool) -> None:
    chain = graph([1, 2, 3], [[0], [1], [2]], [(0, 1), (1, 2)], latency_s=[10, 20, 30], fair=fair)
    assert times(run(chain)) == ([0, 11, 33], [11, 33, 66])
    assert run(chain).makespan_s == 66
    assert longest_chain_s(chain) == 60


def test_one_resource_serves_one_after_the_other() -> None:
    assert times(run(graph([3, 1, 2], [[0]] * 3))) == ([0, 3, 4], [3, 4, 6])


def test_a_route_is_taken_as_a_whole() -> None:
    """Task 1 needs both resources and so waits for both; task 2 came later and waits for it."""
    busy = graph([4, 1, 1], [[0], [0, 1], [1]])
    assert times(run(busy)) == ([0, 4, 5], [4, 5, 6])


@pytest.mark.parametrize("fair", BOTH)
def test_amounts_pass_at_a_resources_capacity(fair: bool) -> None:
    alone = graph([6, 6], [[0, 1], [2]], capacity=[2, 3, 0.5], fair=fair)
    assert times(run(alone)) == ([0, 0], [3, 12])
    # A task lasts as long as its slowest resource: 6 / 3 and 1 more, against 6 / 2.5.
    assert times(run(graph([6], [[0, 1]], capacity=[3, 2.5], overhead_s=[1, 0], fair=fair)))[1] == [3]


def test_each_resource_is_held_for_its_own_time() -> None:
    """Task 0 holds resource 0 for 1 s and resource 1 for 4 s; task 1 may have resource 0 after 1 s."""
    unequal = graph([4, 4, 1], [[0, 1], [0], [1]], capacity=[4, 1])
    assert times(run(unequal)) == ([0, 1, 4], [4, 2, 5])
    late = graph([4, 4, 1], [[0, 1], [0], [1]], capacity=[4, 1], overhead_s=[2, 0.5])
    assert times(run(late)) == ([0, 3, 4.5], [4.5, 6, 6])


def test_a_resource_without_limit_takes_no_time() -> None:
    assert times(run(graph([5, 7], [[0], [0]], capacity=[np.inf]))) == ([0, 0], [0, 0])


def test_latency_follows_when_the_route_is_free_again() -> None:
    assert times(run(graph([2, 2], [[0], [0]], latency_s=[10, 0]))) == ([0, 2], [12, 4])
    assert times(run(graph([2, 2], [[0], [0]], [(0, 1)], latency_s=[10, 0]))) == ([0, 12], [12, 14])


def test_first_come_first_served_then_in_the_order_of_scheduling() -> None:
    # Tasks 1 and 2 become ready together, at 5; task 3 was ready before them; task 0 holds the resource till 9.
    paths = [[0], [0], [0], [0], [1], [2]]
    late = graph([9, 1, 1, 1, 5, 4], paths, [(4, 1), (4, 2), (5, 3)])
    assert run(late).start_s.tolist() == [0, 10, 11, 9, 0, 0]
    # In the order of their waits, whatever their numbers.
    turned = graph([9, 1, 1, 1, 5, 4], paths, [(4, 2), (4, 1), (5, 3)])
    assert run(turned).start_s.tolist() == [0, 11, 10, 9, 0, 0]


@pytest.mark.parametrize("compiled", BOTH)
def test_what_was_scheduled_first_goes_first_though_something_else_came_between(compiled: bool) -> None:
    """Tasks 3 and 5 become ready at 5, task 4 at 7; they were scheduled in the order of their numbers."""
    between = graph([5, 7, 5, 1, 1, 1], [[0], [1], [2], [3], [3], [3]], [(0, 3), (1, 4), (2, 5)])
    assert run(between, compiled).start_s.tolist() == [0, 0, 0, 5, 7, 6]


def test_what_was_ready_first_goes_first_even_if_it_still_waits_for_another_resource() -> None:
    """First come, first served per resource: nobody slips past the head of a queue."""
    assert run(graph([5, 1, 1], [[0], [0, 1], [1]])).start_s.tolist() == [0, 5, 6]


def test_tasks_that_take_no_time() -> None:
    zero = graph([0, 0, 0, 1], [[0], [0], [1], [0]], [(0, 1), (1, 2), (2, 3)])
    assert times(run(zero)) == ([0, 0, 0, 0], [0, 0, 0, 1])
    # Task 1 becomes ready at 0 as task 2 does, but was scheduled later.
    assert run(graph([0, 5, 7, 1], [[1], [0], [0], [2]], [(0, 1)])).start_s.tolist() == [0, 7, 0, 0]


@pytest.mark.parametrize("fair", BOTH)
def test_joins_take_no_time_and_let_go_in_turn(fair: bool) -> None:
    # Tasks 0 and 1 (2 s and 3 s) -> join 3 -> join 4 -> task 2; join 5 waits for nothing, join 6 for join 5.
    joined = graph(
        [2, 3, 1], [[0], [1], [0]], [(0, 3), (1, 3), (3, 4), (4, 2), (5, 6)], latency_s=[0, 4, 0], fair=fair, joins=4
    )
    assert times(run(joined)) == ([0, 0, 7, 7, 7, 0, 0], [2, 7, 8, 7, 7, 0, 0])
    assert longest_chain_s(joined) == 4
    assert times(run(graph([], [], [(1, 0)], joins=2))) == ([0, 0], [0, 0])


@settings(max_examples=300)
@given(graphs(sharing=[False], uneven=True, alone=True))
def test_in_order_the_engine_does_what_queues_do(tasks: TaskGraph) -> None:
    start, finish = times(run(tasks))
    assert (start, finish) == queues(tasks)


def scan(tasks: TaskGraph) -> tuple[list[float], list[float]]:
    """Of all that is known to come, take what comes first; of one time, what was known first."""
    start, finish = [0.0] * tasks.tasks, [0.0] * tasks.tasks
    blockers = [[other for other in range(tasks.tasks) for w in waiters_of(tasks, other) if w == task]
                for task in range(tasks.tasks)]  # fmt: skip
    missing = [len(each) for each in blockers]
    known = [(0.0, task) for task in range(tasks.tasks) if not missing[task]]
    free = [0.0] * len(tasks.resources)
    while known:
        now, task = min(known, key=lambda entry: entry[0])  # the first of equals
        known.remove((now, task))
        start[task] = finish[task] = now
        if task < len(tasks.amount):
            path = path_of(tasks, task)
            held = [tasks.amount[task] / tasks.resources.capacity[r] + tasks.resources.overhead_s[r] for r in path]
            start[task] = max([now, *(free[resource] for resource in path)])
            for resource, time_s in zip(path, held, strict=True):
                free[resource] = start[task] + float(time_s)
            finish[task] = start[task] + float(max(held)) + latency_of(tasks, task)
        over = [task]
        for done in over:
            for waiter in waiters_of(tasks, done):
                missing[waiter] -= 1
                if missing[waiter]:
                    continue
                ready = max(finish[other] for other in blockers[waiter])
                if waiter < len(tasks.amount):
                    known.append((ready, waiter))
                else:
                    start[waiter] = finish[waiter] = ready
                    over.append(waiter)
    return start, finish


@settings(max_examples=300)
@given(graphs(sharing=[False], least=0))
def test_the_engine_runs_in_the_order_of_time_and_scheduling(tasks: TaskGraph) -> None:
    """Ties and amounts of zero included, where `queues` has no say on what happens within one moment."""
    assert times(run(tasks)) == scan(tasks)


def rough(tasks: TaskGraph, unit: float) -> TaskGraph:
    """Give a graph amounts that no binary fraction holds."""
    tasks.amount[:] *= unit * (0.5 + np.random.default_rng(tasks.tasks).random(len(tasks.amount)))
    return tasks


@settings(max_examples=150)
@given(graphs(sharing=BOTH, most=20), st.floats(0.001, 1000))
def test_the_compiled_loop_gives_the_same_bytes(tasks: TaskGraph, unit: float) -> None:
    interpreted, compiled = run(rough(tasks, unit), compiled=False), run(tasks, compiled=True)
    assert same_bytes(interpreted, compiled)
    assert same_bytes(interpreted, run(tasks, compiled=False))
    assert interpreted.start_s.dtype == compiled.start_s.dtype == np.float64
    assert interpreted.start_s.shape == compiled.finish_s.shape == (tasks.tasks,)


@settings(max_examples=100)
@given(graphs(sharing=BOTH, most=20), st.floats(0.001, 1000), st.booleans())
def test_too_little_room_gives_the_same_bytes(tasks: TaskGraph, unit: float, compiled: bool) -> None:
    rough(tasks, unit)
    with pytest.MonkeyPatch.context() as patch:
        wide = run(tasks, compiled=compiled)
        patch.setattr(engine, "ROOM", 1)
        assert same_bytes(run(tasks, compiled=compiled), wide)


def burst(flows: int, fair: bool) -> TaskGraph:
    """One task wakes many at once, of five sizes; each holds one of two links of its own choice, or both."""
    paths = [[2], *([[0], [1], [0, 1]][i % 3] for i in range(flows))]
    amount = [1.0, *(1.0 + i % 5 for i in range(flows))]
    return graph(amount, paths, [(0, 1 + i) for i in range(flows)], capacity=[2, 3, 1], fair=fair, joins=1)


@pytest.mark.parametrize("fair", BOTH)
def test_more_at_once_than_there_is_room_for(fair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    many = burst(engine.ROOM + 500, fair)
    rooms: list[int] = []
    flows = engine._flows

    def noted(slots: int, hops: int) -> Any:
        rooms.append(slots)
        return flows(slots, hops)

    monkeypatch.setattr(engine, "_flows", noted)
    compiled = run(many, compiled=True)
    assert len(rooms) == 2  # it started over, once
    monkeypatch.setattr(engine, "ROOM", 1 << 14)
    assert same_bytes(run(many, compiled=True), compiled)
    assert len(rooms) == 3
    loads = [sum(many.amount[i] for i in range(1, len(many.amount)) if link in path_of(many, i)) for link in (0, 1)]
    least = 1 + max(loads[0] / 2, loads[1] / 3)
    if fair:
        assert compiled.makespan_s == pytest.approx(least, rel=1e-9)
    else:
        assert compiled.makespan_s >= least


@given(graphs(sharing=BOTH), st.booleans())
def test_the_graph_is_left_as_it_was(tasks: TaskGraph, compiled: bool) -> None:
    columns = (tasks.amount, tasks.route, tasks.waits, tasks.next_ptr, tasks.following, tasks.routes.latency_s)
    before = [column.tobytes() for column in columns]
    run(tasks, compiled)
    longest_chain_s(tasks)
    assert before == [column.tobytes() for column in columns]


@settings(max_examples=200)
@given(graphs(sharing=BOTH, least=0))
def test_the_longest_chain_is_the_makespan_of_amounts_that_take_no_time(tasks: TaskGraph) -> None:
    tasks.resources.capacity[:], tasks.resources.overhead_s[:], tasks.resources.fair[:] = np.inf, 0, False
    assert longest_chain_s(tasks) == run(tasks).makespan_s


@settings(max_examples=200)
@given(graphs(sharing=BOTH))
def test_who_stands_in_line(tasks: TaskGraph) -> None:
    """A task in order that starts later than the last of those that it waits for has finished."""
    timeline = run(tasks)
    lines = []
    for task in range(len(tasks.amount)):
        blockers = [other for other in range(tasks.tasks) if task in waiters_of(tasks, other)]
        ready_s = max([0.0, *timeline.finish_s[blockers].tolist()])
        lines.append(timeline.start_s[task] > ready_s)
        if tasks.resources.fair[path_of(tasks, task)[0]]:
            assert not lines.pop()  # who shares never stands in line
    assert queued(tasks, timeline) == any(lines)


def test_columns_of_waits_may_leave_rows_out_and_count_from_anywhere() -> None:
    """-1 is no wait; tasks 2 + [0, 1] wait for tasks 0 + [1, -1], and a second column of waits joins them."""
    base = graph([1, 2, 3, 4], [[0], [1], [2], [3]])
    waits = [
        Edges(np.array([1, -1]), np.array([0, 1]), after_from=2),
        Edges(np.array([0, 1]), np.array([1, -1]), before_from=2),
        Edges(np.array([0]), np.array([3]), before_from=1, after_from=0),
    ]
    fields = {name: getattr(base, name) for name in ("amount", "route", "resources", "routes")}
    tasks = TaskGraph.of(**fields, edges=waits)
    assert {(i, j) for i in range(4) for j in waiters_of(tasks, i)} == {(1, 2), (2, 1), (1, 3)}
    assert tasks.waits.tolist() == [0, 1, 1, 1]
    with pytest.raises(DeadlockError, match="task 1 waits for task 2"):
        run(tasks)


@pytest.mark.parametrize("compiled", BOTH)
@pytest.mark.parametrize("fair", BOTH)
def test_a_deadlock_names_the_tasks_of_the_circle(compiled: bool, fair: bool) -> None:
    # 1 -> 2 -> 3 -> 1 is the circle; 4 waits for it, 0 and 5 run; 6 and 7 are joins, of which 6 waits for 4.
    waits = [(0, 1), (1, 2), (2, 3), (3, 1), (3, 4), (0, 5), (4, 6)]
    stuck = graph([1] * 6, [[0]] * 6, waits, fair=fair, joins=2, describe="the {} thing".format)
    with pytest.raises(DeadlockError) as caught:
        run(stuck, compiled)
    head, *lines = str(caught.value).splitlines()
    assert head == "5 of 8 tasks can never start; 3 of them wait in a circle:"
    assert sorted(lines) == [
        "  the 1 thing waits for the 3 thing",
        "  the 2 thing waits for the 1 thing",
        "  the 3 thing waits for the 2 thing",
    ]
    # Each line goes on where the last one ended.
    said = [line.strip().split(" waits for ") for line in lines]
    assert [end for _, end in said] == [begin for begin, _ in [*said[1:], said[0]]]
    with pytest.raises(DeadlockError, match="5 of 8 tasks can never start"):
        longest_chain_s(stuck)


def test_a_task_cannot_wait_for_itself() -> None:
    with pytest.raises(DeadlockError, match=r"1 of 2 .*1 of them wait in a circle:\n  task 1 waits for task 1$"):
        run(graph([1, 1], [[0], [0]], [(1, 1)]))


def test_a_long_circle_is_cut_short() -> None:
    n = 50
    circle = [(i, (i + 1) % n) for i in range(n)]
    with pytest.raises(DeadlockError, match=r"50 of them wait in a circle") as caught:
        run(graph([1] * n, [[0]] * n, circle))
    assert str(caught.value).splitlines()[-1] == "  ... and 30 more"
    assert len(str(caught.value).splitlines()) == 22


def big(tasks: int) -> TaskGraph:
    """One resource, tasks of 1 s; every tenth waits for the one before it."""
    later = np.arange(10, tasks, 10)
    return graph([1.0] * tasks, [[0]] * tasks, np.stack([later - 1, later], axis=1).tolist())


def test_large_graphs_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []

    def noted(*arguments: Any, compiled: bool) -> Any:
        chosen.append(compiled)
        return call(*arguments, compiled=compiled)

    monkeypatch.setattr(engine, "call", noted)
    small, large = run(big(COMPILE_FROM - 1)), run(big(COMPILE_FROM))
    assert chosen == [False, True]
    assert small.makespan_s == COMPILE_FROM - 1
    assert large.makespan_s == COMPILE_FROM
    assert sorted(large.start_s.tolist()) == list(range(COMPILE_FROM))
    assert same_bytes(large, run(big(COMPILE_FROM), compiled=False))
