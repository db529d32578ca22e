"""Routes: against networkx on random graphs, interpreted and compiled; ECMP's spread; uniqueness; speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import cluster as clusters
from distsim import compiled
from distsim.cluster import Cluster
from distsim.errors import ConfigError
from distsim.routing import fewest_hops

LINKS = """
title: t
source: s
links:
  a: {bandwidth: {value: "10 GB/s", source: s}, latency: {value: "2 us", source: s}}
"""


def parse(topology: str, extra: str = "") -> Cluster:
    return clusters.parse(f"{LINKS}topology: {topology}\n{extra}", "test", "test.yaml")


def made(devices: int, switches: int, edges: list[tuple[int, int]], routing: str = "first") -> Cluster:
    return Cluster(
        name="random",
        title="",
        devices=[f"d{i}" for i in range(devices)],
        switches=[f"s{i}" for i in range(switches)],
        tail=np.array([a for a, _ in edges]),
        head=np.array([b for _, b in edges]),
        latency_s=np.zeros(len(edges)),
        bandwidth_Bps=np.ones(len(edges)),
        overhead_s=np.zeros(len(edges)),
        reduce_bandwidth_Bps=np.ones(devices),
        host_overhead_s=np.zeros(devices),
        routing=routing,  # type: ignore[arg-type]
    )


@st.composite
def random_clusters(draw: st.DrawFn) -> Cluster:
    size = draw(st.integers(1, 9))
    devices = draw(st.integers(1, size))
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=30)) if pairs else []
    return made(devices, size - devices, edges, draw(st.sampled_from(["first", "ecmp"])))


@pytest.fixture(params=[False, True], ids=["interpreted", "compiled"])
def searched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the search both ways."""
    monkeypatch.setattr(compiled, "COMPILE_FROM", 0 if request.param else 10**9)
    yield


