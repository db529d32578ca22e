"""Exact symmetry: what representatives give equals the full simulation, and what is not symmetric is found out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import exchanges, step, symmetry
from distsim.cluster import Cluster, load, parse
from distsim.errors import ConfigError
from distsim.lower import Posting
from distsim.step import Simulation, simulate, simulate_representatives, simulate_strategy
from distsim.symmetry import Asymmetric, prove

LINKS = """
links:
  a: {bandwidth: {value: "100 GB/s", source: test}, latency: {value: "2 us", source: test}}
  b: {bandwidth: {value: "7 GB/s", source: test}, latency: {value: "5 us", source: test},
      overhead: {value: "300 ns", source: test}}
"""
ONE_LINK = """
links:
  a: {bandwidth: {value: "3 GB/s", source: test}, latency: {value: "2 us", source: test}}
"""
COSTS = """
reduce: {bandwidth: {value: "20 GB/s", source: test}}
host: {overhead: {value: "700 ns", source: test}}
"""
NODES = """topology:
  {kind: nodes, nodes: 4, node: {kind: switch, devices: 4, link: a}, nics: %d, fabric: {kind: switch, link: b}}"""
TOPOLOGIES = {
    "switch": "topology: {kind: switch, devices: 16, link: a}" + ONE_LINK,
    "bus": "topology: {kind: bus, devices: 16, link: a}" + ONE_LINK,
    "ring": "topology: {kind: ring, devices: 16, link: a}" + ONE_LINK,
    "full": "topology: {kind: full, devices: 16, link: a}" + ONE_LINK,
    "torus": "topology: {kind: torus, size: [4, 4], link: a}" + ONE_LINK,
    "hypercube": "topology: {kind: hypercube, dimensions: 4, link: a}" + ONE_LINK,
    "a NIC per device": NODES % 4 + LINKS,
    "a NIC per node": NODES % 1 + LINKS,
}
"""Clusters of 16 devices."""

STRATEGIES = (
    "ring",
    "ring:channels=2",
    "ring:bidirectional=true",
    "ring:segments=3",
    "direct",
    "all-to-all",
    "halving-doubling",
    "recursive-doubling",
    "hierarchical:node=4",
)


def cluster(name: str, more: str = "") -> Cluster:
    return parse(f"title: test\nsource: test\n{TOPOLOGIES[name]}{more}", name, "test.yaml")


def assert_same(part: Simulation, whole: Simulation) -> None:
    """Everything that is said of the exchange, and the time of every representative's message."""
    assert part.copies > 1 == whole.copies
    assert part.time_s == pytest.approx(whole.time_s, rel=1e-12)
    assert part.latency_bound_s == pytest.approx(whole.latency_bound_s, rel=1e-12)
    assert part.any_algorithm_bound_s <= whole.any_algorithm_bound_s * (1 + 1e-12)
    np.testing.assert_allclose(part.link_load_s, whole.link_load_s, rtol=1e-12)
    for name in ("ranks", "messages", "bytes", "message_sizes"):
        assert getattr(part.traffic, name) == getattr(whole.traffic, name), name
    assert part.traffic.links() == whole.traffic.links()
    (mine,), (all_of_it,) = part.lowered.parts, whole.lowered.parts
    ranks = np.unique(mine.schedule.src)
    chosen = np.isin(all_of_it.schedule.src[all_of_it.messages.first], ranks)
    for name in ("start_s", "finish_s"):
        theirs = getattr(whole.timeline, name)[all_of_it.sends][chosen]
        np.testing.assert_allclose(getattr(part.timeline, name)[mine.sends], theirs, rtol=1e-12, atol=1e-18)


def proven(name: str, strategy: str) -> bool:
    """Which pairs are to be proven; that all others are not is as much a part of the test."""
    rotates = not strategy.startswith(("halving", "recursive"))
    if name in ("switch", "bus", "full"):
        return True
    if name == "ring":  # opposite ranks have two shortest ways; neighbours, and those of the next node, one
        return strategy.startswith(("ring", "hierarchical"))
    if name == "torus":  # rows of 4 rotate; a ring of ranks changes rows by two hops, round either corner
        return False
    if name == "hypercube":  # partners differ in one bit
        return not rotates
    return True


