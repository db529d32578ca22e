"""One exchange on one cluster: checked, lowered, run, and held against its lower bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from distsim import bounds, chain, engine, exchanges, failure
from distsim.check import check
from distsim.cluster import Cluster
from distsim.dependencies import dependencies
from distsim.engine import Timeline
from distsim.errors import ConfigError, TooFewDevices, nearest
from distsim.lower import Lowered, Posting, assemble, lower
from distsim.network import Sharing, network
from distsim.schedule import ITEMSIZE, Exchange
from distsim.symmetry import TURNS, Asymmetric, prove, quotient
from distsim.traffic import Traffic

SYMMETRIC_FROM = 512
"""Workers from which on it pays to look for symmetry; below, every transfer is simulated, and can be looked at."""

TELL_FROM = 2_000_000
"""Transfers that take a second or more."""
CROWD = 10_000
"""Messages at once whose sharing can take seconds or more: each that ends may change the rates of all others."""


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
    link_load_s: bounds.Floats
    """How long each link of the cluster is busy at least, shape (links,)."""
    latency_bound_s: float
    """The longest chain of latencies of this schedule on this cluster."""
    any_algorithm_bound_s: float
    """What every algorithm needs at least on this cluster."""
    posting: Posting = "eager"
    """When ranks handed over their transfers; how links were shared is the cluster's `sharing`."""
    copies: int = 1
    """By symmetry: how many transfers each simulated one stands for. Counts, times and bounds are those of all."""

    @property
    def bandwidth_bound_s(self) -> float:
        """The busiest link's bytes over its bandwidth."""
        return float(self.link_load_s.max(initial=0.0))

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
        """Bus bandwidth as nccl-tests defines it: algbw times the collective's factor for n workers."""
        factor = exchanges.bus_factor(self.exchange.collective, self.exchange.workers)
        return None if self.algbw_Bps is None else self.algbw_Bps * factor

    @property
    def peak_staging_bytes(self) -> int:
        """The most that any rank has to set aside for what has begun to arrive and is not yet applied.

        Counted anew each time: for millions of messages that takes seconds.
        """
        return _peak_staging_bytes(self)


def simulate(
    exchange: Exchange,
    cluster: Cluster,
    dtype: str = "float32",
    *,
    sharing: Sharing | None = None,
    posting: Posting = "eager",
    fail: tuple[int, int] | None = None,
) -> Simulation:
    """Check an exchange, run it on a cluster, and hold the result against its lower bounds.

    Rank r runs on the cluster's device r; `dtype` is the type of an element, a key of `ITEMSIZE`. `sharing` of
    links and `posting` of transfers are explained at `lower`. With `fail`, a rank and a step, that rank stops
    before its transfers of that step (see failure.py).

    Raises: TooFewDevices if the cluster has too few devices; ScheduleError if the exchange is wrong; RankFailed
    if it cannot finish without the rank that fails.
    """
    fits(exchange.strategy, exchange.workers, exchange.ranks, cluster)
    itemsize = _itemsize(dtype)
    cluster = _shared(cluster, sharing)
    plans = [dependencies(schedule) for schedule in exchange.schedules()]
    check(exchange, plans=plans)
    lowered = lower(exchange, cluster, itemsize, posting=posting, plans=plans)
    if fail is not None:
        failure.survive(exchange, lowered, *fail)
    traffic = exchange.traffic(itemsize)
    return held_against_bounds(
        Simulation(
            exchange=exchange,
            cluster=cluster,
            dtype=dtype,
            lowered=lowered,
            latency_bound_s=chain.longest_chain_s(lowered.graph),
            timeline=engine.run(lowered.graph),
            traffic=traffic,
            link_load_s=bounds.link_load_s(traffic, cluster),
            any_algorithm_bound_s=bounds.any_algorithm_s(exchange, itemsize, cluster),
            posting=posting,
        )
    )


