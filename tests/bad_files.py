"""Cluster files with one mistake each in `topology`, what belongs to it, or `overrides`, and what the message says."""

from __future__ import annotations

GOOD = """\
title: "two devices"
source: "a test"
topology: {kind: switch, devices: 2, link: nvlink}
links:
  nvlink:
    bandwidth: {value: "450 GB/s", source: "s"}
    latency:
      value: "2 us"
      source: "s"
reduce:
  bandwidth: {value: "1 TB/s", source: "s"}
"""
NODES = """{kind: nodes, nodes: 2,
  node: {kind: switch, devices: 8, link: nvlink},
  nics: 8,
  fabric: {kind: switch, link: nvlink}}"""
TREE = "{kind: fat-tree, devices: 8, devices_per_leaf: 4, spines: 2, link: nvlink}"
PCIE = "{kind: pcie, devices: 8, sockets: 2, switches: 4, link: nvlink, socket_link: nvlink}"
EDGES = "{kind: edges, devices: [gpu0, gpu1], edges: [%s]}"
SWITCH = "{kind: switch, devices: 2, link: nvlink}"


def override(entry: str, topology: str = SWITCH, text: str | None = None) -> str:
    """Return the good file with one override, on line 13, and a list item on line 14."""
    return changed(SWITCH, topology, text or GOOD) + f"overrides:\n  - {{device: gpu0, slowdown: 2}}\n  - {entry}\n"