@pytest.mark.parametrize("costs", ["", COSTS], ids=["free", "costs"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_representatives_give_what_all_give(name: str, strategy: str, costs: str) -> None:
    place = cluster(name, costs)
    try:
        part = simulate_representatives(strategy, 16, 16 * 6 * 100, place)
    except Asymmetric as reason:
        # Where hosts and processors take time, only what hands over and adds one thing at a time never stands in line.
        in_line = costs and strategy not in ("ring", "recursive-doubling")
        assert not proven(name, strategy) or (in_line and "turn" in str(reason)), reason
        return
    assert not costs or strategy in ("ring", "recursive-doubling")
    assert proven(name, strategy)
    assert_same(part, simulate(exchanges.build(strategy, 16, 16 * 6 * 100), place))


@pytest.mark.parametrize("collective", ["reduce-scatter", "all-gather"])
@pytest.mark.parametrize("strategy", ["direct", "ring", "halving-doubling"])
@pytest.mark.parametrize("posting", ["eager", "rounds"])
def test_other_collectives(collective: str, strategy: str, posting: Posting) -> None:
    place = cluster("a NIC per device")
    part = simulate_representatives(strategy, 16, 1600, place, collective=collective, posting=posting)
    assert_same(part, simulate(exchanges.build(strategy, 16, 1600, collective), place, posting=posting))


@given(st.data())
@settings(max_examples=25)
def test_a_perturbed_cluster_is_found_out(data: st.DataObject) -> None:
    """Any one link or device that differs is noticed; the exchange then runs in full, and may take longer."""
    name = data.draw(st.sampled_from(["switch", "full", "a NIC per device"]))
    place = cluster(name, COSTS)
    column = data.draw(st.sampled_from(["bandwidth_Bps", "latency_s", "overhead_s", "reduce_bandwidth_Bps"]))
    values = getattr(place, column).copy()
    at = data.draw(st.integers(0, len(values) - 1))
    values[at] = values[at] * 2 if values[at] else 1e-7
    perturbed = replace(place, **{column: values})
    prove("ring", 16, 1600, place)
    with pytest.raises(Asymmetric, match="does not look the same"):
        prove("ring", 16, 1600, perturbed)


def test_what_is_not_symmetric_runs_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SYMMETRIC_FROM", 1)
    even = simulate_strategy("ring", 16, 1600, cluster("switch"))
    slow = "\noverrides:\n  - {from: gpu3, to: '*', slowdown: 10}\n"
    uneven = simulate_strategy("ring", 16, 1600, cluster("switch", slow))
    assert (even.copies, uneven.copies) == (16, 1)
    assert uneven.time_s > even.time_s
    assert simulate_strategy("ring", 16, 1600, cluster("switch"), whole=True).copies == 1
    assert uneven.time_s == simulate(exchanges.build("ring", 16, 1600), cluster("switch", slow)).time_s


@pytest.mark.parametrize(
    ("strategy", "params", "words"),
    [
        ("tree", 1600, "tree among 16 workers has no symmetry to offer"),
        ("parameter-server", 1600, "no symmetry"),
        ("ring", 1601, "1,601 parameters make chunks of unequal size among 16 ranks \\(1,616 would not\\)"),
    ],
)
def test_reasons(strategy: str, params: int, words: str) -> None:
    with pytest.raises(Asymmetric, match=words):
        prove(strategy, 16, params, cluster("switch"))


def test_queues_in_order_are_not_proven() -> None:
    """Of transfers that wait in one line the order decides, and it may differ from rank to rank."""
    for strategy in ("direct", "ring"):
        with pytest.raises(Asymmetric, match="turn"):
            simulate_representatives(strategy, 16, 1600, cluster("bus"), sharing="fifo")
    with pytest.raises(Asymmetric, match="turn"):  # a message from node to node goes round two corners alike
        simulate_representatives("hierarchical:node=4", 16, 1600, cluster("ring"), sharing="fifo")
    part = simulate_representatives("ring", 16, 1600, cluster("switch"), sharing="fifo")
    assert_same(part, simulate(exchanges.build("ring", 16, 1600), cluster("switch"), sharing="fifo"))


def test_a_schedule_that_breaks_its_promise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exchanges.rows_of

    def bent(strategy: str, workers: int, params: int, sources: object, collective: str = "all-reduce") -> object:
        schedule = real(strategy, workers, params, sources, collective)  # type: ignore[arg-type]
        step = schedule.step + (schedule.src == 5)
        order = np.argsort(step, kind="stable")
        columns = {name: getattr(schedule, name)[order] for name in ("src", "dst", "chunk", "op", "source")}
        return replace(schedule, step=step[order].astype(np.int32), **columns)

    monkeypatch.setattr(exchanges, "rows_of", bent)
    with pytest.raises(Asymmetric, match="not what it proposes"):
        prove("ring", 16, 1600, cluster("a NIC per device"))


def test_131072_devices() -> None:
    """34 billion messages: counts and the time in closed form, on nodes of 8 with a NIC each."""
    n, params = 131_072, 131_072 * 1000
    place = load("h100_131072")
    result = simulate_strategy("ring", n, params, place)
    assert result.traffic.messages == n * 2 * (n - 1)
    assert result.traffic.bytes == 4 * 1000 * n * 2 * (n - 1)
    assert result.traffic.message_sizes == {4000: n * 2 * (n - 1)}
    _, links = place.routes([7], [8])  # the way to the next node, which every second lap of eight has to take
    hop_s = place.latency_s[links].sum() + 4000 / place.bandwidth_Bps[links].min()
    _, links = place.routes([0], [1])
    inside_s = place.latency_s[links].sum() + 4000 / place.bandwidth_Bps[links].min()
    # A chunk's way round: 2(n - 1) hops, one in eight of them between nodes; the slowest chain has the most of these.
    least = 2 * (n - 1) // 8 * (hop_s + 7 * inside_s)
    assert least <= result.time_s <= least + 8 * (hop_s + inside_s)


def test_too_large_for_either() -> None:
    with pytest.raises(ConfigError, match=r"at most 4096 workers, not 8192.*symmetry does not help: tree"):
        simulate_strategy("tree", 8192, 100, load("h100_16384_fat_tree"))


def test_group_elements() -> None:
    proposal = exchanges.Symmetry(kind="xor", workers=16)
    group = symmetry.Group(symmetry=proposal, mask=0b1010)
    assert group.copies == 4
    assert group.representatives().tolist() == [0, 1, 4, 5]
    assert group.element_to(np.arange(16)).tolist() == [rank & 0b1010 for rank in range(16)]
