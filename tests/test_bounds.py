"""Lower bounds: closed forms for each collective, brute force, and no result beneath one, whatever runs wherever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import product
from typing import Any

import networkx as nx
import numpy as np
import pytest
from helpers import all_reduce, table
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_clusters import KINDS, PLAIN, cluster, flat, link, some_clusters

from distsim import cluster as clusters
from distsim import exchanges
from distsim.bounds import any_algorithm_s, link_load_s
from distsim.cluster import Cluster
from distsim.collectives import COLLECTIVES
from distsim.errors import ConfigError
from distsim.exchanges import ALGORITHMS
from distsim.formulas import FORMULAS
from distsim.lower import Posting
from distsim.network import Sharing
from distsim.step import simulate

B, A = 1e9, 1e-3
"""Bandwidth and latency of the switch of the closed forms."""


def exactly(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=0)


def bound(collective: str, n: int, params: int, place: Cluster, strategy: str | None = None) -> float:
    """The bound for elements of 4 bytes; it is the same for all strategies, so any will do."""
    strategy = strategy or next(iter(ALGORITHMS[collective]))
    return any_algorithm_s(exchanges.build(strategy, n, params, collective), 4, place)


# Of S bytes, in n parts where the collective has parts: what the busiest rank sends or receives at least.
PER_RANK: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1,
    "reduce": lambda n: 1,
    "personalised-all-to-all": lambda n: (n - 1) / n,
}


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_closed_forms_on_a_switch(collective: str, n: int) -> None:
    params = 250_000 * n
    assert bound(collective, n, params, flat(n, B, 1e-9)) == exactly(PER_RANK[collective](n) * params * 4 / B)
    assert bound(collective, n, params, flat(n, 1e15, A)) == exactly(A)
    assert bound(collective, n, 0, flat(n, B, A)) == 0.0
    # More devices than ranks change nothing.
    assert bound(collective, n, params, flat(n + 3, B, 1e-9)) == bound(collective, n, params, flat(n, B, 1e-9))


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_rank_needs_nothing(collective: str) -> None:
    assert bound(collective, 1, 1000, flat(4, B, A)) == 0.0


def test_all_strategies_of_a_collective_have_one_bound() -> None:
    for collective, strategies in ALGORITHMS.items():
        if collective != "all-reduce":
            found = [bound(collective, 4, 48_000, flat(4, B, 1e-9), strategy) for strategy in strategies]
            assert found == [exactly(found[0])] * len(strategies)
    place = flat(4, B, 1e-9)
    for name in ALGORITHMS["all-reduce"]:
        if "server" not in name:
            assert bound("all-reduce", 4, 48_000, place, name) == exactly(1.5 * 192_000 / B)


def test_a_server_helps_all_reduce_but_not_beyond_its_links() -> None:
    """With n workers and one server there are n + 1 links for 2(n - 1) arrays; one array has to leave each worker."""
    for n in (2, 3, 6):
        found = bound("all-reduce", n, 10**6, flat(n + 1, B, 1e-9), "parameter-server")
        assert found == exactly(max(1, 2 * (n - 1) / (n + 1)) * 4e6 / B)


def test_a_slow_rank_bounds_what_leaves_it_or_reaches_it() -> None:
    """Rank 2 has a tenth of the bandwidth, out alone: it sends in its own time and receives in that of the others."""
    slow = [{"from": "gpu2", "to": "switch", "slowdown": 10}]
    place = flat(4, B, 1e-9, overrides=slow)
    size_s = 4 * 40_000 / B
    wanted = {
        "all-reduce": 10 * size_s,
        "reduce-scatter": 10 * 0.75 * size_s,
        "all-gather": 10 * 0.25 * size_s,
        "broadcast": size_s,
        "reduce": 10 * size_s,
        "personalised-all-to-all": 10 * 0.75 * size_s,
    }
    assert {name: bound(name, 4, 40_000, place) for name in wanted} == {
        name: exactly(time_s) for name, time_s in wanted.items()
    }


def sends_needed(givers: frozenset[int], holders: frozenset[int], ranks: int) -> int:
    """Fewest messages after which each holder has the sum of what the givers gave, by search through all orders.

    A message carries any sum that its sender has, or can make of values that do not overlap; it replaces nothing.
    """
    start = tuple(frozenset({frozenset({rank})} if rank in givers else ()) for rank in range(ranks))

    def sums(values: frozenset[frozenset[int]]) -> frozenset[frozenset[int]]:
        found = set(values)
        while True:
            more = {a | b for a, b in product(found, found) if not a & b} - found
            if not more:
                return frozenset(found)
            found |= more

    start = tuple(map(sums, start))
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        state, count = queue.popleft()
        if all(givers in state[holder] for holder in holders):
            return count
        for src, dst in product(range(ranks), repeat=2):
            for value in state[src] - state[dst]:
                after = (*state[:dst], sums(state[dst] | {value}), *state[dst + 1 :])
                if after not in seen:
                    seen.add(after)
                    queue.append((after, count + 1))
    raise AssertionError("some rank cannot be reached")


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_way_needs_fewer_messages_than_the_bound_counts(ranks: int) -> None:
    """k givers and h holders: k + h - 2 messages, and one more where no rank is both."""
    some = [frozenset(r for r in range(ranks) if bits >> r & 1) for bits in range(1, 1 << ranks)]
    for givers, holders in product(some, some):
        count = len(givers) + len(holders) - 2 + (not givers & holders)
        assert sends_needed(givers, holders, ranks) == count, (givers, holders)


def test_what_all_ranks_send_together_bounds_where_no_rank_alone_does() -> None:
    """Ranks 0 and 1 give chunk 0 to ranks 2 and 3, which give them chunk 1: each 3 times over 4 links, 1.5 in all.

    Each rank alone sends one chunk and receives one.
    """
    first = np.array([[True], [True], [False], [False]])
    crossed = table([], ranks=4, sizes=[1000, 1000], contributes=np.hstack([first, ~first]),
                    must_hold=np.hstack([~first, first]))  # fmt: skip
    assert any_algorithm_s(all_reduce("crossed", crossed), 4, flat(4, B, 1e-9)) == exactly(1.5 * 4000 / B)


def farthest(place: Cluster, reverse: bool, among: set[int]) -> float:
    """By Dijkstra's algorithm of networkx, over links that messages may take one after the other."""
    graph = place.graph().reverse() if reverse else place.graph()
    reached = nx.single_source_dijkstra_path_length(graph, place.devices[0], weight="latency_s")
    return max((time_s for node, time_s in reached.items() if node in {place.devices[i] for i in among}), default=0.0)


