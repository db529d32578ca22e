"""Clusters: every kind of topology against numbers worked out by hand, shipped files, routes, round trips."""

from __future__ import annotations

import math
from pathlib import Path

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim import cluster as clusters
from distsim.cluster import Cluster
from distsim.errors import ConfigError

TOP = """
title: t
source: s
links:
  a: {bandwidth: {value: "10 GB/s", source: s}, latency: {value: "2 us", source: s}}
  b: {bandwidth: {value: "5 GB/s", source: s}, latency: {value: "30 us", source: s}}
"""
ONLY_A = TOP.replace('  b: {bandwidth: {value: "5 GB/s", source: s}, latency: {value: "30 us", source: s}}\n', "")
US = pytest.approx


def parse(topology: str, top: str = ONLY_A, extra: str = "") -> Cluster:
    return clusters.parse(f"{top}topology: {topology}\n{extra}", "test", "test.yaml")


def route(cluster: Cluster, src: int, dst: int) -> list[str]:
    ptr, links = cluster.routes([src], [dst])
    assert ptr.dtype == links.dtype == np.int32
    return [cluster.link_name(int(link)) for link in links[ptr[0] : ptr[1]]]


def latency_s(cluster: Cluster, src: int, dst: int) -> float:
    _, links = cluster.routes([src], [dst])
    return float(cluster.latency_s[links].sum())


def narrowest_Bps(cluster: Cluster, src: int, dst: int) -> float:
    _, links = cluster.routes([src], [dst])
    return float(cluster.bandwidth_Bps[links].min())


def test_switch() -> None:
    cluster = parse("{kind: switch, devices: 3, link: a}")
    assert cluster.devices == ("gpu0", "gpu1", "gpu2")
    assert len(cluster.link_src) == 6
    assert route(cluster, 0, 2) == ["gpu0 -> a.switch", "a.switch -> gpu2"]
    assert route(cluster, 1, 1) == []
    assert latency_s(cluster, 0, 2) == 2e-6
    assert narrowest_Bps(cluster, 0, 2) == 10e9
    assert cluster.egress_Bps([0, 1, 2]).tolist() == cluster.ingress_Bps([2, 1, 0]).tolist() == [10e9] * 3
    assert cluster.reduce_bandwidth_Bps.tolist() == [math.inf] * 3


def test_bus_has_one_link_that_all_messages_share() -> None:
    cluster = parse("{kind: bus, devices: 4, link: a}")
    assert len(cluster.link_src) == 1 + 2 * 4
    assert route(cluster, 1, 3) == ["process1 -> bus.in", "bus.in -> bus.out", "bus.out -> process3"]
    assert latency_s(cluster, 1, 3) == 2e-6
    assert set(cluster.bandwidth_Bps) == {10e9}
    ptr, links = cluster.routes([0, 1, 2, 3], [1, 2, 3, 0])
    shared = set.intersection(*(set(links[ptr[i] : ptr[i + 1]]) for i in range(4)))
    assert [cluster.link_name(int(link)) for link in shared] == ["bus.in -> bus.out"]


NODES = "{kind: nodes, nodes: 2, devices_per_node: 4, inside: a, nics_per_node: 2, nic: b"


def test_nodes() -> None:
    cluster = parse(NODES + "}", TOP)
    assert cluster.devices[:5] == ("node0.gpu0", "node0.gpu1", "node0.gpu2", "node0.gpu3", "node1.gpu0")
    assert len(cluster.link_src) == 2 * (8 + 8 + 4)
    # gpu0 and gpu1 share nic0, which is as near as the switch: the inner link is the one to take.
    assert route(cluster, 0, 1) == ["node0.gpu0 -> node0.switch", "node0.switch -> node0.gpu1"]
    assert route(cluster, 1, 6) == [
        "node0.gpu1 -> node0.nic0",
        "node0.nic0 -> network",
        "network -> node1.nic1",
        "node1.nic1 -> node1.gpu2",
    ]
    assert latency_s(cluster, 0, 1) == 2e-6
    assert latency_s(cluster, 1, 6) == 30e-6
    assert narrowest_Bps(cluster, 1, 6) == 5e9
    assert cluster.egress_Bps([0]).tolist() == [10e9 + 5e9]


def test_nodes_pay_pcie_once_end_to_end() -> None:
    pcie = '  c: {bandwidth: {value: "1 GB/s", source: s}, latency: {value: "1 us", source: s}}\n'
    cluster = parse(NODES + ", pcie: c}", TOP + pcie)
    assert latency_s(cluster, 1, 6) == US(31e-6)
    assert latency_s(cluster, 0, 1) == 2e-6
    assert narrowest_Bps(cluster, 1, 6) == 1e9


def test_nodes_of_one_device_have_no_link_inside() -> None:
    cluster = parse("{kind: nodes, nodes: 3, devices_per_node: 1, nics_per_node: 1, nic: a}")
    assert latency_s(cluster, 0, 2) == 2e-6
    with pytest.raises(ConfigError, match="expected no key 'inside'"):
        parse("{kind: nodes, nodes: 3, devices_per_node: 1, inside: a, nics_per_node: 1, nic: b}", TOP)


