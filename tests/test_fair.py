"""Fair sharing: closed forms, and an exact reference that shares all links anew at every moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from graphs import demands, exactly, graph, graphs, path_of, progressive_filling, times
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim.engine import run
from distsim.taskgraph import TaskGraph

CLOSE = 1e-9


def close(found: Sequence[float], wanted: Sequence[float | Fraction]) -> bool:
    return len(found) == len(wanted) and all(
        math.isclose(a, float(b), rel_tol=CLOSE, abs_tol=1e-300) for a, b in zip(found, wanted, strict=True)
    )


def test_two_flows_halve_a_link() -> None:
    assert times(run(graph([3, 3], [[0], [0]], capacity=[2], fair=True))) == ([0, 0], [3, 3])


def test_unequal_amounts_on_one_link() -> None:
    """1 and 3 share until 2 s, when the first is over; 2 are left for the whole link. Latency holds nothing up."""
    assert times(run(graph([1, 3], [[0], [0]], fair=True)))[1] == [2, 4]
    assert times(run(graph([1, 3], [[0], [0]], fair=True, latency_s=[5, 7])))[1] == [7, 11]


def test_a_flow_that_comes_later() -> None:
    """Task 1 begins at 2 s, when 2 of 4 are over: the rest of task 0 takes 4 s at half the rate."""
    late = graph([4, 4, 2], [[0], [0], [1]], [(2, 1)], fair=True)
    assert times(run(late)) == ([0, 2, 0], [6, 8, 2])


def test_a_link_that_is_freed_midway_gives_its_share_to_the_others() -> None:
    """Both links are full with two flows each; when task 2 ends, task 1 goes on at half, task 0 takes the rest."""
    freed = graph([4, 4, 1], [[0], [0, 1], [1]], capacity=[2, 1], fair=True)
    # Till 2 s: rates 1.5, 0.5, 0.5. Then task 1 has 3 left, task 0 has 1; they share link 0, task 1 is held to 1.
    assert times(run(freed))[1] == [3, 5, 2]


def test_the_parking_lot() -> None:
    """One flow over all of n links, one flow on each: the long one has half of the narrowest link."""
    links = [2.0, 1.0, 4.0]
    lot = graph([1, 1, 1, 1], [[0, 1, 2], [0], [1], [2]], capacity=links, fair=True)
    # Rates 0.5, 1.5, 0.5, 3.5 until they end: nothing that ends before 2 s frees the link that is full.
    assert close(times(run(lot))[1], [2, Fraction(2, 3), 2, Fraction(2, 7)])


def test_sharing_is_global_and_not_link_by_link() -> None:
    """Flow 0 is held to 1/3 on link 0; so on link 1 flow 3 has 2/3 and not 1/2; so flow 4 on link 2 has 4/3."""
    chain = graph([1, 1, 1, 2, 4], [[0, 1], [0], [0], [1, 2], [2]], capacity=[1, 1, 2], fair=True)
    assert close(times(run(chain))[1], [3, 3, 3, 3, 3])


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_all_to_all_on_a_switch(n: int) -> None:
    """Each device has a way out and a way in, and n - 1 messages on each: 1/(n - 1) of the link for each of them."""
    pairs = list(permutations(range(n), 2))
    flows = graph([3.0] * len(pairs), [[a, n + b] for a, b in pairs], capacity=[2.0] * 2 * n, fair=True)
    assert close(times(run(flows))[1], [1.5 * (n - 1)] * len(pairs))


def test_an_overhead_is_spread_over_the_message() -> None:
    """A resource with an overhead is busy that much longer for each message, however many share it."""
    for count in (1, 2, 5):
        flows = graph([4.0] * count, [[0]] * count, capacity=[2], overhead_s=[0.5], fair=True)
        assert close(times(run(flows))[1], [2.5 * count] * count)
    # Of two resources the one without overhead takes longer: 3 s against 2 + 0.5.
    assert close(times(run(graph([4], [[0, 1]], capacity=[2, 4 / 3], overhead_s=[0.5, 0], fair=True)))[1], [3])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_newcomer_that_slows_nobody_down_changes_nothing_for_them(compiled: bool) -> None:
    """Tasks 0 and 1 halve link 0 till 4 s; from 1 s on task 2 has what task 1 leaves of link 1; task 4 joins both.

    All three are shared anew at 1 s, and the two still end at 4 s, once.
    """
    joined = [(3, 2), (0, 4), (1, 4), (4, 5)]
    paths = [[0], [0, 1], [1], [2], [3], [3]]
    for turned in (joined, [(3, 2), (1, 4), (0, 4), (4, 5)]):
        for first, second in (([0], [0, 1]), ([0, 1], [0])):
            tasks = graph([2, 2, 35, 1, 1, 1], [first, second, *paths[2:]], turned, capacity=[1, 8, 1, 1], fair=True)
            assert times(run(tasks, compiled)) == ([0, 0, 1, 0, 4, 5], [4, 4, 5.5625, 1, 5, 6])


def test_a_flow_that_crosses_a_link_twice_counts_twice() -> None:
    """As in a simulation of representatives, where one link stands for several."""
    assert times(run(graph([1], [[0, 0]], fair=True)))[1] == [2]
    # Rates r and r with 2r + r = 1; then the last 0.5 of task 1 alone.
    assert close(times(run(graph([1, 1.5], [[0, 1, 0], [0]], fair=True)))[1], [3, 3.5])
    # Its overhead counts twice, too: 2 * (1 + 0.25).
    assert close(times(run(graph([1], [[0, 0]], overhead_s=[0.25], fair=True)))[1], [2.5])


@settings(max_examples=300)
@given(graphs(sharing=[True]))
def test_the_engine_shares_as_progressive_filling_does(tasks: TaskGraph) -> None:
    start, finish = exactly(tasks)
    found = times(run(tasks))
    assert close(found[0], start)
    assert close(found[1], finish)


@settings(max_examples=200)
@given(graphs(sharing=[True, False], uneven=True))
def test_fair_resources_beside_those_in_order(tasks: TaskGraph) -> None:
    start, finish = exactly(tasks)
    found = times(run(tasks))
    assert close(found[0], start)
    assert close(found[1], finish)


@pytest.mark.parametrize("seed", range(3))
def test_many_flows_on_many_links(seed: int) -> None:
    """Larger than what is drawn above: components that merge and fall apart, on 12 links."""
    random = np.random.default_rng(seed)
    paths = [random.choice(12, random.integers(1, 4), replace=False).tolist() for _ in range(60)]
    waits = [(int(a), b) for b in range(20, 60) for a in random.choice(b, 2, replace=False)]
    amount, capacity = random.integers(1, 9, 60), 2.0 ** random.integers(0, 3, 12)
    tasks = graph(amount.tolist(), paths, waits, capacity=capacity.tolist(), latency_s=[0.25] * 60, fair=True)
    start, finish = exactly(tasks)
    assert close(times(run(tasks))[0], start)
    assert close(times(run(tasks, compiled=True))[1], finish)


@settings(max_examples=100)
@given(st.data())
def test_rates_are_max_min_fair(data: st.DataObject) -> None:
    """Every flow crosses a full link on which no flow is faster (Bertsekas and Gallager, section 6.5.2).

    A flow's rate shows in when it ends if it moves next to nothing and the others do not end before.
    """
    links = data.draw(st.integers(1, 5))
    path = st.lists(st.integers(0, links - 1), min_size=1, max_size=3, unique=True)
    paths = data.draw(st.lists(path, min_size=1, max_size=7))
    capacity = data.draw(st.lists(st.integers(1, 5).map(float), min_size=links, max_size=links))
    rate = []
    for flow in range(len(paths)):
        amount = [1e-6 if other == flow else 1e6 for other in range(len(paths))]
        finish_s = run(graph(amount, paths, capacity=capacity, fair=True)).finish_s
        rate.append(1e-6 / float(finish_s[flow]))
    for flow, mine in enumerate(paths):
        bottlenecks = []
        for link in mine:
            on = [rate[other] for other, theirs in enumerate(paths) if link in theirs]
            full = math.isclose(sum(on), capacity[link], rel_tol=CLOSE)
            assert sum(on) <= capacity[link] * (1 + CLOSE)
            bottlenecks.append(full and max(on) <= rate[flow] * (1 + CLOSE))
        assert any(bottlenecks)


def test_the_reference_fills_by_the_book() -> None:
    """The example of Bertsekas and Gallager's kind, done by hand: links of 1, 1 and 2; see the test of sharing."""
    flows = graph([1, 1, 1, 2, 4], [[0, 1], [0], [0], [1, 2], [2]], capacity=[1, 1, 2], fair=True)
    third = Fraction(1, 3)
    rate = progressive_filling({flow: demands(flows, flow) for flow in range(5)}, [1, 1, 2])
    assert rate == {0: third, 1: third, 2: third, 3: 2 * third, 4: 4 * third}


