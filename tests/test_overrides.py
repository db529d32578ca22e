"""Failed and slowed links, stragglers: what `overrides` of a cluster file make of it."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import cluster as clusters
from distsim.cluster import Cluster
from distsim.errors import ConfigError

LINK_A = """
title: t
source: s
links:
  a: {bandwidth: {value: "10 GB/s", source: s}, latency: {value: "2 us", source: s}}
"""
REDUCE = 'reduce: {bandwidth: {value: "1 TB/s", source: s}}\n'


def parse(topology: str, extra: str = "") -> Cluster:
    return clusters.parse(f"{LINK_A}topology: {topology}\n{extra}", "test", "test.yaml")


def overridden(entries: str, topology: str = "{kind: switch, devices: 4, link: a}") -> Cluster:
    return parse(topology, f"{REDUCE}overrides:\n{entries}")


def bandwidths(cluster: Cluster) -> dict[str, float]:
    return {cluster.link_name(link): value / 1e9 for link, value in enumerate(cluster.bandwidth_Bps.tolist())}


def test_override_of_one_link() -> None:
    cluster = overridden(
        "  - {from: gpu1, to: switch, slowdown: 4}\n"
        "  - {from: switch, to: gpu2, latency: {value: 9 us, source: s}, overhead: {value: 3 us, source: s}}\n"
    )
    assert {name: value for name, value in bandwidths(cluster).items() if value != 10} == {"gpu1 -> switch": 2.5}
    names = [cluster.link_name(link) for link in range(8)]
    changed = names.index("switch -> gpu2")
    assert cluster.latency_s[changed] == 9e-6 and cluster.overhead_s.tolist()[changed] == 3e-6
    assert sorted(cluster.latency_s.tolist()) == pytest.approx([0, 0, 0, 2e-6, 2e-6, 2e-6, 2e-6, 9e-6])


def test_override_of_a_pattern_both_ways() -> None:
    cluster = overridden('  - {from: "gpu[12]", to: "*", both: true, bandwidth: {value: 3 GB/s, source: s}}\n')
    slow = {name for name, value in bandwidths(cluster).items() if value == 3}
    assert slow == {"gpu1 -> switch", "gpu2 -> switch", "switch -> gpu1", "switch -> gpu2"}


def test_overrides_apply_in_order() -> None:
    later = "  - {from: gpu0, to: switch, slowdown: 2}\n" * 2
    given = "  - {from: gpu0, to: switch, bandwidth: {value: 3 GB/s, source: s}}\n"
    assert bandwidths(overridden(given + later))["gpu0 -> switch"] == 0.75
    assert bandwidths(overridden(later + given))["gpu0 -> switch"] == 3


def test_a_name_that_looks_like_a_pattern_is_a_name_too() -> None:
    edges = '{kind: edges, devices: ["g[0]", g0], edges: [{from: "g[0]", to: g0, link: a, both: true}]}'
    assert bandwidths(overridden('  - {from: "g[0]", to: g0, slowdown: 2}\n', edges))["g[0] -> g0"] == 5


def test_stragglers() -> None:
    host = 'host: {overhead: {value: "3 us", source: s}}\n'
    entries = "  - {device: gpu1, slowdown: 2}\n  - {device: 'gpu[1-2]', slowdown: 1.5}\n"
    cluster = parse("{kind: switch, devices: 4, link: a}", f"{REDUCE}{host}overrides:\n{entries}")
    assert cluster.reduce_bandwidth_Bps.tolist() == pytest.approx([1e12, 1e12 / 3, 1e12 / 1.5, 1e12])
    assert cluster.host_overhead_s.tolist() == pytest.approx([3e-6, 9e-6, 4.5e-6, 3e-6])
    free = parse("{kind: switch, devices: 4, link: a}", f"{host}overrides:\n{entries}")
    assert free.reduce_bandwidth_Bps.tolist() == [math.inf] * 4
    assert free.host_overhead_s.tolist() == cluster.host_overhead_s.tolist()


def test_routes_go_round_a_failed_link() -> None:
    torus = "{kind: torus, size: [4, 4], link: a}"
    whole, torn = parse(torus), overridden("  - {from: gpu0.0, to: gpu0.1, both: true, failed: true}\n", torus)
    assert len(torn.tail) == len(whole.tail) - 2
    for cluster, hops in ((whole, 1), (torn, 3)):
        ptr, _ = cluster.routes([0, 1], [1, 0])
        assert np.diff(ptr).tolist() == [hops, hops]


def test_a_failed_spine_is_left_out_by_ecmp() -> None:
    tree = "{kind: fat-tree, devices: 16, devices_per_leaf: 4, spines: 4, link: a}"
    cluster = overridden('  - {from: "leaf*", to: spine2, both: true, failed: true}\n', tree)
    src, dst = np.divmod(np.arange(256), 16)
    _, links = cluster.routes(src, dst)
    passed = {cluster.node_name(int(node)) for node in cluster.head[links]}
    assert {name for name in passed if name.startswith("spine")} == {"spine0", "spine1", "spine3"}


@given(st.data())
@settings(max_examples=60)
def test_links_that_fail_at_random(data: st.DataObject) -> None:
    """Either all devices still reach each other over what is left, or the file is refused."""
    size = data.draw(st.sampled_from([(3, 3), (2, 4), (5,), (2, 2, 2)]))
    whole = parse(f"{{kind: torus, size: {list(size)}, link: a}}")
    failing = data.draw(st.sets(st.integers(0, len(whole.tail) - 1), min_size=1, max_size=12))
    entries = "".join(
        f"  - {{from: {a}, to: {b}, failed: true}}\n"
        for a, _, b in (whole.link_name(link).split() for link in sorted(failing))
    )
    graph = whole.graph()
    for link in failing:
        graph.remove_edge(*whole.link_name(link).split(" -> "))
    try:
        torn = overridden(entries, f"{{kind: torus, size: {list(size)}, link: a}}")
    except ConfigError as error:
        assert "no route from" in str(error)
        assert not nx.is_strongly_connected(graph)
        return
    assert nx.is_strongly_connected(graph)
    assert sorted(torn.graph().edges) == sorted(graph.edges)
