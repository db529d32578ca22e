"""Lowering: an exchange on a cluster becomes a `TaskGraph` of transfers, applies and updates."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from distsim.cluster import Cluster
from distsim.engine import Ints, TaskGraph
from distsim.schedule import Dependencies, Exchange, Op, Schedule, dependencies

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lowered:
    """A task graph, and where the parts of the exchange are in it."""

    graph: TaskGraph
    waits: tuple[Dependencies, ...]
    """Per schedule of the exchange: its `dependencies`."""
    transfers: tuple[Index, ...]
    """Per schedule of the exchange: the task of each row."""
    applies: tuple[Index, ...]
    """Per schedule of the exchange: the task of each group of its `dependencies`."""


@dataclass(slots=True)
class _Tasks:
    """Columns of tasks and waits as they grow."""

    count: int = 0
    duration_s: list[npt.NDArray[np.float64]] = field(default_factory=list)
    latency_s: list[npt.NDArray[np.float64]] = field(default_factory=list)
    route: list[Index] = field(default_factory=list)
    before: list[Index] = field(default_factory=list)
    after: list[Index] = field(default_factory=list)

    def add(self, duration_s: npt.ArrayLike, latency_s: npt.ArrayLike, route: Index) -> Index:
        """Add one task for each entry of `route`; return their numbers."""
        tasks = self.count + np.arange(len(route))
        self.duration_s.append(np.broadcast_to(np.asarray(duration_s, dtype=np.float64), route.shape))
        self.latency_s.append(np.broadcast_to(np.asarray(latency_s, dtype=np.float64), route.shape))
        self.route.append(route)
        self.count += len(route)
        return tasks

    def wait(self, before: Index, after: Index, where: npt.NDArray[np.bool_] | None = None) -> None:
        """Let each `after` wait for its `before`, where `where` holds (by default everywhere)."""
        keep = slice(None) if where is None else where
        self.before.append(before[keep])
        self.after.append(after[keep])


def lower(exchange: Exchange, cluster: Cluster, itemsize: int) -> Lowered:
    """Lower an exchange of elements of `itemsize` bytes; rank r runs on device r of the cluster.

    A transfer holds every link of its route for its bytes over the least bandwidth on it, and the greatest
    overhead on it; it arrives the sum of the latencies later. An apply holds its rank's processor while it
    adds. Updates take no time; they keep a rank's parameters from being shared before all of its gradients
    are in.
    """
    ranks = exchange.ranks
    traffic = exchange.traffic(itemsize)
    pairs = traffic.link_src * ranks + traffic.link_dst
    ptr, links = cluster.routes(traffic.link_src, traffic.link_dst)
    path_bandwidth_Bps = _along(np.minimum, cluster.bandwidth_Bps, ptr, links)
    path_overhead_s = _along(np.maximum, cluster.overhead_s, ptr, links)
    path_latency_s = _along(np.add, cluster.latency_s, ptr, links)
    processor_route = len(pairs)  # routes: one for each pair that talks, then one for each rank's processor
    resources = len(cluster.bandwidth_Bps) + ranks

    tasks = _Tasks()
    updates = np.full(ranks, -1)
    transfers, applies, plans = [], [], []
    for schedule in exchange.schedules():
        waits = dependencies(schedule)
        route = np.searchsorted(pairs, schedule.src.astype(np.int64) * ranks + schedule.dst)
        row_bytes = schedule.elements() * itemsize
        holding_s = row_bytes / path_bandwidth_Bps[route] + path_overhead_s[route]
        rows = tasks.add(holding_s, path_latency_s[route], route)
        added_bytes = additions(waits) * schedule.chunk_elements[waits.chunk] * itemsize
        adding_s = added_bytes / cluster.reduce_bandwidth_Bps[waits.dst]
        groups = tasks.add(adding_s, 0.0, processor_route + waits.dst.astype(np.int64))
        tasks.wait(groups[waits.after_group], rows, waits.after_group >= 0)
        tasks.wait(rows, groups[waits.group_of_row])
        tasks.wait(rows, groups[waits.gates_group], waits.gates_group >= 0)
        tasks.wait(groups[waits.previous], groups, waits.previous >= 0)
        tasks.wait(updates[schedule.src], rows, (updates[schedule.src] >= 0) & (waits.after_group < 0))
        transfers.append(rows)
        applies.append(groups)
        plans.append((schedule, waits))
        if schedule is exchange.gradients and exchange.parameters is not None:
            updating = np.flatnonzero(exchange.updates())
            updates[updating] = tasks.add(0.0, 0.0, processor_route + updating)
            tasks.wait(groups, updates[waits.dst], updates[waits.dst] >= 0)

    graph = TaskGraph(
        duration_s=np.concatenate(tasks.duration_s),
        latency_s=np.concatenate(tasks.latency_s),
        route=np.concatenate(tasks.route).astype(np.int32),
        route_ptr=np.concatenate((ptr, ptr[-1] + np.arange(1, ranks + 1))).astype(np.int32),
        route_resources=np.concatenate((links, len(cluster.bandwidth_Bps) + np.arange(ranks))).astype(np.int32),
        resources=resources,
        before=np.concatenate(tasks.before).astype(np.int32),
        after=np.concatenate(tasks.after).astype(np.int32),
        describe=lambda task: _describe(task, transfers, applies, plans),
    )
    waits_of = tuple(waits for _, waits in plans)
    return Lowered(graph=graph, waits=waits_of, transfers=tuple(transfers), applies=tuple(applies))


def _along(combine: np.ufunc, values: npt.NDArray[np.float64], ptr: Ints, links: Ints) -> npt.NDArray[np.float64]:
    """Combine a column of the links along each route; every route has links."""
    return combine.reduceat(values[links], ptr[:-1]) if len(links) else np.zeros(0)


def additions(waits: Dependencies) -> Index:
    """Additions that each group makes: one less than the terms of a reduce, none for a copy; shape (groups,)."""
    return np.where(waits.op == Op.REDUCE, np.diff(waits.member_ptr) + waits.joins_own - 1, 0).astype(np.int64)


def _describe(
    task: int, transfers: list[Index], applies: list[Index], plans: list[tuple[Schedule, Dependencies]]
) -> str:
    """Name a task: which row of which schedule is sent, or what is applied where."""
    for which, (rows, groups, (schedule, waits)) in enumerate(zip(transfers, applies, plans, strict=True)):
        what = "gradients" if which == 0 else "parameters"
        if len(rows) and rows[0] <= task <= rows[-1]:
            return f"{what}: sending {schedule.describe(task - int(rows[0]))}"
        if len(groups) and groups[0] <= task <= groups[-1]:
            group = task - int(groups[0])
            place = f"step {waits.step[group]}, rank {waits.dst[group]}, chunk {waits.chunk[group]}"
            return f"{what}: applying at {place}"
    return f"update task {task}"