@settings(max_examples=60)
@given(st.sampled_from(KINDS).flatmap(some_clusters), st.sampled_from(sorted(COLLECTIVES)))
def test_the_latency_bound_is_the_quickest_way_to_the_farthest_rank(place: Cluster, collective: str) -> None:
    n = len(place.devices)
    names = set(range(n))
    away = farthest(place, reverse=False, among=names) if collective != "reduce" else 0.0
    back = farthest(place, reverse=True, among=names) if collective != "broadcast" else 0.0
    object.__setattr__(place, "bandwidth_Bps", np.full_like(place.bandwidth_Bps, 1e30))  # so that latency decides
    assert bound(collective, n, n * n, place) == pytest.approx(max(away, back), rel=1e-12, abs=1e-20)


def test_a_slow_chord_does_not_bound_those_who_go_around_it() -> None:
    ends = [("d0", "d1"), ("d1", "d2"), ("d2", "d3"), ("d3", "d0")]
    edges = [{"from": a, "to": b, "link": "ring", "both": True} for a, b in ends]
    edges.append({"from": "d0", "to": "d2", "link": "chord", "both": True})
    topology = {"kind": "edges", "devices": ["d0", "d1", "d2", "d3"], "edges": edges}
    place = cluster(topology, {"ring": link(1e9, 2e-6), "chord": link(1e9, 1e-3)})
    assert simulate(exchanges.build("ring", 4, 1000), place).any_algorithm_bound_s == pytest.approx(4e-6)


