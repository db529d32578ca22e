"""The clusters and exchanges that are measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distsim import cluster, exchanges
from distsim.cluster import Cluster
from distsim.collectives import PERSONALISED
from distsim.schedule import Exchange

PARAMS = 2**28
"""Elements of the array: 1 GiB of float32."""
ITEMSIZE = 4

LINK = """
links:
  link:
    bandwidth: {value: "50 GB/s", source: "the line rate of 400 Gbit/s"}
    latency: {value: "4 us", source: "of the order of an InfiniBand hop between GPUs"}
"""
HEAD = "title: a benchmark\nsource: made up for speed, not for accuracy\n"


def ring_of_links(devices: int) -> Cluster:
    """Return devices in a ring, with a link each way between neighbours."""
    return _parsed(f"topology: {{kind: ring, devices: {devices}, link: link}}")


def switch(devices: int) -> Cluster:
    """Return devices behind one switch that never limits: two links a route."""
    return _parsed(f"topology: {{kind: switch, devices: {devices}, link: link}}")


def fat_tree(devices: int) -> Cluster:
    """Return leaves of 16 devices below 4 spines, oversubscribed 4:1; a hash picks the spine of each pair."""
    shape = f"kind: fat-tree, devices: {devices}, devices_per_leaf: 16, spines: 4, oversubscription: 4, link: link"
    return _parsed(f"topology: {{{shape}}}")


def _parsed(topology: str) -> Cluster:
    return cluster.parse(HEAD + topology + LINK, "benchmark", "benchmark")


def unequal(equal: Cluster) -> Cluster:
    """Return the cluster with the bandwidth of each link multiplied by a number of its own between 0.5 and 1.5.

    Then hardly any two messages end together, and no work can be shared between them.
    """
    factor = np.random.default_rng(1).uniform(0.5, 1.5, len(equal.bandwidth_Bps))
    return replace(equal, bandwidth_Bps=equal.bandwidth_Bps * factor)


def ring(ranks: int) -> Exchange:
    """Return the ring all-reduce of 1 GiB: 2n(n - 1) messages."""
    return exchanges.build("ring", ranks, PARAMS)


def all_at_once(ranks: int) -> Exchange:
    """Return the all-reduce in which everybody sends everything to everybody: n(n - 1) messages in one step."""
    return exchanges.build("all-to-all", ranks, PARAMS)


def shifts(ranks: int) -> Exchange:
    """Return the personalised all-to-all in n - 1 shifts.

    From its rows, as `build` refuses more ranks than fit in memory while they are *checked*.
    """
    schedule = exchanges.rows_of("direct", ranks, PARAMS, np.arange(ranks), PERSONALISED)
    return Exchange(strategy="direct", collective=PERSONALISED, workers=ranks, gradients=schedule)


def rows(exchange: Exchange) -> int:
    """Return the number of rows of an exchange; where no rows travel together, that of its transfers."""
    return sum(schedule.rows for schedule in exchange.schedules())
