"""Builders against networkx and closed forms, composition, the latency convention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsim import cluster as clusters
from distsim.cluster import Cluster
from distsim.topologies import Link, Shape, builders
from distsim.topologies.graph import copies

LINK = Link(latency_s=2e-6, bandwidth_Bps=10e9, overhead_s=1e-6)
TOP = """
title: t
source: s
links:
"""
A = '  a: {bandwidth: {value: "10 GB/s", source: s}, latency: {value: "2 us", source: s}}\n'
B = '  b: {bandwidth: {value: "5 GB/s", source: s}, latency: {value: "30 us", source: s}}\n'
C = '  c: {bandwidth: {value: "8 GB/s", source: s}, latency: {value: "400 us", source: s}}\n'


def parse(topology: str, links: str = A) -> Cluster:
    return clusters.parse(f"{TOP}{links}topology: {topology}\n", "test", "test.yaml")


def digraph(shape: Shape) -> nx.DiGraph[int]:
    """Return the numbered nodes and the links, with their bandwidth."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(shape.devices) + len(shape.switches)))
    cables = shape.cables
    graph.add_weighted_edges_from(zip(cables.tail.tolist(), cables.head.tolist(), cables.bandwidth_Bps, strict=True))
    assert graph.number_of_edges() == len(cables.tail), "no link is given twice"
    assert graph.number_of_nodes() == len({*shape.devices, *shape.switches}), "every node has a name of its own"
    return graph


def same(shape: Shape, expected: nx.Graph[int]) -> bool:
    """Return whether a shape has exactly the edges of an undirected graph, each way."""
    return set(digraph(shape).edges) == set(expected.to_directed().edges)


def crossing(shape: Shape, side: set[int]) -> int:
    """Return how many links lead from one side of a cut to the other."""
    tail, head = shape.cables.tail.tolist(), shape.cables.head.tolist()
    return sum(a in side and b not in side for a, b in zip(tail, head, strict=True))