def test_edges() -> None:
    pair = "{from: x, to: sw, link: a, both: true}, {from: y, to: sw, link: a, both: true}"
    cluster = parse(
        f"{{kind: edges, devices: [x, y, z], edges: [{pair}, {{from: z, to: x, link: b, both: true}}]}}", TOP
    )
    assert cluster.devices == ("x", "y", "z")
    assert route(cluster, 2, 1) == ["z -> x", "x -> sw", "sw -> y"]
    assert latency_s(cluster, 0, 1) == 2e-6, "as behind a switch"
    assert latency_s(cluster, 2, 1) == US(32e-6)
    assert cluster.ingress_Bps([0, 1, 2]).tolist() == [15e9, 10e9, 5e9]


def test_one_way_edges() -> None:
    ring = ", ".join(f"{{from: d{i}, to: d{(i + 1) % 4}, link: a}}" for i in range(4))
    cluster = parse(f"{{kind: edges, devices: [d0, d1, d2, d3], edges: [{ring}]}}")
    assert route(cluster, 1, 0) == ["d1 -> d2", "d2 -> d3", "d3 -> d0"]


def test_reduce_bandwidth() -> None:
    reduce = 'reduce: {bandwidth: {value: "1 TB/s", source: s}}'
    assert parse("{kind: switch, devices: 2, link: a}", extra=reduce).reduce_bandwidth_Bps.tolist() == [
        1e12,
        1e12,
    ]


@pytest.mark.parametrize(
    ("topology", "paid_on"),
    [
        ("{kind: switch, devices: 2, link: a}", {"gpu0 -> a.switch", "gpu1 -> a.switch"}),
        ("{kind: bus, devices: 2, link: a}", {"bus.in -> bus.out"}),
        ("{kind: edges, devices: [x, y], edges: [{from: x, to: y, link: a, both: true}]}", {"x -> y", "y -> x"}),
    ],
)
def test_overhead_is_paid_once_where_latency_is(topology: str, paid_on: set[str]) -> None:
    text = f"""title: t
source: s
topology: {topology}
links:
  a:
    bandwidth: {{value: "1 GB/s", source: s}}
    latency: {{value: "3 us", source: s}}
    overhead: {{value: "2 us", source: s}}
"""
    cluster = clusters.parse(text, "overhead", "overhead.yaml")
    paid = {cluster.link_name(link): value for link, value in enumerate(cluster.overhead_s.tolist()) if value}
    assert paid == dict.fromkeys(paid_on, 2e-6)
    assert (cluster.latency_s > 0).tolist() == (cluster.overhead_s > 0).tolist()


def test_no_route_names_both_devices() -> None:
    cluster = Cluster(
        name="torn",
        title="",
        devices=("x", "y", "z"),
        link_src=("x",),
        link_dst=("y",),
        latency_s=np.zeros(1),
        bandwidth_Bps=np.ones(1),
        overhead_s=np.zeros(1),
        reduce_bandwidth_Bps=np.ones(3),
    )
    assert route(cluster, 0, 1) == ["x -> y"]
    for src, dst in ((1, 0), (0, 2), (2, 1)):
        with pytest.raises(ConfigError, match=f"no route from {cluster.devices[src]} to {cluster.devices[dst]}"):
            cluster.routes([src], [dst])


def test_more_ranks_than_devices() -> None:
    with pytest.raises(ConfigError, match="has 8 devices, too few for device 15"):
        clusters.load("dgx_h100").routes([0], [15])


