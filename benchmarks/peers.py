"""The same ring in SimPy, in a plain Python loop over a heap, and in distsim: same time to 1e-9, ratio of the rates.

The peers are written for this ring alone, so they need no table of transfers and no dependencies; distsim runs
the table that every strategy goes through. Links are taken in order. Everybody's part of the array moves on by
one rank in each of 2(n - 1) steps; a rank sends what it received in the step before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np

from benchmarks import cases
from benchmarks.report import Table, against, in_turns, spread, table_of
from distsim import engine
from distsim.cluster import Cluster
from distsim.errors import ConfigError
from distsim.lower import lower
from distsim.schedule import split

WANTED = {"SimPy": 150.0, "heapq": 5.0}
"""How many times as fast as each peer distsim's engine is to be."""


class Ring(NamedTuple):
    """All that the peers know: link r goes from rank r to rank r + 1."""

    chunk_bytes: list[int]
    bandwidth_Bps: list[float]
    latency_s: list[float]


def ring_on(cluster: Cluster) -> Ring:
    """Return the ring that `cases.ring` is on a cluster of links between neighbours."""
    ranks = len(cluster.devices)
    order = np.arange(ranks)
    _, links = cluster.routes(order, (order + 1) % ranks)
    return Ring(
        chunk_bytes=(split(cases.PARAMS, ranks) * cases.ITEMSIZE).tolist(),
        bandwidth_Bps=cluster.bandwidth_Bps[links].tolist(),
        latency_s=cluster.latency_s[links].tolist(),
    )


def with_simpy(ring: Ring) -> float:
    """Return the makespan in seconds: a process for each rank, a resource for each link, a store as each mailbox.

    A message in flight is a timeout with a callback, which is a good deal faster than a process of its own.
    """
    import simpy

    sizes, bandwidth_Bps, latency_s = ring
    ranks = len(sizes)
    environment = simpy.Environment()
    links = [simpy.Resource(environment) for _ in range(ranks)]
    mailboxes = [simpy.Store(environment) for _ in range(ranks)]

    def run(rank: int) -> Generator[simpy.Event, Any, None]:
        link, inbox, outbox = links[rank], mailboxes[rank], mailboxes[(rank + 1) % ranks]

        def land(flight: simpy.Event) -> None:
            outbox.put(flight)

        for step in range(2 * (ranks - 1)):
            with link.request() as granted:
                yield granted
                yield environment.timeout(sizes[(rank - step) % ranks] / bandwidth_Bps[rank])
            flight = environment.timeout(latency_s[rank])
            assert flight.callbacks is not None
            flight.callbacks.append(land)
            yield inbox.get()

    for rank in range(ranks):
        environment.process(run(rank))
    environment.run()
    return float(environment.now)


def with_heapq(ring: Ring) -> float:
    """Return the makespan in seconds: one heap of (time, serial, rank, step), the rank being ready for that step."""
    sizes, bandwidth_Bps, latency_s = ring
    ranks = len(sizes)
    steps = 2 * (ranks - 1)
    free_s = [0.0] * ranks
    events = [(0.0, rank, rank, 0) for rank in range(ranks)]
    serial, now = ranks, 0.0
    while events:
        now, _, rank, step = heapq.heappop(events)
        if step == steps:
            continue
        start = free_s[rank]
        if start < now:
            start = now
        end = start + sizes[(rank - step) % ranks] / bandwidth_Bps[rank]
        free_s[rank] = end
        heapq.heappush(events, (end + latency_s[rank], serial, (rank + 1) % ranks, step + 1))
        serial += 1
    return now


PEERS: dict[str, Callable[[Ring], float]] = {"SimPy": with_simpy, "heapq": with_heapq}


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure distsim against SimPy (256 ranks) and against the plain loop (1,024 ranks)."""
    try:
        import simpy  # noqa: F401
    except ImportError:
        raise ConfigError("the benchmark `peers` needs SimPy; install it with `pip install 'distsim[bench]'`") from None
    ranks = {"SimPy": 16, "heapq": 16} if quick else {"SimPy": 256, "heapq": 1024}
    rows = [_row(peer, ranks[peer], which, runs) for peer in PEERS for which in ("equal", "unequal")]
    included = (
        "ratio: distsim's engine alone against the whole of the peer; ratio all: distsim from nothing, that is with "
        "building and lowering, but unchecked. Both sides give the same time to 1e-9. Ratios are paired run by run; "
        "distsim's first run, the warm-up, is not counted."
    )
    return [table_of("Against peers: ring all-reduce, links taken in order", included, rows)]


def _row(peer: str, ranks: int, which: str, runs: int) -> dict[str, Any]:
    cluster = cases.ring_of_links(ranks)
    if which == "unequal":
        cluster = cases.unequal(cluster)
    ring = ring_on(cluster)
    exchange = cases.ring(ranks)
    graph = lower(exchange, cluster, cases.ITEMSIZE, sharing="fifo").graph

    def everything() -> float:
        lowered = lower(cases.ring(ranks), cluster, cases.ITEMSIZE, sharing="fifo")
        return engine.run(lowered.graph).makespan_s

    sides = {
        "peer": lambda: PEERS[peer](ring),
        "engine": lambda: engine.run(graph).makespan_s,
        "everything": everything,
    }
    seconds, first_s, makespan_s = in_turns(sides, runs)
    for side in ("engine", "everything"):
        off = abs(makespan_s[side] - makespan_s["peer"])
        assert off <= 1e-9 * makespan_s["peer"], f"{side} {makespan_s[side]} s, {peer} {makespan_s['peer']} s"
    count = cases.rows(exchange)
    ratios, ratios_all = (
        [peers / ours for peers, ours in zip(seconds["peer"], seconds[side], strict=True)]
        for side in ("engine", "everything")
    )
    return {
        "peer": peer,
        "links": which,
        "transfers": count,
        "peer_per_s": count / float(np.median(seconds["peer"])),
        "engine_per_s": count / float(np.median(seconds["engine"])),
        **spread("ratio", ratios),
        "wanted": f"{WANTED[peer]:g}x",
        "reached": against(WANTED[peer], float(np.median(ratios))),
        "ratio_all": float(np.median(ratios_all)),
        "warm-up_s": first_s["engine"] + first_s["everything"],
    }