@given(st.integers(1, 24))
def test_full(n: int) -> None:
    shape = builders.full(n, LINK)
    assert same(shape, nx.complete_graph(n))
    assert crossing(shape, set(range(n // 2))) == (n // 2) * (n - n // 2)


@given(st.integers(1, 40))
def test_switch_and_bus(n: int) -> None:
    assert same(builders.switch(n, LINK), nx.relabel_nodes(nx.star_graph(n), {0: n, **{i + 1: i for i in range(n)}}))
    bus = digraph(builders.bus(n, LINK))
    assert set(bus.edges) == {(n, n + 1), *((i, n) for i in range(n)), *((n + 1, i) for i in range(n))}


@given(st.integers(1, 40))
def test_ring(n: int) -> None:
    expected = nx.cycle_graph(n) if n > 2 else nx.path_graph(n)
    assert same(builders.ring(n, LINK), expected)
    if n > 1:
        assert nx.diameter(nx.Graph(digraph(builders.ring(n, LINK)))) == n // 2


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def numbered_grid(size: Sequence[int], periodic: bool) -> nx.Graph[int]:
    """Return networkx's grid with its coordinates numbered in row-major order, without loops."""
    grid = nx.grid_graph(tuple(reversed(size)), periodic=periodic)
    graph: nx.Graph[int] = nx.convert_node_labels_to_integers(grid, ordering="sorted")
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    return graph


@given(SIZES)
def test_mesh(size: list[int]) -> None:
    shape = builders.mesh(size, LINK)
    assert same(shape, numbered_grid(size, periodic=False))
    assert nx.diameter(nx.Graph(digraph(shape))) == sum(length - 1 for length in size)


@given(SIZES)
def test_torus(size: list[int]) -> None:
    shape = builders.torus(size, LINK)
    assert same(shape, numbered_grid(size, periodic=True))
    assert nx.diameter(nx.Graph(digraph(shape))) == sum(length // 2 for length in size)
    degree = sum(min(length - 1, 2) for length in size)
    assert {count for _, count in digraph(shape).out_degree()} == {degree}


def test_bisection_of_tori_and_hypercubes() -> None:
    for shape, links in (
        (builders.torus((4, 4), LINK), 2 * 4),
        (builders.mesh((4, 4), LINK), 4),
        (builders.torus((4, 4, 4), LINK), 2 * 16),
        (builders.torus((2, 4), LINK), 4),
        (builders.hypercube(5, LINK), 16),
    ):
        assert crossing(shape, set(range(len(shape.devices) // 2))) == links


def test_names_of_a_mesh_are_coordinates() -> None:
    shape = builders.mesh((2, 3), LINK)
    assert tuple(shape.devices) == ("gpu0.0", "gpu0.1", "gpu0.2", "gpu1.0", "gpu1.1", "gpu1.2")


@given(st.integers(1, 8))
def test_hypercube(dimensions: int) -> None:
    shape = builders.hypercube(dimensions, LINK)
    cube = nx.hypercube_graph(dimensions)
    numbered: nx.Graph[int] = nx.Graph()
    for ends in cube.edges:
        bits = ["".join(map(str, np.ravel(place))) for place in ends]
        numbered.add_edge(int(bits[0], 2), int(bits[1], 2))
    assert same(shape, numbered)
    assert nx.diameter(nx.Graph(digraph(shape))) == dimensions


def test_cube_mesh() -> None:
    shape = builders.cube_mesh(LINK)
    graph = digraph(shape)
    links = {(a, b): round(data["weight"] / 10e9) for a, b, data in graph.edges(data=True)}
    assert all(links[b, a] == count for (a, b), count in links.items())
    assert [sum(count for (a, _), count in links.items() if a == gpu) for gpu in range(8)] == [6] * 8
    assert {count for _, count in graph.out_degree()} == {4}
    quads = [graph.subgraph(quad).to_undirected() for quad in (range(4), range(4, 8))]
    assert all(nx.is_isomorphic(quad, nx.complete_graph(4)) for quad in quads)
    assert {(a, b) for a, b in links if a < 4 <= b} == {(0, 4), (1, 5), (2, 6), (3, 7)}
    assert nx.diameter(graph) == 2
    # A Hamiltonian cycle of double links is what lets NCCL run its rings at full speed.
    double = nx.Graph([pair for pair, count in links.items() if count == 2])
    assert nx.is_isomorphic(double, nx.cycle_graph(8))


def test_pcie_tree() -> None:
    shape = builders.pcie(8, 2, 4, LINK, LINK)
    assert tuple(shape.switches) == ("pcie0", "pcie1", "pcie2", "pcie3", "root0", "root1")
    pairs = [(gpu, 8 + gpu // 2) for gpu in range(8)] + [(8 + i, 12 + i // 2) for i in range(4)] + [(12, 13)]
    assert same(shape, nx.Graph(pairs))
    flat = builders.pcie(4, 1, 0, LINK, None)
    assert tuple(flat.switches) == ("root0",)
    assert same(flat, nx.Graph([(gpu, 4) for gpu in range(4)]))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0, 7.0]))
def test_leaf_and_spine(devices: int, per_leaf: int, spines: int, ratio: float) -> None:
    shape = builders.fat_tree(devices, per_leaf, spines, LINK, oversubscription=ratio)
    leaves = math.ceil(devices / per_leaf)
    leaf, spine = range(devices, devices + leaves), range(devices + leaves, devices + leaves + spines)
    pairs = [(d, leaf[d // per_leaf]) for d in range(devices)] + list(itertools.product(leaf, spine))
    graph = digraph(shape)
    assert set(graph.edges) == set(nx.Graph(pairs).to_directed().edges)
    for node in leaf:  # the capacity below a full leaf is `ratio` times that above
        up = sum(graph.edges[node, top]["weight"] for top in spine)
        assert up * ratio == pytest.approx(per_leaf * 10e9)
        assert up == pytest.approx(sum(graph.edges[top, node]["weight"] for top in spine))


def test_three_levels() -> None:
    shape = builders.fat_tree(
        16, 2, 2, LINK, leaves_per_pod=2, cores=4, oversubscription=2, core_oversubscription=3, level_latency_s=1e-6
    )
    graph = digraph(shape)
    names = (*shape.devices, *shape.switches)
    named = nx.relabel_nodes(graph, dict(enumerate(names)))
    assert len(shape.switches) == 8 + 8 + 4
    for pod in range(4):
        for leaf, spine in itertools.product((2 * pod, 2 * pod + 1), repeat=2):
            assert named.edges[f"leaf{leaf}", f"spine{spine}"]["weight"] == pytest.approx(20e9 / 2 / 2)
    for spine in range(8):  # the k-th spine of each pod has the k-th group of cores
        group = [2 * (spine % 2), 2 * (spine % 2) + 1]
        assert {top for top in named[f"spine{spine}"] if top.startswith("core")} == {f"core{k}" for k in group}
        up = sum(named.edges[f"spine{spine}", f"core{k}"]["weight"] for k in group)
        down = sum(named.edges[f"spine{spine}", leaf]["weight"] for leaf in named[f"spine{spine}"] if leaf[0] == "l")
        assert up * 3 == pytest.approx(down)
    # The classic fat tree of switches with k ports: k**3 / 4 hosts, and any half can send at full speed to the other.
    k = 4
    classic = builders.fat_tree(k**3 // 4, k // 2, k // 2, LINK, leaves_per_pod=k // 2, cores=k * k // 4)
    assert len(classic.switches) == 5 * k * k // 4
    capacity = digraph(classic)
    half, other_half = -1, -2
    for host in range(8):
        capacity.add_edge(half, host, weight=10e9)
        capacity.add_edge(host + 8, other_half, weight=10e9)
    assert nx.maximum_flow_value(capacity, half, other_half, capacity="weight") == pytest.approx(8 * 10e9)


def test_copies_stand_side_by_side() -> None:
    ring = builders.fat_tree(4, 2, 1, LINK)
    three = copies(ring, 3, "x")
    assert three.devices[5] == "x1.gpu1" and three.switches[5] == "x1.spine0"
    parts = sorted(nx.weakly_connected_components(digraph(three)), key=min)
    assert [sorted(part) for part in parts] == [
        [*range(4 * i, 4 * i + 4), *range(12 + 3 * i, 15 + 3 * i)] for i in range(3)
    ]
    assert all(nx.is_isomorphic(digraph(three).subgraph(part), digraph(ring)) for part in parts)


STAR = ", ".join(f"{{from: {one}, to: hub, link: a, both: true}}" for one in "xyzw")
INSIDE = {
    "switch": "{kind: switch, devices: 4, link: a}",
    "full": "{kind: full, devices: 4, link: a}",
    "ring": "{kind: ring, devices: 4, link: a}",
    "bus": "{kind: bus, devices: 4, link: a}",
    "torus": "{kind: torus, size: [2, 2], link: a}",
    "hypercube": "{kind: hypercube, dimensions: 2, link: a}",
    "pcie": "{kind: pcie, devices: 4, sockets: 2, switches: 2, link: a, socket_link: a}",
    "edges": f"{{kind: edges, devices: [x, y, z, w], edges: [{STAR}]}}",
}
BETWEEN = {
    "switch": "{kind: switch, link: b}",
    "full": "{kind: full, link: b}",
    "ring": "{kind: ring, link: b}",
    "fat-tree": "{kind: fat-tree, devices_per_leaf: 2, spines: 2, link: b}",
    "torus": "{kind: torus, size: [%d, 2], link: b}",
}


@pytest.mark.parametrize(
    ("inside", "between", "nics", "rails"),
    [*itertools.product(INSIDE, BETWEEN, (1, 2, 4), ("", "rails: joined, ", "rails: separate, "))],
)
def test_any_node_with_any_fabric(inside: str, between: str, nics: int, rails: str) -> None:
    ports = 4 if "separate" in rails else 4 * nics
    fabric = BETWEEN[between] % (ports // 2) if between == "torus" else BETWEEN[between]
    text = f"{{kind: nodes, nodes: 4, node: {INSIDE[inside]}, nics: {nics}, {rails}fabric: {fabric}}}"
    cluster = parse(text, A + B)
    n = len(cluster.devices)
    assert n == 16
    src, dst = np.divmod(np.arange(n * n), n)
    ptr, links = cluster.routes(src, dst)
    alone = parse(INSIDE[inside])
    node_ptr, _ = alone.routes(*np.divmod(np.arange(16), 4))
    hops = np.diff(ptr).reshape(n, n)
    for pair in range(n * n):
        names = {cluster.node_name(int(node)).split(".")[0] for node in cluster.tail[links[ptr[pair] : ptr[pair + 1]]]}
        if src[pair] // 4 == dst[pair] // 4:
            assert names <= {f"node{src[pair] // 4}"}, "what stays in a node never leaves it, nor turns round in a NIC"
    for tail, head in zip(cluster.tail.tolist(), cluster.head.tolist(), strict=True):
        if tail < n and cluster.node_name(head).endswith(".out"):
            assert cluster.node_name(head) == f"node{tail // 4}.nic{tail % 4 * nics // 4}.out"
    for node in range(4):
        own = hops[4 * node : 4 * node + 4, 4 * node : 4 * node + 4]
        assert own.tolist() == np.diff(node_ptr).reshape(4, 4).tolist()
    # Neither the way from a device to its NIC nor that through a NIC limits a message.
    narrowest = [cluster.bandwidth_Bps[links[ptr[i] : ptr[i + 1]]].min(initial=math.inf) for i in range(n * n)]
    between_nodes = src // 4 != dst // 4
    assert set(np.array(narrowest)[between_nodes]) == {5e9}
    assert set(np.array(narrowest)[~between_nodes & (src != dst)]) == {10e9}


def test_rails_are_wired_as_they_say() -> None:
    text = "{kind: nodes, nodes: 4, node: {kind: switch, devices: 2, link: a}, nics: 2, %s, fabric: %s}"
    tree = "{kind: fat-tree, devices_per_leaf: 4, spines: 2, link: b}"
    switch = "{kind: switch, link: b}"

    def leaf_of(cluster: Cluster) -> dict[str, str]:
        graph = cluster.graph()
        outs = [name for name in cluster.switches if name.endswith(".out")]
        return {name: next(iter(graph[name])) for name in outs}

    by_node = leaf_of(parse(text.replace("%s, ", "", 1) % tree, A + B))
    joined = leaf_of(parse(text % ("rails: joined", tree), A + B))
    separate = leaf_of(parse(text % ("rails: separate", switch), A + B))
    for node, nic in itertools.product(range(4), range(2)):
        name = f"node{node}.nic{nic}.out"
        assert by_node[name] == f"leaf{node // 2}"
        assert joined[name] == f"leaf{nic}"
        assert separate[name] == f"rail{nic}.switch"


def test_nics_that_are_joined_directly_pass_messages_on() -> None:
    node = "{kind: switch, devices: 2, link: a}"
    cluster = parse(f"{{kind: nodes, nodes: 5, node: {node}, nics: 1, fabric: {{kind: ring, link: b}}}}", A + B)
    _, links = cluster.routes([0], [5])
    assert [cluster.node_name(int(cluster.head[link])) for link in links] == [
        *("node0.nic0.out", "node1.nic0.in", "node1.nic0.out", "node2.nic0.in", "node2.gpu1")
    ]
    assert cluster.latency_s[links].sum() == pytest.approx(60e-6)
    assert cluster.bandwidth_Bps[links].tolist() == [10e9, 5e9, 10e9, 5e9, 10e9]


def test_a_route_changes_rails_inside_a_node() -> None:
    node = "{kind: switch, devices: 2, link: a}"
    fabric = "{kind: switch, link: b}"
    cluster = parse(f"{{kind: nodes, nodes: 2, node: {node}, nics: 2, rails: separate, fabric: {fabric}}}", A + B)
    _, links = cluster.routes([0], [3])
    assert [cluster.node_name(int(cluster.head[link])) for link in links] == [
        *("node0.switch", "node0.gpu1", "node0.nic1.out", "rail1.switch", "node1.nic1.in", "node1.gpu1")
    ]
    assert not cluster.route_is_unique([0], [3])[0], "it could change rails in the other node as well"


def test_a_nic_hangs_on_the_pcie_switch_of_its_devices() -> None:
    node = "{kind: pcie, devices: 4, switches: 2, link: a}"
    cluster = parse(
        f"{{kind: nodes, nodes: 2, node: {node}, nics: 2, pcie: c, fabric: {{kind: switch, link: b}}}}", A + B + C
    )
    _, links = cluster.routes([1], [6])
    assert [cluster.link_name(int(link)) for link in links] == [
        "node0.gpu1 -> node0.pcie0",
        "node0.pcie0 -> node0.nic0.out",
        "node0.nic0.out -> switch",
        "switch -> node1.nic1.in",
        "node1.nic1.in -> node1.pcie1",
        "node1.pcie1 -> node1.gpu2",
    ]
    assert cluster.latency_s[links].tolist() == [2e-6, 400e-6, 30e-6, 0, 0, 0]


# Latency from the first to the last device: hops times what each costs.
LATENCY = {
    "switch": ("{kind: switch, devices: 5, link: a}", 2),
    "bus": ("{kind: bus, devices: 5, link: a}", 2),
    "full": ("{kind: full, devices: 5, link: a}", 2),
    "ring": ("{kind: ring, devices: 6, link: a}", 2),  # the last one is next to the first
    "mesh": ("{kind: mesh, size: [3, 4], link: a}", 2 * (2 + 3)),
    "torus": ("{kind: torus, size: [3, 4], link: a}", 2 * (1 + 1)),
    "hypercube": ("{kind: hypercube, dimensions: 4, link: a}", 2 * 4),
    "cube-mesh": ("{kind: cube-mesh, link: a}", 2 * 2),
    "pcie, one socket": ("{kind: pcie, devices: 4, switches: 2, link: a}", 2 * 2),
    "pcie, two": ("{kind: pcie, devices: 4, sockets: 2, link: a, socket_link: a}", 2 + 2),
    "one leaf": ("{kind: fat-tree, devices: 2, devices_per_leaf: 2, spines: 2, %s, link: a}", 2),
    "two leaves": ("{kind: fat-tree, devices: 4, devices_per_leaf: 2, spines: 2, %s, link: a}", 2 + 7),
    "two pods": (
        "{kind: fat-tree, devices: 8, devices_per_leaf: 2, spines: 2, leaves_per_pod: 2, cores: 2, %s, link: a}",
        2 + 7 + 7,
    ),
}
LEVEL = 'level_latency: {value: "7 us", source: s}'


@pytest.mark.parametrize("name", sorted(LATENCY))
def test_latency_of_a_route(name: str) -> None:
    topology, expected_us = LATENCY[name]
    cluster = parse(topology.replace("%s", LEVEL))
    last = len(cluster.devices) - 1
    for src, dst in ((0, last), (last, 0)):
        _, links = cluster.routes([src], [dst])
        assert cluster.latency_s[links].sum() == pytest.approx(expected_us * 1e-6)


HOPS = {
    "switch": ("{kind: switch, devices: 64, link: a}", 2 * 0.5),
    "bus": ("{kind: bus, devices: 5, link: a}", 0.5),
    "full": ("{kind: full, devices: 5, link: a}", 0.5),
    "two leaves": ("{kind: fat-tree, devices: 4, devices_per_leaf: 2, spines: 2, %s, link: a}", 2 * 0.5 + 7),
}


@pytest.mark.parametrize("name", sorted(HOPS))
def test_latency_per_hop(name: str) -> None:
    """500 ns per hop: a star's two hops take 1 us, which `latency: 1 us` says as well."""
    topology, expected_us = HOPS[name]
    per_hop = '  a: {bandwidth: {value: "10 GB/s", source: s}, hop_latency: {value: "500 ns", source: s}}\n'
    cluster = parse(topology.replace("%s", LEVEL), per_hop)
    _, links = cluster.routes([0], [len(cluster.devices) - 1])
    assert cluster.latency_s[links].sum() == pytest.approx(expected_us * 1e-6)


def test_overhead_is_paid_on_the_way_up() -> None:
    shape = builders.fat_tree(4, 2, 2, LINK)
    assert np.flatnonzero(shape.cables.overhead_s).tolist() == [0, 1, 2, 3]