@settings(max_examples=150)
@given(graphs(sharing=[True], apart=True))
def test_fair_and_in_order_agree_where_nothing_is_shared(tasks: TaskGraph) -> None:
    fair = times(run(tasks))
    tasks.resources.fair[:] = False
    in_order = times(run(tasks))
    assert close(fair[0], in_order[0])
    assert close(fair[1], in_order[1])


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.floats(0.01, 9), st.floats(0.01, 9)), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.25, 1.0, 3.0]),
)
def test_one_shared_link_is_never_idle_either_way(
    arrivals: list[tuple[float, float]], overhead_s: float, capacity: float
) -> None:
    """Work is conserved: whichever way a link is shared, its last message ends at the same time.

    Messages (arrival, amount) come when a task on a resource of their own lets them go.
    """
    count = len(arrivals)
    amount = [*(size for _, size in arrivals), *(moment for moment, _ in arrivals)]
    paths = [[0]] * count + [[1 + i] for i in range(count)]
    ends = []
    for fair in (True, False):
        one = graph(
            amount,
            paths,
            [(count + i, i) for i in range(count)],
            capacity=[capacity, *[1.0] * count],
            overhead_s=[overhead_s, *[0.0] * count],
            fair=fair,
        )
        ends.append(run(one).makespan_s)
    busy_till = 0.0
    for moment, size in sorted(arrivals):
        busy_till = max(busy_till, moment) + size / capacity + overhead_s
    assert close(ends, [busy_till, busy_till])