@settings(max_examples=60)
@given(st.sampled_from(KINDS).flatmap(some_clusters), st.sampled_from(sorted(ALGORITHMS["all-reduce"])), st.data())
def test_loads_are_those_of_every_message_on_its_way(place: Cluster, strategy: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(place.devices) - 1))
    traffic = exchanges.build(strategy, n, 1000).traffic(4)
    load = link_load_s(traffic, place)
    wanted = np.zeros(len(place.bandwidth_Bps))
    for src, dst, count, size in traffic.links():
        _, on_the_way = place.routes([src], [dst])
        for each in on_the_way.tolist():
            wanted[each] += size / place.bandwidth_Bps[each] + count * place.overhead_s[each]
    assert load == pytest.approx(wanted, rel=1e-12, abs=0)


PAIRS = [(collective, strategy) for collective, strategies in ALGORITHMS.items() for strategy in strategies]
MORE = [
    ("all-reduce", "ring:channels=2,bidirectional=true"),
    ("all-reduce", "ring:segments=3"),
    ("all-reduce", "tree:radix=3,segments=2"),
    ("all-reduce", "parameter-server:servers=2"),
    ("all-reduce", "parameter-server:servers=2,placement=colocated"),
    ("all-reduce", "hierarchical:inside=ring,across=halving-doubling"),
    ("broadcast", "chain:segments=4"),
]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=45)
@given(st.data())
def test_no_result_beats_its_bounds(kind: str, data: st.DataObject) -> None:
    place = data.draw(some_clusters(kind))
    collective, strategy = data.draw(st.sampled_from(PAIRS + MORE))
    n = data.draw(st.integers(1, len(place.devices)))
    params = data.draw(st.integers(0, 10**7))
    try:
        exchange = exchanges.build(strategy, n, params, collective)
    except ConfigError:  # more servers than workers
        assume(False)
    assume(exchange.ranks <= len(place.devices))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    sharing: Sharing | None = data.draw(st.sampled_from([None, "fair", "fifo"]))
    posting: Posting = data.draw(st.sampled_from(["eager", "rounds"]))
    result = simulate(exchange, place, dtype, sharing=sharing, posting=posting)  # which asserts it, too
    for each in (result.latency_bound_s, result.bandwidth_bound_s, result.any_algorithm_bound_s):
        assert 0 <= each <= result.time_s * (1 + 1e-9)
    assert (result.time_s > 0) == (result.traffic.messages > 0)
    again = simulate(exchange, place, dtype, sharing=sharing, posting=posting)
    assert again.timeline.finish_s.tobytes() == result.timeline.finish_s.tobytes()


@pytest.mark.parametrize(("collective", "strategy"), PAIRS)
@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_times_are_those_of_the_formulas(collective: str, strategy: str, n: int) -> None:
    """On an ideal switch. Parts are of one size; times between the bounds are then those of the literature."""
    params = 3600 * 16
    place = clusters.ideal(n + 1)
    formula = FORMULAS[collective][strategy]
    exchange = exchanges.build(strategy, n, params, collective)
    result = simulate(exchange, place, sharing="fair", posting=formula.posting)
    assert result.traffic.messages == formula.messages(n)
    assert max(result.traffic.message_sizes) == 4 * formula.largest_elements(n, params)
    time_s = formula.time_s(n, 4.0 * params, 5e-6, 12.5e9)
    if time_s is not None:
        assert result.time_s == exactly(time_s)


def test_every_kind_of_topology_is_tried() -> None:
    from typing import get_args

    from distsim.topologies import models

    kinds = {kind for model in (*get_args(models.AnyPlain), models.NodesTopology)
             for kind in get_args(model.model_fields["kind"].annotation)}  # fmt: skip
    assert set(KINDS) == kinds
    assert set(PLAIN) < kinds
