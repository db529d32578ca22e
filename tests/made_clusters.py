"""Clusters to test with, made as a user would make them: from the text of a file (JSON is YAML)."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from distsim import cluster as clusters
from distsim.cluster import Cluster


def link(
    bandwidth_Bps: float, latency_s: float, overhead_s: float | None = None, *, per_hop: bool = False
) -> dict[str, Any]:
    """An entry of a cluster file's `links`."""
    entry: dict[str, Any] = {
        "bandwidth": clusters.bandwidth_quantity(bandwidth_Bps, "a test"),
        "hop_latency" if per_hop else "latency": clusters.time_quantity(latency_s, "a test"),
    }
    return entry if overhead_s is None else {**entry, "overhead": clusters.time_quantity(overhead_s, "a test")}


def cluster(
    topology: dict[str, Any],
    links: dict[str, Any],
    *,
    reduce_Bps: float | None = None,
    host_s: float | None = None,
    **more: Any,
) -> Cluster:
    """Make a cluster; `more` are further keys of the file."""
    file: dict[str, Any] = {"title": "t", "source": "s", "topology": topology, "links": links, **more}
    if reduce_Bps is not None:
        file["reduce"] = {"bandwidth": clusters.bandwidth_quantity(reduce_Bps, "a test")}
    if host_s is not None:
        file["host"] = {"overhead": clusters.time_quantity(host_s, "a test")}
    return clusters.parse(json.dumps(file), "test", "test.yaml")


def flat(
    devices: int,
    bandwidth_Bps: float,
    latency_s: float,
    overhead_s: float | None = None,
    *,
    kind: str = "switch",
    **more: Any,
) -> Cluster:
    """Devices around a switch, on a bus, or each joined to every other (`full`) or its neighbours (`ring`)."""
    topology = {"kind": kind, "devices": devices, "link": "wire"}
    return cluster(topology, {"wire": link(bandwidth_Bps, latency_s, overhead_s)}, **more)


PLAIN = ("switch", "bus", "full", "ring", "mesh", "torus", "hypercube", "cube-mesh", "pcie", "fat-tree")
KINDS = (*PLAIN, "edges", "nodes")


@st.composite
def some_clusters(draw: st.DrawFn, kind: str) -> Cluster:
    """Draw a cluster of one kind with any numbers, of 4 devices or more."""
    number = st.floats(1e-3, 1e3, allow_nan=False)
    maybe_time = st.one_of(st.none(), st.floats(0, 1e-3))
    links = {
        name: link(draw(number) * 1e9, draw(st.floats(0, 1e-3)), draw(maybe_time), per_hop=draw(st.booleans()))
        for name in "abc"
    }
    topology = _topology(draw, kind)
    text = json.dumps(topology)
    used = {name: entry for name, entry in links.items() if f'"{name}"' in text}
    reduce_Bps = draw(st.one_of(st.none(), number.map(lambda value: value * 1e9)))
    more: dict[str, Any] = {"sharing": draw(st.sampled_from(["fair", "fifo"]))}
    if draw(st.booleans()):
        more["routing"] = draw(st.sampled_from(["first", "ecmp"]))
    host_s = draw(maybe_time)
    if (reduce_Bps is not None or host_s is not None) and draw(st.booleans()):
        more["overrides"] = [{"device": "*", "slowdown": 1 + draw(number)}]
    return cluster(topology, used, reduce_Bps=reduce_Bps, host_s=host_s, **more)


def _topology(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    match kind:
        case "switch" | "bus" | "full" | "ring":
            return {"kind": kind, "devices": draw(st.integers(4, 8)), "link": "a"}
        case "mesh" | "torus":
            return {"kind": kind, "size": draw(st.sampled_from([[4], [5], [2, 3], [3, 3], [2, 2, 2]])), "link": "a"}
        case "hypercube":
            return {"kind": kind, "dimensions": draw(st.integers(2, 3)), "link": "a"}
        case "cube-mesh":
            return {"kind": kind, "link": "a"}
        case "pcie":
            sockets = draw(st.integers(1, 2))
            below = {"switches": 2 * sockets} if draw(st.booleans()) else {}
            between = {"socket_link": "b"} if sockets > 1 else {}
            return {"kind": kind, "devices": 8, "sockets": sockets, "link": "a", **below, **between}
        case "fat-tree":
            level = {"level_latency": clusters.time_quantity(draw(st.floats(0, 1e-4)), "a test")}
            pods = {"leaves_per_pod": 2, "cores": 4} if draw(st.booleans()) else {}
            over = draw(st.sampled_from([1, 2, 3.5]))
            return {
                **{"kind": kind, "devices": 8, "devices_per_leaf": 2, "spines": 2, "oversubscription": over},
                **{"link": "a", **pods, **(level if draw(st.booleans()) else {})},
            }
        case "edges":  # a ring of devices, so that some are on the way of others, and some chords
            names = [f"d{i}" for i in range(5)]
            ends = [(i, (i + 1) % 5) for i in range(5)] + [(i, (i + 2) % 5) for i in range(5) if draw(st.booleans())]
            edges = [
                {"from": names[a], "to": names[b], "link": draw(st.sampled_from("abc")), "both": draw(st.booleans())}
                for a, b in ends
            ]
            return {"kind": kind, "devices": names, "edges": edges}
    assert kind == "nodes"
    per_node = draw(st.integers(1, 3))
    node = {"kind": draw(st.sampled_from(["switch", "full", "ring"])), "devices": per_node, "link": "b"}
    topology: dict[str, Any] = {"kind": kind, "nodes": 4, "node": node, "nics": draw(st.integers(1, per_node))}
    fabric = {"kind": "fat-tree", "devices_per_leaf": 2, "spines": 2, "link": "a"}
    topology["fabric"] = draw(st.sampled_from([{"kind": "switch", "link": "a"}, fabric]))
    if draw(st.booleans()):
        topology["pcie"] = "c"
    return topology