def simulate_strategy(
    strategy: str,
    workers: int,
    params: int,
    cluster: Cluster,
    dtype: str = "float32",
    *,
    collective: str = "all-reduce",
    sharing: Sharing | None = None,
    posting: Posting = "eager",
    whole: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Simulation:
    """Build and simulate an exchange; a large one by symmetry where that is proven (see symmetry.py).

    `whole` simulates every transfer in any case; `tell` is told what takes long. The other arguments are as for
    `exchanges.build` and `simulate`.

    Raises: as these do; ConfigError saying what stands against symmetry where the whole does not fit in memory.
    """
    why = ""
    if not whole and workers >= SYMMETRIC_FROM:
        try:
            return simulate_representatives(
                strategy, workers, params, cluster, dtype, collective=collective, sharing=sharing, posting=posting
            )
        except Asymmetric as reason:
            why = f"; symmetry does not help: {reason}"
    try:
        exchange = exchanges.build(strategy, workers, params, collective)
    except ConfigError as error:
        raise ConfigError(f"{error}{why}") from None
    rows = sum(schedule.rows for schedule in exchange.schedules())
    if rows > TELL_FROM:
        tell(f"checking and simulating {rows:,} transfers{why} ...")
    elif (at_once := int((exchange.gradients.step == 0).sum())) > CROWD:
        tell(f"{at_once:,} messages at once: where their links differ, sharing them can take minutes ...")
    return simulate(exchange, cluster, dtype, sharing=sharing, posting=posting)


def simulate_representatives(
    strategy: str,
    workers: int,
    params: int,
    cluster: Cluster,
    dtype: str = "float32",
    *,
    collective: str = "all-reduce",
    sharing: Sharing | None = None,
    posting: Posting = "eager",
) -> Simulation:
    """Simulate one transfer of each class that symmetry proves to behave alike.

    Raises: Asymmetric saying what stands against it; otherwise as `simulate_strategy`.
    """
    fits(strategy, workers, workers, cluster)
    itemsize = _itemsize(dtype)
    cluster = _shared(cluster, sharing)
    proven = prove(strategy, workers, params, cluster, collective)
    exchange = Exchange(
        strategy=str(exchanges.parse(strategy, collective)),
        workers=workers,
        gradients=proven.schedule,
        collective=collective,
    )
    net = quotient(network(exchange.schedules(), cluster), proven)
    waits = dependencies(proven.schedule, proven.landings)
    lowered = assemble(exchange, net, [waits], itemsize, posting)
    timeline = engine.run(lowered.graph)
    if engine.queued(lowered.graph, timeline):
        raise Asymmetric(TURNS)
    some = proven.schedule.traffic(itemsize)
    return held_against_bounds(
        Simulation(
            exchange=exchange,
            cluster=cluster,
            dtype=dtype,
            lowered=lowered,
            latency_bound_s=chain.longest_chain_s(lowered.graph),
            timeline=timeline,
            traffic=proven.everywhere(some),
            link_load_s=proven.load_s(some, cluster),
            any_algorithm_bound_s=bounds.any_algorithm_s(
                exchange, itemsize, cluster, proven.group.representatives(), proven.chunk_like()
            ),
            posting=posting,
            copies=proven.group.copies,
        )
    )


def _shared(cluster: Cluster, sharing: Sharing | None) -> Cluster:
    """Return the cluster with its links shared in another way, so that results say which; None leaves it as it is."""
    return cluster if sharing is None else replace(cluster, sharing=sharing)


def _itemsize(dtype: str) -> int:
    if dtype not in ITEMSIZE:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, ITEMSIZE)}")
    return ITEMSIZE[dtype]


def fits(strategy: str, workers: int, ranks: int, cluster: Cluster) -> None:
    """Raise TooFewDevices if a cluster has fewer devices than an exchange has ranks."""
    if ranks > len(cluster.devices):
        servers = ranks - workers
        what = f"{workers} workers" + (f" and {servers} server{'s' * (servers > 1)}" if servers else "")
        raise TooFewDevices(
            f"cluster {cluster.name} has {len(cluster.devices)} devices, but {strategy} with {what} "
            f"needs {ranks}; use fewer ranks or a larger cluster (`distsim clusters` lists them)"
        )


def held_against_bounds(simulation: Simulation) -> Simulation:
    """Return the simulation; a result beneath one of its bounds is a bug of ours."""
    for bound in ("latency_bound_s", "bandwidth_bound_s", "any_algorithm_bound_s"):
        least = getattr(simulation, bound)
        assert simulation.time_s >= least * (1 - 1e-9), f"simulated {simulation.time_s} s beats {bound} {least} s"
    return simulation


def _peak_staging_bytes(simulation: Simulation) -> int:
    """Return the greatest sum, over time and ranks, of the messages between their start and their apply's end."""
    timeline, itemsize = simulation.timeline, ITEMSIZE[simulation.dtype]
    rank, begin, end, size = [], [], [], []
    for part in simulation.lowered.parts:
        rank.append(part.waits.dst[part.waits.group_of_row])
        begin.append(timeline.start_s[part.sends][part.messages.of_row])
        end.append(timeline.finish_s[part.groups][part.waits.group_of_row])
        size.append(part.schedule.elements() * itemsize)
    ranks, sizes = np.concatenate(rank), np.concatenate(size)
    times = np.concatenate((*begin, *end))
    change = np.concatenate((sizes, -sizes))
    where = np.concatenate((ranks, ranks))
    order = np.lexsort((change, times, where))  # of one time, what is freed goes before what is taken
    staged = np.cumsum(change[order])  # every rank ends at zero, so the next one starts there
    return int(staged.max(initial=0))
