"""Lower bounds on the time of an exchange: below them no simulated result may lie."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distsim.cluster import Cluster
from distsim.schedule import Bools, Exchange
from distsim.traffic import Traffic

Floats = npt.NDArray[np.float64]


def link_load_s(traffic: Traffic, cluster: Cluster) -> Floats:
    """Return how long each link is busy at least: bytes over bandwidth, and messages' overheads; shape (links,)."""
    ptr, links = cluster.routes(traffic.link_src, traffic.link_dst)
    hops, count = np.diff(ptr), len(cluster.bandwidth_Bps)
    link_bytes = np.bincount(links, np.repeat(traffic.link_bytes, hops), count)
    messages = np.bincount(links, np.repeat(traffic.link_messages, hops), count)
    return np.asarray(link_bytes / cluster.bandwidth_Bps + messages * cluster.overhead_s)


def any_algorithm_s(
    exchange: Exchange,
    itemsize: int,
    cluster: Cluster,
    ranks: npt.NDArray[np.integer] | None = None,
    chunk_like: npt.NDArray[np.integer] | None = None,
) -> float:
    """Return the time that any exchange with the same pre- and postcondition needs, in seconds.

    Elements have `itemsize` bytes; additions happen on the exchange's ranks, not in the network. The largest of
    three bounds, each without regard to the others:

    - latency: contributions must cross from rank 0 to whoever holds sums of them, and the other way;
    - alone: what a rank contributes for others must leave it once, and what it holds of others must reach it;
    - together: a chunk that k ranks contribute to and h ranks hold has to be sent k + h - 2 times, once more if
      no rank does both: k - 1 times before the first sum is whole, then to each other holder. For an all-reduce
      that is 2(n - 1) arrays in all (Patarasuk and Yuan 2009, section 2).

    Where ranks and chunks look alike it is enough to look at some `ranks`, and for each chunk at one like it.
    """
    final = exchange.parameters or exchange.gradients
    workers = np.arange(exchange.ranks) < exchange.workers
    ranks = np.arange(exchange.ranks) if ranks is None else ranks
    columns = np.arange(final.chunks) if chunk_like is None else np.unique(chunk_like)
    alike = np.arange(final.chunks) if chunk_like is None else np.searchsorted(columns, chunk_like)
    chunk_bytes = final.chunk_elements * itemsize
    if not chunk_bytes.any() or exchange.ranks < 2:
        return 0.0
    given_of, held_of = exchange.gradients.contributes[:, columns], final.must_hold[:, columns]
    held_of = held_of & workers[:, None] & (final.chunk_elements[columns] > 0)  # what servers keep is their own affair
    givers, holders = given_of.sum(axis=0)[alike], held_of.sum(axis=0)[alike]
    apart = ~np.asarray((given_of & held_of).any(axis=0))[alike]
    given, held = exchange.gradients.contributes[ranks], final.must_hold[ranks] & workers[ranks, None]
    leaves, arrives = given & (holders - held > 0), held & (givers - given > 0)
    devices = np.arange(exchange.ranks)
    egress_Bps, ingress_Bps = cluster.egress_Bps(devices), cluster.ingress_Bps(devices)
    alone = max((leaves @ chunk_bytes / egress_Bps[ranks]).max(), (arrives @ chunk_bytes / ingress_Bps[ranks]).max())
    sends = np.where(holders > 0, givers + holders - 2 + apart, 0)
    together = float(sends @ chunk_bytes) / min(egress_Bps.sum(), ingress_Bps.sum())
    latency = max(
        _farthest_s(cluster, (held_of & given_of[0]).any(axis=1), away=True),
        _farthest_s(cluster, (given_of & held_of[0]).any(axis=1), away=False),
    )
    return float(max(latency, alone, together))


def _farthest_s(cluster: Cluster, among: Bools, away: bool) -> float:
    """Return the latency from rank 0 to the rank of `among` that is farthest away (or back), by the quickest path.

    Routes have the fewest hops; a contribution may take more, from device to device (Bellman and Ford).
    """
    tail, head, nodes = cluster.ends()
    if not away:
        tail, head = head, tail
    latency_s = np.full(nodes, np.inf)
    latency_s[0] = 0.0
    while True:
        before = latency_s.copy()
        np.minimum.at(latency_s, head, before[tail] + cluster.latency_s)
        if np.array_equal(before, latency_s):
            return float(latency_s[: len(among)][among].max(initial=0.0))