def changed(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


BAD_TOPOLOGIES: dict[str, tuple[str, int, list[str]]] = {
    # name: text, line, what the message says
    "no devices": (
        changed("devices: 2", "devices: 0"),
        3,
        ["'0' is not a count", "expected a whole number from 1"],
    ),
    "too many": (changed("devices: 2", "devices: 1048577"), 3, ["expected a whole number from 1 to 1048576"]),
    "huge count": (
        changed("devices: 2", f"devices: {'9' * 5000}"),
        3,
        ["expected a whole number from 1 to 1048576"],
    ),
    "fraction": (changed("devices: 2", "devices: 2.5"), 3, ["'2.5' is not a count"]),
    "count with sign": (changed("devices: 2", "devices: +2"), 3, ["is not a count"]),
    "too many in all": (
        changed(SWITCH, NODES.replace("nodes: 2", "nodes: 1048576")),
        4,
        ["topology.node:", "8388608 devices in all", "nodes x devices of a node <= 1048576"],
    ),
    "too many NICs": (
        changed(SWITCH, NODES.replace("nics: 8", "nics: 9")),
        5,
        ["9 NICs for 8", "expected at most one NIC per device"],
    ),
    "node without devices": (
        changed(SWITCH, NODES.replace("devices: 8, ", "")),
        4,
        ["topology.node: the key 'devices' is missing", "expected devices: 8"],
    ),
    "no devices given": (changed("devices: 2, ", ""), 3, ["topology: the key 'devices' is missing"]),
    "fabric with devices": (
        changed(SWITCH, NODES.replace("kind: switch, link", "kind: switch, devices: 16, link")),
        6,
        ["the fabric joins the 16 NICs", "expected no key 'devices'"],
    ),
    "fabric of another size": (
        changed(SWITCH, NODES.replace("kind: switch, link", "kind: torus, size: [4, 5], link")),
        6,
        ["joins 20 devices, but there are 16 NICs", "expected 16"],
    ),
    "rail of another size": (
        changed(
            SWITCH, NODES.replace("{kind: switch, link: nvlink}}", "{kind: torus, size: [3], link: nvlink}}")
        ).replace("nics: 8", "nics: 8, rails: separate"),
        6,
        ["joins 3 devices, but there are 2 NICs"],
    ),
    "rails misspelt": (
        changed(SWITCH, NODES.replace("nics: 8", "nics: 8, rails: join")),
        5,
        ["topology.rails", "'join' is unknown", "expected one of: joined, separate", "did you mean 'joined'?"],
    ),
    "kind inside": (
        changed(SWITCH, NODES.replace("kind: switch, devices", "kind: swich, devices")),
        4,
        ["topology.node.kind", "did you mean 'switch'?"],
    ),
    "nodes inside nodes": (
        changed(SWITCH, NODES.replace("kind: switch, devices", "kind: nodes, devices")),
        4,
        ["topology.node.kind: unknown kind 'nodes'"],
    ),
    "link inside": (
        changed(SWITCH, NODES.replace("devices: 8, link: nvlink", "devices: 8, link: nvlnk")),
        4,
        ["topology.node.link: unknown link 'nvlnk'", "did you mean 'nvlink'?"],
    ),
    "key of a torus": (
        changed(SWITCH, "{kind: torus, sizes: [2, 2], link: nvlink}"),
        3,
        ["topology.sizes: unknown key", "did you mean 'size'?"],
    ),
    "count in a torus": (
        changed(SWITCH, "{kind: torus, size: [2, 0], link: nvlink}"),
        3,
        ["topology.size.1", "'0' is not a count"],
    ),
    "too many axes": (
        changed(SWITCH, "{kind: mesh, size: [2, 2, 2, 2], link: nvlink}"),
        3,
        ["topology.size", "too many items", "expected size: [4, 4]"],
    ),
    "too large a mesh": (
        changed(SWITCH, "{kind: mesh, size: [1048576, 2], link: nvlink}"),
        3,
        ["2097152 devices in all", "expected at most 1048576"],
    ),
    "too many dimensions": (
        changed(SWITCH, "{kind: hypercube, dimensions: 21, link: nvlink}"),
        3,
        ["expected at most 20"],
    ),
    "too many links": (
        changed(SWITCH, "{kind: full, devices: 1048576, link: nvlink}"),
        3,
        ["1,099,510,579,200 links", "expected a cluster of at most 20,000,000"],
    ),
    "too many links in a tree": (
        changed(SWITCH, TREE.replace("devices: 8", "devices: 1048576").replace("spines: 2", "spines: 1048576")),
        3,
        ["links", "expected a cluster of at most 20,000,000"],
    ),
    "too many links in all nodes": (
        changed(SWITCH, NODES.replace("kind: switch, devices: 8", "kind: full, devices: 1000").replace("2,", "50,")),
        3,
        ["links", "expected a cluster of at most 20,000,000"],
    ),
    "uneven sockets": (
        changed(SWITCH, PCIE.replace("sockets: 2", "sockets: 3")),
        3,
        ["topology.sockets: 8 cannot be divided evenly among 3", "expected a multiple"],
    ),
    "uneven PCIe switches": (
        changed(SWITCH, PCIE.replace("switches: 4", "switches: 1")),
        3,
        ["topology.switches: 1 cannot be divided evenly among 2"],
    ),
    "no link between sockets": (
        changed(SWITCH, PCIE.replace(", socket_link: nvlink", "")),
        3,
        ["2 sockets need a link", "expected `socket_link: upi`"],
    ),
    "one socket with a link to another": (
        changed(SWITCH, PCIE.replace("sockets: 2, ", "")),
        3,
        ["expected no key 'socket_link'"],
    ),
    "half a third level": (
        changed(SWITCH, TREE.replace("spines: 2", "spines: 2, cores: 4")),
        3,
        ["topology.cores: a third level needs both", "expected `leaves_per_pod: 4, cores: 8` or neither"],
    ),
    "other half": (
        changed(SWITCH, TREE.replace("spines: 2", "spines: 2, leaves_per_pod: 1")),
        3,
        ["a third level needs both"],
    ),
    "uneven cores": (
        changed(SWITCH, TREE.replace("spines: 2", "spines: 2, leaves_per_pod: 1, cores: 3")),
        3,
        ["3 cores cannot be divided among the 2 spines of a pod", "expected a multiple"],
    ),
    "cores' ratio without cores": (
        changed(SWITCH, TREE.replace("spines: 2", "spines: 2, core_oversubscription: 3")),
        3,
        ["there are no cores", "expected `leaves_per_pod: 4, cores: 8`"],
    ),
    "ratio of zero": (
        changed(SWITCH, TREE.replace("spines: 2", "spines: 2, oversubscription: 0")),
        3,
        ["topology.oversubscription: '0' is not a factor", "expected a number above zero"],
    ),
    "ratio with a unit": (
        changed(SWITCH, TREE.replace("spines: 2", "spines: 2, oversubscription: 2 GB/s")),
        3,
        ["'2 GB/s' is not a factor"],
    ),
    "ratio out of range": (
        changed(SWITCH, TREE.replace("spines: 2", "spines: 2, oversubscription: 1e4")),
        3,
        ["10000 is out of range", "expected 0.001 to 1000"],
    ),
    "two latencies": (
        changed("    latency:\n", '    hop_latency: {value: 1 us, source: "s"}\n    latency:\n'),
        5,
        ["links.nvlink", "expected one of them"],
    ),
    "sharing misspelt": (GOOD + "sharing: fiffo\n", 12, ["'fiffo' is unknown", "did you mean 'fifo'?"]),
    "routing misspelt": (GOOD + "routing: random\n", 12, ["'random' is unknown", "expected one of: first, ecmp"]),
    "routing is a list": (GOOD + "routing: [ecmp]\n", 12, ["routing", "is unknown", "expected one of: first, ecmp"]),
    "host without overhead": (GOOD + "host: {}\n", 12, ["host: the key 'overhead' is missing", "expected overhead:"]),
    "host's unit": (
        GOOD + 'host: {overhead: {value: "1 GB", source: s}}\n',
        12,
        ["host.overhead.value", "expected a time"],
    ),
    "overrides is a mapping": (
        GOOD + "overrides: {device: gpu0, slowdown: 2}\n",
        12,
        ["overrides", "is not a list", "expected overrides: [{device: gpu7, slowdown: 2}]"],
    ),
    "override of nothing": (override("{slowdown: 2}"), 14, ["overrides.1", "expected `from` and `to`, or `device`"]),
    "half a link": (override("{from: gpu0, failed: true}"), 14, ["expected `from` and `to`, or `device`"]),
    "link and device": (
        override("{from: gpu0, to: switch, device: gpu0, slowdown: 2}"),
        14,
        ["a device and a link at once"],
    ),
    "no change": (
        override("{from: gpu0, to: switch}"),
        14,
        ["nothing is changed", "expected one of: failed, slowdown, bandwidth, latency, overhead"],
    ),
    "not failed": (override("{from: gpu0, to: switch, failed: false}"), 14, ["nothing is changed"]),
    "failed and slow": (
        override("{from: gpu0, to: switch, failed: true, slowdown: 2}"),
        14,
        ["a failed link has no slowdown", "expected `failed: true` alone"],
    ),
    "slow twice": (
        override("{from: gpu0, to: switch, slowdown: 2, bandwidth: {value: 1 GB/s, source: s}}"),
        14,
        ["expected one of them"],
    ),
    "device that failed": (
        override("{device: gpu0, failed: true}"),
        14,
        ["a device can only be slowed down", "expected {device: gpu7, slowdown: 2}"],
    ),
    "speed-up": (
        override("{device: gpu0, slowdown: 0.5}"),
        14,
        ["slowdown: 0.5 is out of range", "expected 1 to 1e+06"],
    ),
    "slowed down to nothing": (
        override("{from: gpu0, to: switch, slowdown: 1e6}\n" * 2 + "  - {device: gpu0, slowdown: 2}").replace(
            "\n{from", "\n  - {from"
        ),
        15,
        ["overrides.2: 1e+12 times slower in all", "expected at most 1e+09"],
    ),
    "device slowed down to nothing": (
        override("{device: gpu0, slowdown: 1e6}\n  - {device: gpu0, slowdown: 1e6}"),
        15,
        ["overrides.2: 2e+12 times slower in all"],
    ),
    "unknown device": (
        override("{device: gpu9, slowdown: 2}"),
        14,
        ["overrides.1: no node is called 'gpu9'", "did you mean 'gpu"],
    ),
    "a switch as device": (override("{device: switch, slowdown: 2}"), 14, ["no node is called 'switch'"]),
    "unknown end": (
        override("{from: gpu0, to: swich, slowdown: 2}"),
        14,
        ["no node is called 'swich'", "did you mean 'switch'?"],
    ),
    "pattern of nothing": (override('{from: "gpux*", to: switch, slowdown: 2}'), 14, ["no node is called 'gpux*'"]),
    "no such link": (
        override("{from: gpu0, to: gpu1, slowdown: 2}"),
        14,
        ["no link leads from 'gpu0' to 'gpu1'", "expected a link such as gpu0 -> switch"],
    ),
    "override's quantity": (
        override("{from: gpu0, to: switch, bandwidth: 1 GB/s}"),
        14,
        ["overrides.1.bandwidth", "not a mapping", "expected bandwidth: {value:"],
    ),
    "override's key": (override("{form: gpu0, to: switch}"), 14, ["overrides.1.form", "did you mean 'from'?"]),
    "last link failed": (
        override("{from: gpu1, to: switch, failed: true}"),
        14,
        ["no route from gpu1 to gpu0"],
    ),
    "straggler where all work is free": (
        override("{device: gpu0, slowdown: 2}").replace('reduce:\n  bandwidth: {value: "1 TB/s", source: "s"}\n', ""),
        11,
        ["overrides.0.device: additions and the host's work are free here", "expected `reduce` or `host`"],
    ),
    "no edges": (changed(SWITCH, EDGES % ""), 3, ["is empty", "expected edges:"]),
    "one-way fabric": (
        changed(
            SWITCH,
            NODES.replace("{kind: switch, link: nvlink}", EDGES % "{from: gpu0, to: gpu1, link: nvlink}").replace(
                "nics: 8", "nics: 1"
            ),
        ),
        3,
        ["no route from node1.gpu0 to node0.gpu0"],
    ),
    "one-way edge": (
        changed(SWITCH, EDGES % "{from: gpu0, to: gpu1, link: nvlink}"),
        3,
        ["no route from gpu1 to gpu0"],
    ),
    "edge to itself": (changed(SWITCH, EDGES % "{from: gpu0, to: gpu0, link: nvlink}"), 3, ["leads nowhere"]),
    "edge given twice": (
        changed(SWITCH, EDGES % ", ".join(["{from: gpu0, to: gpu1, link: nvlink, both: true}"] * 2)),
        3,
        ["gpu0 -> gpu1 is given 2 times", "expected once"],
    ),
    "misspelt node": (
        changed(SWITCH, EDGES % "{from: gpu0, to: gpu1, link: nvlink}, {from: gpu1, to: gpuo, link: nvlink}"),
        3,
        ["'gpuo' is neither", "did you mean 'gpu0'?"],
    ),
    "edge's flag": (
        changed(SWITCH, EDGES % "{from: gpu0, to: gpu1, link: nvlink, both: yes}"),
        3,
        ["edges.0.both", "expected `true`"],
    ),
    "edge's key": (
        changed(SWITCH, EDGES % "{form: gpu0, to: gpu1, link: nvlink}"),
        3,
        ["did you mean 'from'?"],
    ),
    "edge's link": (
        changed(SWITCH, EDGES % "{from: gpu0, to: gpu1, link: nvlin}"),
        3,
        ["edges.0.link", "'nvlink'"],
    ),
    "twin devices": (changed(SWITCH, "{kind: edges, devices: [a, a], edges: []}"), 3, ["listed 2 times"]),
    "no devices listed": (
        changed(SWITCH, "{kind: edges, devices: [], edges: []}"),
        3,
        ["is empty", "expected devices:"],
    ),
    "edges is a text": (
        changed(SWITCH, "{kind: edges, devices: [a], edges: x}"),
        3,
        ["is not a list", "expected edges:"],
    ),
}