def all_pairs(cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    n = len(cluster.devices)
    return np.divmod(np.arange(n * n), n)


def check(cluster: Cluster) -> None:
    """Compare all routes of a cluster with networkx."""
    graph = cluster.graph()
    wanted: list[tuple[int, int]] = []
    shortest: list[list[list[int]]] = []
    first: list[list[int]] = []
    for s, src in enumerate(cluster.devices):
        paths = nx.single_source_shortest_path(graph, src)
        for d, dst in enumerate(cluster.devices):
            if dst not in paths:
                for ask in (cluster.routes, cluster.route_is_unique):
                    with pytest.raises(ConfigError, match=f"no route from {src} to {dst};"):
                        ask([s], [d])
                continue
            wanted.append((s, d))
            every = nx.all_shortest_paths(graph, src, dst) if src != dst else [[src]]
            as_links = [[graph.edges[hop]["link"] for hop in pairwise(path)] for path in every]
            shortest.append(as_links)
            first.append([graph.edges[hop]["link"] for hop in pairwise(paths[dst])])
    src_index, dst_index = np.array(wanted).T
    ptr, links = cluster.routes(src_index, dst_index)
    assert ptr.dtype == links.dtype == np.int32
    found = [links[ptr[i] : ptr[i + 1]].tolist() for i in range(len(wanted))]
    if cluster.routing == "first":
        assert found == first
    assert all(route in choices for route, choices in zip(found, shortest, strict=True))
    counted = fewest_hops(*cluster.ends(), src_index, dst_index, ties=True)
    assert counted.links.tolist() == [link for route in first for link in route], "counting changes no route"
    assert cluster.route_is_unique(src_index, dst_index).tolist() == [len(choices) == 1 for choices in shortest]


@pytest.mark.usefixtures("searched")
@given(random_clusters())
@settings(max_examples=300)
def test_routes_are_those_of_networkx(cluster: Cluster) -> None:
    check(cluster)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("routing", ["first", "ecmp"])
@pytest.mark.parametrize(
    "topology",
    [
        "{kind: switch, devices: 5, link: a}",
        "{kind: bus, devices: 5, link: a}",
        "{kind: torus, size: [3, 4], link: a}",
        "{kind: hypercube, dimensions: 4, link: a}",
        "{kind: cube-mesh, link: a}",
        "{kind: fat-tree, devices: 12, devices_per_leaf: 2, spines: 2, leaves_per_pod: 2, cores: 4, link: a}",
        "{kind: nodes, nodes: 3, node: {kind: switch, devices: 4, link: a}, nics: 2, rails: joined,"
        " fabric: {kind: fat-tree, devices_per_leaf: 3, spines: 3, link: a}}",
    ],
)
def test_routes_of_topologies(topology: str, routing: str) -> None:
    check(parse(topology, f"routing: {routing}\n"))


@given(st.data())
@settings(max_examples=50)
def test_routes_do_not_depend_on_the_order_of_the_pairs(data: st.DataObject) -> None:
    cluster = parse("{kind: fat-tree, devices: 8, devices_per_leaf: 2, spines: 3, link: a}")
    src, dst = all_pairs(cluster)
    ptr, links = cluster.routes(src, dst)
    order = data.draw(st.lists(st.integers(0, 63), max_size=40))
    mixed_ptr, mixed = cluster.routes(src[order], dst[order])
    for at, pair in enumerate(order):
        assert mixed[mixed_ptr[at] : mixed_ptr[at + 1]].tolist() == links[ptr[pair] : ptr[pair + 1]].tolist()


def test_a_mesh_is_routed_axis_by_axis() -> None:
    cluster = parse("{kind: mesh, size: [4, 4], link: a}")
    _, links = cluster.routes([0], [15])
    assert [cluster.node_name(int(node)) for node in cluster.head[links]] == [
        *("gpu1.0", "gpu2.0", "gpu3.0", "gpu3.1", "gpu3.2", "gpu3.3")
    ]


def test_no_pairs_no_routes() -> None:
    ptr, links = clusters.ideal(2).routes([], [])
    assert ptr.tolist() == [0] and links.size == 0
    assert clusters.ideal(2).route_is_unique([], []).size == 0


def test_no_route_names_both_devices() -> None:
    cluster = made(3, 0, [(0, 1)])
    ptr, links = cluster.routes([0], [1])
    assert (ptr.tolist(), links.tolist()) == ([0, 1], [0])
    for src, dst in ((1, 0), (0, 2), (2, 1)):
        with pytest.raises(ConfigError, match=f"no route from d{src} to d{dst}"):
            cluster.routes([0, src], [1, dst])
    with pytest.raises(ConfigError, match="no route from d0 to d2"):
        cluster.check_connected()
    with pytest.raises(ConfigError, match="no route from d1 to d0"):
        made(2, 0, [(0, 1)]).check_connected()


def counts(cluster: Cluster, kind: str) -> Counter[str]:
    """Return over how many of all pairs' routes each switch of a kind lies."""
    _, links = cluster.routes(*all_pairs(cluster))
    names = (cluster.node_name(int(node)) for node in cluster.head[links])
    return Counter(name for name in names if name.startswith(kind))


def test_ecmp_spreads_over_spines() -> None:
    """As evenly as drawing at random: 65,536 - 16 * 256 pairs cross 16 spines, within five standard deviations."""
    cluster = parse("{kind: fat-tree, devices: 256, devices_per_leaf: 16, spines: 16, link: a}")
    found = counts(cluster, "spine")
    expected = (256 * 256 - 16 * 256) / 16
    assert len(found) == 16
    assert all(abs(count - expected) < 5 * expected**0.5 for count in found.values())


def test_ecmp_spreads_over_cores() -> None:
    """Choices at one level must not be those at another: then some cores would get nothing."""
    tree = "{kind: fat-tree, devices: 256, devices_per_leaf: 4, spines: 4, leaves_per_pod: 8, cores: 16, link: a}"
    found = counts(parse(tree), "core")
    expected = (256 * 256 - 8 * 32 * 32) / 16
    assert len(found) == 16
    assert all(abs(count - expected) < 5 * expected**0.5 for count in found.values())


def test_ecmp_spreads_what_one_device_sends_and_what_one_receives() -> None:
    cluster = parse("{kind: fat-tree, devices: 1024, devices_per_leaf: 2, spines: 4, link: a}")
    others = np.arange(2, 1024)
    for src, dst in ((np.zeros_like(others), others), (others, np.zeros_like(others))):
        ptr, links = cluster.routes(src, dst)
        spines = np.bincount(cluster.head[links[ptr[:-1] + 1]])[-4:]
        assert spines.sum() == len(others)
        assert (abs(spines - len(others) / 4) < 5 * (len(others) / 4) ** 0.5).all()


def test_first_takes_one_spine_and_ecmp_the_same_each_time() -> None:
    tree = "{kind: fat-tree, devices: 16, devices_per_leaf: 4, spines: 4, link: a}"
    assert set(counts(parse(tree, "routing: first\n"), "spine")) == {"spine0"}
    again = [parse(tree).routes(*all_pairs(parse(tree)))[1].tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_a_flow_keeps_its_route_on_any_machine() -> None:
    """A literal: other spines would give other times for the same file."""
    cluster = parse("{kind: fat-tree, devices: 8, devices_per_leaf: 1, spines: 8, link: a}")
    ptr, links = cluster.routes(np.zeros(7, int), np.arange(1, 8))
    assert (cluster.head[links[ptr[:-1] + 1]] - 16).tolist() == [0, 7, 0, 3, 0, 6, 3]


@pytest.mark.parametrize(
    ("name", "sources", "shift", "limit_s"),
    [("h100_1024_fat_tree", 1024, None, 2.0), ("h100_16384_fat_tree", 16_384, 1, 2.0), ("h100_131072", 8, None, 0.5)],
)
def test_large_clusters_are_routed_quickly(name: str, sources: int, shift: int | None, limit_s: float) -> None:
    """All pairs; a ring's neighbours; eight sources to all. The limits are ten times what an idle machine needs."""
    cluster = clusters.load(name)
    n = len(cluster.devices)
    src = np.arange(sources) if shift else np.repeat(np.arange(sources), n)
    dst = (src + shift) % n if shift else np.tile(np.arange(n), sources)
    cluster.routes(src[:1], dst[-1:])  # compiled, or loaded, before the clock runs
    begin = time.process_time()
    ptr, links = cluster.routes(src, dst)
    assert time.process_time() - begin < limit_s
    assert np.array_equal(np.diff(ptr) == 0, src == dst)
    moving = np.flatnonzero(src != dst)
    assert np.array_equal(cluster.tail[links[ptr[moving]]], src[moving])
    assert np.array_equal(cluster.head[links[ptr[moving + 1] - 1]], dst[moving])
    inner = np.ones(len(links) + 1, bool)
    inner[ptr] = False
    follows = cluster.tail[links[1:]] == cluster.head[links[:-1]]
    assert follows[inner[1:-1]].all(), "links follow each other"
