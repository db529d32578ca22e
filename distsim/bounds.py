"""Lower bounds on the time of an exchange: below them no simulated result may lie."""

from __future__ import annotations

import numpy as np

from distsim.cluster import Cluster
from distsim.traffic import Traffic


def busiest_link_s(traffic: Traffic, cluster: Cluster) -> float:
    """Return the busiest link's bytes over its bandwidth and its messages' overheads, in seconds."""
    ptr, links = cluster.routes(traffic.link_src, traffic.link_dst)
    hops = np.diff(ptr)
    link_bytes = np.bincount(links, np.repeat(traffic.link_bytes, hops), len(cluster.bandwidth_Bps))
    messages = np.bincount(links, np.repeat(traffic.link_messages, hops), len(cluster.bandwidth_Bps))
    return float((link_bytes / cluster.bandwidth_Bps + messages * cluster.overhead_s).max(initial=0.0))


def any_algorithm_s(workers: int, ranks: int, array_bytes: int, cluster: Cluster) -> float:
    """Return the time that any exchange of `array_bytes` among the first `workers` devices needs, in seconds.

    The largest of three bounds, each without regard to the others: contributions must cross between worker 0
    and every other one (latency); every worker must send its contribution and receive the result at least
    once; and 2(n - 1) arrays have to be sent in all, by the `ranks` devices together (Patarasuk and Yuan
    2009, section 2; nobody adds inside the network). Servers are `ranks` beyond the workers.
    """
    if workers < 2 or array_bytes == 0:
        return 0.0
    latency = max(_farthest_s(cluster, workers, away=True), _farthest_s(cluster, workers, away=False))
    devices = np.arange(ranks)
    egress, ingress = cluster.egress_Bps(devices), cluster.ingress_Bps(devices)
    alone = array_bytes / min(egress[:workers].min(), ingress[:workers].min())
    together = 2 * (workers - 1) * array_bytes / min(egress.sum(), ingress.sum())
    return float(max(latency, alone, together))


def _farthest_s(cluster: Cluster, workers: int, away: bool) -> float:
    """Return the latency from worker 0 to the worker farthest away (or back), by the quickest of all paths.

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
            return float(latency_s[:workers].max())
