"""Clusters: small ones against numbers worked out by hand, shipped files, summaries, round trips."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys
import time
import tracemalloc
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
    assert tuple(cluster.devices) == ("gpu0", "gpu1", "gpu2")
    assert len(cluster.tail) == 6
    assert route(cluster, 0, 2) == ["gpu0 -> switch", "switch -> gpu2"]
    assert route(cluster, 1, 1) == []
    assert latency_s(cluster, 0, 2) == 2e-6
    assert narrowest_Bps(cluster, 0, 2) == 10e9
    assert cluster.egress_Bps([0, 1, 2]).tolist() == cluster.ingress_Bps([2, 1, 0]).tolist() == [10e9] * 3
    assert cluster.reduce_bandwidth_Bps.tolist() == [math.inf] * 3


def test_bus_has_one_link_that_all_messages_share() -> None:
    cluster = parse("{kind: bus, devices: 4, link: a}")
    assert len(cluster.tail) == 1 + 2 * 4
    assert route(cluster, 1, 3) == ["process1 -> bus.in", "bus.in -> bus.out", "bus.out -> process3"]
    assert latency_s(cluster, 1, 3) == 2e-6
    assert set(cluster.bandwidth_Bps) == {10e9}
    ptr, links = cluster.routes([0, 1, 2, 3], [1, 2, 3, 0])
    shared = set.intersection(*(set(links[ptr[i] : ptr[i + 1]]) for i in range(4)))
    assert [cluster.link_name(int(link)) for link in shared] == ["bus.in -> bus.out"]


NODE = "{kind: switch, devices: 4, link: a}"
NODES = f"{{kind: nodes, nodes: 2, node: {NODE}, nics: 2, fabric: {{kind: switch, link: b}}"


def test_nodes() -> None:
    cluster = parse(NODES + "}", TOP)
    assert cluster.devices[:5] == ("node0.gpu0", "node0.gpu1", "node0.gpu2", "node0.gpu3", "node1.gpu0")
    assert len(cluster.tail) == 2 * (8 + 8 + 4)
    assert tuple(cluster.switches) == (
        *("node0.switch", "node1.switch"),
        *(f"node{node}.nic{nic}.{side}" for side in ("out", "in") for node in (0, 1) for nic in (0, 1)),
        "switch",
    )
    # gpu0 and gpu1 share nic0, which is no way from one to the other.
    assert route(cluster, 0, 1) == ["node0.gpu0 -> node0.switch", "node0.switch -> node0.gpu1"]
    assert cluster.route_is_unique([0, 1], [1, 6]).all()
    assert route(cluster, 1, 6) == [
        "node0.gpu1 -> node0.nic0.out",
        "node0.nic0.out -> switch",
        "switch -> node1.nic1.in",
        "node1.nic1.in -> node1.gpu2",
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
        ("{kind: switch, devices: 2, link: a}", {"gpu0 -> switch", "gpu1 -> switch"}),
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


def test_more_ranks_than_devices() -> None:
    with pytest.raises(ConfigError, match="has 8 devices, too few for device 15"):
        clusters.load("dgx_h100").routes([0], [15])


def test_arrays_are_read_only() -> None:
    cluster = clusters.ideal(2)
    for array in (cluster.tail, cluster.head, cluster.latency_s, cluster.bandwidth_Bps, cluster.host_overhead_s):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_host_overhead_sharing_and_routing() -> None:
    plain = parse("{kind: switch, devices: 2, link: a}")
    assert (plain.host_overhead_s.tolist(), plain.sharing, plain.routing) == ([0, 0], "fair", "first")
    extra = 'host: {overhead: {value: "3 us", source: s}}\nsharing: fifo\nrouting: ecmp\n'
    cluster = parse("{kind: switch, devices: 2, link: a}", extra=extra)
    assert (cluster.host_overhead_s.tolist(), cluster.sharing, cluster.routing) == ([3e-6, 3e-6], "fifo", "ecmp")


def test_fat_trees_are_routed_by_ecmp_unless_the_file_says_otherwise() -> None:
    tree = "{kind: fat-tree, devices: 4, devices_per_leaf: 2, spines: 2, link: a}"
    assert parse(tree).routing == "ecmp"
    assert parse(tree, extra="routing: first\n").routing == "first"
    fabric = tree.replace("devices: 4, ", "").replace("link: a", "link: b")
    nodes = NODES.replace("fabric: {kind: switch, link: b}", f"fabric: {fabric}")
    assert parse(nodes + "}", TOP).routing == "ecmp"


def test_a_cluster_can_be_copied_to_another_process() -> None:
    cluster = clusters.load("h100_2x8_ndr")
    again = pickle.loads(pickle.dumps(cluster))
    assert tuple(again.switches) == tuple(cluster.switches) and again.link_name(95) == cluster.link_name(95)
    assert np.array_equal(again.tail, cluster.tail)
    assert dataclasses.replace(cluster, sharing="fifo").sharing == "fifo"


def test_names_are_a_sequence() -> None:
    names = clusters.ideal(3).devices
    assert list(names) == ["device0", "device1", "device2"] == [*names[:2], names[-1]]
    assert "device2" in names and "device3" not in names
    with pytest.raises(IndexError):
        names[3]


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


SHIPPED = {
    "dgx1_v100": (8, 0, 32),
    "dgx_a100": (8, 1, 16),
    "dgx_b200": (8, 1, 16),
    "dgx_h100": (8, 1, 16),
    "ethernet_16x10g": (16, 1, 32),
    "gh200_4x4_slingshot": (16, 33, 4 * 12 + 32 + 32),
    "h100_1024_fat_tree": (1024, 128 + 2048 + 32 + 16, 2 * (3 * 1024 + 32 * 16)),
    "h100_131072": (131_072, 16_384 + 2 * 131_072 + 1, 2 * 3 * 131_072),
    "h100_16384_fat_tree": (16_384, 2048 + 32_768 + 512 + 512 + 256, 2 * (3 * 16_384 + 512 * 32 + 512 * 8)),
    "h100_2x8_ndr": (16, 35, 96),
    "hgx_h200": (8, 1, 16),
    "infiniband_16x100g": (16, 1, 32),
    "laptop_loopback": (16, 2, 33),
    "rtx4090_8x_pcie": (8, 2, 18),
}
"""Devices, switches (a NIC is two) and directed links."""


def test_list_of_shipped_clusters() -> None:
    assert clusters.shipped() == sorted(SHIPPED)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_cluster(name: str) -> None:
    cluster = clusters.load(name)
    assert (len(cluster.devices), len(cluster.switches), len(cluster.tail)) == SHIPPED[name]
    assert clusters.summary(name) == (name, len(cluster.devices), cluster.title)
    cluster.check_connected()
    n = len(cluster.devices)
    count = min(n, 4096)
    ptr, links = cluster.routes(np.arange(count), (np.arange(count) + 1) % n)  # a ring's messages
    assert (np.diff(ptr) > 0).all()
    assert (cluster.tail[links[ptr[:-1]]] == np.arange(count)).all(), "routes leave their source"
    assert (cluster.head[links[ptr[1:] - 1]] == (np.arange(count) + 1) % n).all(), "and reach their destination"
    assert len({cluster.node_name(node) for node in range(cluster.nodes)}) == cluster.nodes


@pytest.mark.parametrize("name", sorted(name for name in SHIPPED if SHIPPED[name][0] <= 16))
def test_graph_of_a_shipped_cluster(name: str) -> None:
    cluster = clusters.load(name)
    devices = len(cluster.devices)
    graph = cluster.graph()
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (cluster.nodes, len(cluster.tail))
    assert [node for node, data in graph.nodes(data=True) if data["device"]] == list(cluster.devices)
    ptr, _ = cluster.routes(*all_pairs(cluster))
    distance = dict(networkx.all_pairs_shortest_path_length(graph))
    expected = [distance[src][dst] for src in cluster.devices for dst in cluster.devices]
    assert np.diff(ptr).tolist() == expected
    assert np.diff(ptr).reshape(devices, devices).diagonal().tolist() == [0] * devices
    for src, dst, data in graph.edges(data=True):
        assert cluster.link_name(data["link"]) == f"{src} -> {dst}"
        assert data["bandwidth_Bps"] == cluster.bandwidth_Bps[data["link"]]
        assert data["latency_s"] == cluster.latency_s[data["link"]]


def test_summaries_build_no_graph_and_compile_nothing() -> None:
    code = """if True:
        import sys
        from distsim import cluster
        cluster.Cluster.__post_init__ = None
        assert len([cluster.summary(name) for name in cluster.shipped()]) > 10
        sys.exit("numba" in sys.modules or "networkx" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_largest_shipped_cluster_is_ready_quickly_and_small() -> None:
    begin = time.process_time()
    clusters.load("h100_131072")
    assert time.process_time() - begin < 0.7, "0.2 s on an idle machine"
    tracemalloc.start()
    try:
        clusters.load("h100_131072")
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


def test_a_million_devices() -> None:
    cluster = parse("{kind: switch, devices: 1048576, link: a}")
    assert len(cluster.devices) == 2**20
    assert route(cluster, 0, 2**20 - 1) == ["gpu0 -> switch", "switch -> gpu1048575"]


def test_load_takes_a_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(ONLY_A + "topology: {kind: switch, devices: 2, link: a}\n")
    cluster = clusters.load(str(file))
    assert (cluster.name, cluster.title) == ("mine", "t")


@pytest.mark.parametrize(
    ("name", "says"), [("dgx_h10", "did you mean 'dgx_h100'?"), ("zzz", "valid: dgx1_v100, dgx_a100, ")]
)
def test_unknown_name(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match="unknown cluster") as caught:
        clusters.load(name)
    assert says in str(caught.value)


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