def test_arrays_are_read_only() -> None:
    cluster = clusters.ideal(2)
    for array in (cluster.latency_s, cluster.bandwidth_Bps, cluster.reduce_bandwidth_Bps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_ideal_switch_takes_any_number_of_ranks_and_states_its_numbers() -> None:
    cluster = clusters.ideal(5)
    assert latency_s(cluster, 0, 4) == 5e-6
    assert narrowest_Bps(cluster, 0, 4) == 12.5e9
    assert "100 Gbit/s" in cluster.title and "5 us" in cluster.title
    assert len(clusters.ideal(1).devices) == 1
    ranks = np.arange(70_000)
    ptr, _ = clusters.ideal(70_000).routes(ranks, (ranks + 1) % 70_000)
    assert ptr[-1] == 140_000
    with pytest.raises(ConfigError, match="0 ranks"):
        clusters.ideal(0)


def all_pairs(cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    n = len(cluster.devices)
    return np.divmod(np.arange(n * n), n)


SHIPPED = {"dgx_h100": (8, 1, 16), "ethernet_16x10g": (16, 1, 32), "h100_2x8_ndr": (16, 19, 96)} | {
    "laptop_loopback": (16, 2, 33)
}


def test_list_of_shipped_clusters() -> None:
    assert clusters.shipped() == sorted(SHIPPED)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_cluster(name: str) -> None:
    cluster = clusters.load(name)
    devices, switches, links = SHIPPED[name]
    graph = cluster.graph()
    assert cluster.name == name
    assert (len(cluster.devices), graph.number_of_nodes(), graph.number_of_edges()) == (
        devices,
        devices + switches,
        links,
    )
    assert [node for node, data in graph.nodes(data=True) if data["device"]] == list(cluster.devices)
    ptr, _ = cluster.routes(*all_pairs(cluster))
    hops = np.diff(ptr).reshape(devices, devices)
    assert (np.diag(hops) == 0).all() and (hops + np.eye(devices) > 0).all()
    for src, dst, data in graph.edges(data=True):
        assert cluster.link_name(data["link"]) == f"{src} -> {dst}"
        assert data["bandwidth_Bps"] == cluster.bandwidth_Bps[data["link"]]
        assert data["latency_s"] == cluster.latency_s[data["link"]]


def test_load_takes_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(ONLY_A + "topology: {kind: switch, devices: 2, link: a}\n")
    cluster = clusters.load(str(file))
    assert (cluster.name, cluster.title) == ("mine", "t")


@pytest.mark.parametrize(("name", "says"), [("dgx_h10", "did you mean 'dgx_h100'?"), ("zzz", "valid: dgx_h100, ")])
def test_unknown_name(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match="unknown cluster") as caught:
        clusters.load(name)
    assert says in str(caught.value)


@st.composite
def random_clusters(draw: st.DrawFn) -> Cluster:
    size = draw(st.integers(1, 9))
    devices = draw(st.integers(1, size))
    names = [f"n{i}" for i in range(size)]
    pairs = [(a, b) for a in names for b in names if a != b]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=30)) if pairs else []
    return Cluster(
        name="random",
        title="",
        devices=tuple(names[:devices]),
        link_src=tuple(a for a, _ in edges),
        link_dst=tuple(b for _, b in edges),
        latency_s=np.zeros(len(edges)),
        bandwidth_Bps=np.ones(len(edges)),
        overhead_s=np.zeros(len(edges)),
        reduce_bandwidth_Bps=np.ones(devices),
    )


@given(random_clusters(), st.sampled_from([1, 7, 4_000_000]))
@settings(max_examples=300, deadline=None)
def test_routes_are_those_of_networkx(cluster: Cluster, states: int) -> None:
    graph = cluster.graph()
    wanted: list[tuple[int, int]] = []
    expected: list[list[int]] = []
    for s, src in enumerate(cluster.devices):
        paths = networkx.single_source_shortest_path(graph, src)
        for d, dst in enumerate(cluster.devices):
            if dst in paths:
                hops = zip(paths[dst], paths[dst][1:], strict=False)
                wanted.append((s, d))
                expected.append([graph.edges[hop]["link"] for hop in hops])
            else:
                with pytest.raises(ConfigError, match=f"no route from {src} to {dst};"):
                    cluster.routes([s], [d])
    src_index, dst_index = np.array(wanted).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distsim.routing._SEARCH_STATES", states)
        ptr, links = cluster.routes(src_index, dst_index)
    assert [links[ptr[i] : ptr[i + 1]].tolist() for i in range(len(wanted))] == expected


def test_no_pairs_no_routes() -> None:
    ptr, links = clusters.ideal(2).routes([], [])
    assert ptr.tolist() == [0] and links.size == 0


seconds, rates = st.floats(min_value=1e-9, max_value=1e6), st.floats(min_value=1e-3, max_value=1e15)


@given(seconds, rates, rates, st.integers(1, 50), st.text(st.characters(codec="utf-8")), st.text())
@settings(deadline=None)
def test_a_written_file_loads_to_the_same_numbers(
    latency: float, bandwidth: float, reduce: float, devices: int, words: str, comment: str
) -> None:
    source = f"measured: {words}."
    data = {
        "title": source,
        "source": source,
        "topology": {"kind": "bus", "devices": devices, "link": "no"},
        "links": {
            "no": {
                "bandwidth": clusters.bandwidth_quantity(bandwidth, source),
                "latency": clusters.time_quantity(latency, source),
            }
        },
        "reduce": {"bandwidth": clusters.bandwidth_quantity(reduce, source)},
    }
    try:
        text = clusters.to_yaml(data, comment)
    except ConfigError:
        assert not (words + comment).isprintable()
        return
    cluster = clusters.parse(text, "again", "again.yaml")
    assert cluster.title == source
    assert len(cluster.devices) == devices
    assert (cluster.latency_s[0], cluster.bandwidth_Bps[0]) == (latency, bandwidth)
    assert cluster.reduce_bandwidth_Bps[0] == reduce


def test_to_yaml_refuses_what_would_not_load() -> None:
    with pytest.raises(ConfigError, match="the key 'source' is missing"):
        clusters.to_yaml({"title": "t", "topology": {"kind": "bus", "devices": 2, "link": "a"}, "links": {}})
    with pytest.raises(ConfigError, match="cannot write as YAML"):
        clusters.to_yaml({"title": np.float64(3)})