@given(graphs(sharing=[True], most=16))
def test_no_link_carries_more_than_it_can(tasks: TaskGraph) -> None:
    """Over the whole run: what has passed a link, overheads and all, fits between its first start and last end."""
    timeline = run(tasks)
    for link in range(len(tasks.resources)):
        on = [task for task in range(len(tasks.amount)) if link in path_of(tasks, task)]
        if on:
            late = tasks.routes.latency_s[tasks.route[on]]
            span_s = (timeline.finish_s[on] - late).max() - timeline.start_s[on].min()
            busy_s = (tasks.amount[on] / tasks.resources.capacity[link] + tasks.resources.overhead_s[link]).sum()
            assert busy_s <= span_s * (1 + CLOSE)


@pytest.mark.parametrize("ratio", [1e3, 1e6, 1e9])
def test_amounts_of_very_different_size(ratio: float) -> None:
    """A flood of small messages beside a large one, each of which pays the overhead: rounding must not add up."""
    amount = [4.0, *[4.0 * ratio] * 3, *[4.0] * 5]
    paths = [[0, 1], [0], [1], [0, 1], *[[0]] * 5]
    tasks = graph(amount, paths, capacity=[1e11, 3e10], overhead_s=[1e-5, 1e-6], fair=True)
    _, finish = exactly(tasks)
    assert close(times(run(tasks))[1], finish)
