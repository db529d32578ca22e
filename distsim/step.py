"""One exchange on one cluster: checked, lowered, run, and held against its lower bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from distsim import bounds, engine
from distsim.check import check
from distsim.cluster import Cluster
from distsim.engine import Timeline
from distsim.errors import ConfigError, TooFewDevices, nearest
from distsim.lower import Lowered, lower
from distsim.schedule import ITEMSIZE, Exchange
from distsim.traffic import Traffic


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Simulation:
    """The result of simulating one exchange: counts, times and bounds."""

    exchange: Exchange
    cluster: Cluster
    dtype: str
    """Type of an element, a key of `ITEMSIZE`."""
    lowered: Lowered
    timeline: Timeline
    traffic: Traffic
    """Messages and bytes of the transfers that were run: all of the schedule's rows, or the engine raises."""
    peak_staging_bytes: int
    """The most that any rank has to set aside for what has begun to arrive and is not yet applied."""
    latency_bound_s: float
    """The longest chain of latencies of this schedule on this cluster."""
    bandwidth_bound_s: float
    """The busiest link's bytes over its bandwidth."""
    any_algorithm_bound_s: float
    """What every algorithm needs at least on this cluster."""

    @property
    def time_s(self) -> float:
        """When the last rank is done."""
        return self.timeline.makespan_s

    @property
    def algbw_Bps(self) -> float | None:
        """Algorithm bandwidth as nccl-tests defines it, array bytes over time; None where nothing is sent."""
        return self.exchange.params * ITEMSIZE[self.dtype] / self.time_s if self.time_s > 0 else None

    @property
    def busbw_Bps(self) -> float | None:
        """Bus bandwidth as nccl-tests defines it for all-reduce: algbw * 2(n - 1)/n for n workers."""
        n = self.exchange.workers
        return None if self.algbw_Bps is None else self.algbw_Bps * 2 * (n - 1) / n


def simulate(exchange: Exchange, cluster: Cluster, dtype: str = "float32") -> Simulation:
    """Check an exchange, run it on a cluster, and hold the result against its lower bounds.

    Rank r runs on the cluster's device r; `dtype` is the type of an element, a key of `ITEMSIZE`.

    Raises: TooFewDevices if the cluster has too few devices; ScheduleError if the exchange is wrong.
    """
    if exchange.ranks > len(cluster.devices):
        servers = exchange.ranks - exchange.workers
        what = f"{exchange.workers} workers" + (f" and {servers} server" if servers else "")
        raise TooFewDevices(
            f"cluster {cluster.name} has {len(cluster.devices)} devices, but {exchange.strategy} with {what} "
            f"needs {exchange.ranks}; use fewer ranks or a larger cluster (`distsim clusters` lists them)"
        )
    if dtype not in ITEMSIZE:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, ITEMSIZE)}")
    check(exchange)
    itemsize = ITEMSIZE[dtype]
    lowered = lower(exchange, cluster, itemsize)
    timeline = engine.run(lowered.graph)
    traffic = exchange.traffic(itemsize)
    array_bytes = exchange.params * itemsize
    simulation = Simulation(
        exchange=exchange,
        cluster=cluster,
        dtype=dtype,
        lowered=lowered,
        timeline=timeline,
        traffic=traffic,
        peak_staging_bytes=_peak_staging_bytes(exchange, itemsize, lowered, timeline),
        latency_bound_s=engine.run(replace(lowered.graph, duration_s=np.zeros(lowered.graph.tasks))).makespan_s,
        bandwidth_bound_s=bounds.busiest_link_s(traffic, cluster),
        any_algorithm_bound_s=bounds.any_algorithm_s(exchange.workers, exchange.ranks, array_bytes, cluster),
    )
    for bound in ("latency_bound_s", "bandwidth_bound_s", "any_algorithm_bound_s"):
        least = getattr(simulation, bound)
        assert simulation.time_s >= least * (1 - 1e-9), f"simulated {simulation.time_s} s beats {bound} {least} s"
    return simulation


def _peak_staging_bytes(exchange: Exchange, itemsize: int, lowered: Lowered, timeline: Timeline) -> int:
    """Return the greatest sum, over time and ranks, of the messages between their start and their apply's end."""
    rank, begin, end, size = [], [], [], []
    parts = zip(exchange.schedules(), lowered.waits, lowered.transfers, lowered.applies, strict=True)
    for schedule, waits, rows, groups in parts:
        rank.append(schedule.dst)
        begin.append(timeline.start_s[rows])
        end.append(timeline.finish_s[groups[waits.group_of_row]])
        size.append(schedule.elements() * itemsize)
    ranks, sizes = np.concatenate(rank), np.concatenate(size)
    times = np.concatenate((*begin, *end))
    change = np.concatenate((sizes, -sizes))
    where = np.concatenate((ranks, ranks))
    order = np.lexsort((change, times, where))  # of one time, what is freed goes before what is taken
    staged = np.cumsum(change[order])  # every rank ends at zero, so the next one starts there
    return int(staged.max(initial=0))
