"""Where the time of an exchange goes: the critical path, second by second and in words, and the busiest resources.

The last task to finish started when the last of those that it waited for had finished, and so on back to the
start: this chain of tasks is the critical path, and there are no gaps in it. Each second of a task on it has a
cause: latency, the slowest link of its route at full speed and alone, that link's overhead for a message, or
waiting, which is all that is left: others share the link meanwhile, or had their turn first. Additions and what
hosts spend on sending are causes of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from distsim.chain import path
from distsim.engine import Timeline
from distsim.step import Simulation
from distsim.taskgraph import Floats, Index, TaskGraph
from distsim.units import format_time

Cause = Literal["transfer", "sharing", "queueing", "latency", "overhead", "adding", "posting"]
"""`sharing` is waiting for a resource that is shared fairly, `queueing` for one that is taken in order."""
ROUNDING = 1e-11
"""Waits shorter than this fraction of the time that has passed are rounding, not waiting: see `loop.SAME`."""
NIC = re.compile(r"(?:rail\d+\.)?node(?P<node>\d+)\.nic(?P<nic>\d+)\.(?P<side>out|in)")
"""What `topologies.graph.nodes` calls the two sides of a NIC."""
ALIKE = 1e-3
"""Resources whose work differs by less than this fraction are as busy as one another."""
KINDS = (("processor of", "processors"), ("host of", "hosts"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What one cause at one resource takes of the critical path."""

    cause: Cause
    resource: str
    """A link of the cluster, or a rank's processor or host."""
    ranks: tuple[int, ...]
    """Who sends, adds or posts there on the critical path."""
    seconds: float
    share: float
    """Of the time of the exchange."""
    tasks: int
    """How many messages, additions or posts of the critical path."""
    crowd: float
    """Sharing: how many tasks share the resource meanwhile, on average; queueing: how many go first; else 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """How busy one resource is."""

    resource: str
    alike: int
    """How many others have as much to do, to a thousandth."""
    busy_s: float
    """How long it needs for its work at its full speed, with overheads."""
    utilization: float
    """That over the time of the exchange."""
    occupied: float
    """Share of the time in which at least one task has hold of it, at whatever speed."""


@dataclass(slots=True)
class _Sum:
    """A segment while it grows."""

    seconds: list[float] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)
    crowd: float = 0.0


def critical_path(simulation: Simulation) -> list[Segment]:
    """Return what the critical path is made of, merged by cause and resource, the longest first.

    The seconds of all segments together are the time of the exchange.
    """
    sums = _sums(simulation)
    total = simulation.time_s
    order = sorted(sums, key=lambda key: (-sum(sums[key].seconds), key))
    return [
        Segment(
            cause=cause,
            resource=_resource(simulation, resource),
            ranks=tuple(sorted(each.ranks)),
            seconds=sum(each.seconds),
            share=sum(each.seconds) / total,
            tasks=len(each.seconds),
            crowd=each.crowd / sum(each.seconds),
        )
        for cause, resource in order
        for each in (sums[cause, resource],)
    ]


def words(segments: Sequence[Segment]) -> list[str]:
    """Say what the critical path is made of: a line for each cause, with its share, its time, and where it is."""
    causes: dict[Cause, list[Segment]] = {}
    for segment in segments:
        causes.setdefault(segment.cause, []).append(segment)
    lines = []
    for cause, of in sorted(causes.items(), key=lambda item: -sum(segment.seconds for segment in item[1])):
        seconds, share = sum(segment.seconds for segment in of), sum(segment.share for segment in of)
        lines.append(f"{100 * share:5.1f} %  {format_time(seconds):>9}  {_say(cause, of)}")
    return lines


def busiest(simulation: Simulation, count: int = 3) -> list[Usage]:
    """Return the resources (links, processors, hosts) that have most to do for their speed, the busiest first.

    Those that are as busy as one another count as one, named after the first of them.
    """
    graph, net = simulation.lowered.graph, simulation.lowered.network
    links, total = len(simulation.cluster.bandwidth_Bps), simulation.time_s
    busy_s = np.zeros(len(graph.resources))
    busy_s[:links] = simulation.link_load_s
    own = np.flatnonzero(graph.route >= net.processor_route)  # of processors and hosts, one resource each
    where = graph.routes.resources[graph.routes.ptr[graph.route[own]]]
    np.add.at(busy_s, where, graph.amount[own] / graph.resources.capacity[where])
    order = np.argsort(-busy_s, kind="stable")[: int((busy_s > 0).sum())]
    found: list[Usage] = []
    while len(order) and len(found) < count:
        same = int((busy_s[order] >= busy_s[order[0]] * (1 - ALIKE)).sum())
        first = int(order[:same].min())
        occupied_s = _union_s(*held(graph, simulation.timeline, _users(graph, [first])[first], first))
        found.append(
            Usage(
                resource=_resource(simulation, first),
                alike=int(np.where(order[:same] < links, 1, simulation.copies).sum()) - 1,
                busy_s=float(busy_s[first]),
                utilization=float(busy_s[first]) / total,
                occupied=occupied_s / total,
            )
        )
        order = order[same:]
    return found


def explain(simulation: Simulation) -> str:
    """Return the lines that `distsim exchange` prints: where the time went, and the busiest resources."""
    if not (lines := words(critical_path(simulation))):
        return "where the time went: nothing takes time"
    usages = busiest(simulation)
    names = [usage.resource + (f" and {usage.alike} more" if usage.alike else "") for usage in usages]
    wide = max(map(len, names))
    used = [
        f"{100 * usage.utilization:5.1f} %  {name:<{wide}}  in use {100 * usage.occupied:.1f} % of the time"
        for usage, name in zip(usages, names, strict=True)
    ]
    return "\n".join(("where the time went, along the critical path", *lines, "", "busiest resources", *used))


def as_values(simulation: Simulation) -> dict[str, list[dict[str, Any]]]:
    """Return what `explain` says as plain values, in SI units: `critical_path` and `busiest`."""
    return {
        "critical_path": [asdict(segment) for segment in critical_path(simulation)],
        "busiest": [asdict(usage) for usage in busiest(simulation)],
    }


def _sums(simulation: Simulation) -> dict[tuple[Cause, int], _Sum]:
    """Sum up the critical path by cause and resource."""
    graph, net = simulation.lowered.graph, simulation.lowered.network
    start_s, finish_s = simulation.timeline.start_s, simulation.timeline.finish_s
    cluster, links = simulation.cluster, len(simulation.cluster.bandwidth_Bps)
    capacity = np.concatenate((cluster.bandwidth_Bps, graph.resources.capacity[links:]))
    overhead_s = np.concatenate((cluster.overhead_s, graph.resources.overhead_s[links:]))
    # By symmetry a transfer may stand for several on one link, and the graph's link is so much slower (symmetry.py).
    copies = np.concatenate((cluster.bandwidth_Bps / graph.resources.capacity[:links], np.ones(len(capacity) - links)))
    sums: dict[tuple[Cause, int], _Sum] = {}
    senders = _senders(simulation)
    waited: list[tuple[int, float, float]] = []
    ready = 0.0

    def add(cause: Cause, resource: int, seconds: float, task: int) -> _Sum:
        entry = sums.setdefault((cause, resource), _Sum())
        entry.seconds.append(seconds)
        entry.ranks.add(senders(task))
        return entry

    @cache  # a long chain goes over few routes
    def alone(route: int, amount: float) -> tuple[float, float, int, list[tuple[int, float]]]:
        """How long without others and latency, how late, the slowest resource, and the links that make it late."""
        held_by = graph.routes.resources[graph.routes.ptr[route] : graph.routes.ptr[route + 1]]
        needs_s = amount / capacity[held_by] + overhead_s[held_by]
        late = (
            [] if route >= net.processor_route else [link for link in held_by.tolist() if cluster.latency_s[link] > 0]
        )
        late_s = float(graph.routes.latency_s[route])
        slowest = int(held_by[np.argmax(needs_s)])
        return float(needs_s.max()), late_s, slowest, [(link, float(cluster.latency_s[link])) for link in late]

    chain = path(graph, simulation.timeline)
    ends, starts = finish_s[chain].tolist(), start_s[chain[1:]].tolist()
    for task, end, next_start in zip(chain, ends, (*starts, math.inf), strict=bool(chain)):
        began, ready = ready, end
        if task >= len(graph.amount) or ready == began:
            continue
        route = int(graph.route[task])
        needs_s, late_s, slowest, late = alone(route, float(graph.amount[task]))
        if next_start < ready:  # the next one was in line, and did not wait for this one to arrive
            ready, late_s, late = max(began, ready - late_s), 0.0, []
        extra_s = float(overhead_s[slowest])
        wait_s = ready - began - late_s - needs_s
        wait_s = 0.0 if wait_s <= 1e-9 * (ready - began) + ROUNDING * ready else wait_s
        if wait_s:
            waited.append((task, began, wait_s))
        kind: Cause = "transfer"
        if route >= net.processor_route:
            kind = "posting" if route >= net.host_route else "adding"
        for link, seconds in late:
            add("latency", link, seconds, task)
        if extra_s > 0:
            add("overhead", slowest, extra_s, task)
        if (moving_s := ready - began - late_s - extra_s - wait_s) != 0.0:
            add(kind, slowest, moving_s, task)

    where = np.unique([each for task, _, _ in waited for each in _route(graph, task).tolist()]).astype(np.int64)
    users = _users(graph, where.tolist())
    for task, began, wait_s in waited:
        fair = bool(graph.resources.fair[_route(graph, task)[0]])
        end = float(finish_s[task]) - float(graph.routes.latency_s[graph.route[task]]) if fair else float(start_s[task])
        resource, crowd = _blamed(graph, simulation.timeline, users, task, (began, end))
        add("sharing" if fair else "queueing", resource, wait_s, task).crowd += crowd * wait_s * float(copies[resource])
    return sums


def _blamed(
    graph: TaskGraph, timeline: Timeline, users: dict[int, Index], task: int, window: tuple[float, float]
) -> tuple[int, float]:
    """Return the resource that a task waits for during a window, and the crowd there.

    Fair: the fullest one of its route, and how many tasks share it on average, itself included. In order: the
    last one that is free, and how many tasks hold it while it waits. The first of the route among equals.
    """
    low, high = window
    worst, found = -1.0, (-1, 0.0)
    for resource in _route(graph, task).tolist():
        others = users[resource]
        begin, end = held(graph, timeline, others, resource)
        overlap_s = np.minimum(end, high) - np.maximum(begin, low)
        during = overlap_s > 0
        if graph.resources.fair[resource]:
            busy_s = graph.amount[others] / graph.resources.capacity[resource] + graph.resources.overhead_s[resource]
            took_s = end[during] - begin[during]
            bad = float((busy_s[during] * overlap_s[during] / took_s).sum()) / (high - low)
            crowd = float(overlap_s[during].sum()) / (high - low)
        else:
            before = end[(begin < high) & (others != task)]
            bad, crowd = float(before.max(initial=0.0)), float((during & (others != task)).sum())
        if bad > worst * (1 + 1e-9):
            worst, found = bad, (resource, crowd)
    return found


def held(graph: TaskGraph, timeline: Timeline, tasks: Index, resource: int) -> tuple[Floats, Floats]:
    """Return from when until when each of these tasks has hold of a resource on its route, in seconds."""
    start_s = timeline.start_s[tasks]
    if graph.resources.fair[resource]:
        return start_s, timeline.finish_s[tasks] - graph.routes.latency_s[graph.route[tasks]]
    busy_s = graph.amount[tasks] / graph.resources.capacity[resource] + graph.resources.overhead_s[resource]
    return start_s, start_s + busy_s


def _users(graph: TaskGraph, resources: Sequence[int]) -> dict[int, Index]:
    """Return the tasks that hold each of some resources, in order of their numbers."""
    wanted = np.zeros(len(graph.resources), np.bool_)
    wanted[list(resources)] = True
    entries = np.flatnonzero(wanted[graph.routes.resources])
    routes = np.searchsorted(graph.routes.ptr, entries, side="right") - 1
    of_entry = graph.routes.resources[entries]
    passes = np.zeros(len(graph.routes.latency_s), np.bool_)
    passes[routes] = True
    tasks = np.flatnonzero(passes[graph.route])
    tasks = tasks[np.argsort(graph.route[tasks], kind="stable")]
    bounds = np.searchsorted(graph.route[tasks], np.stack((routes, routes + 1)))
    order = np.argsort(of_entry, kind="stable")
    ends = np.searchsorted(of_entry[order], np.stack((np.asarray(resources), np.asarray(resources) + 1)))
    found = {}
    for resource, low, high in zip(resources, *ends.tolist(), strict=True):
        parts = [tasks[slice(*bounds[:, entry])] for entry in order[low:high].tolist()]
        found[resource] = np.sort(np.concatenate(parts))
    return found


def _senders(simulation: Simulation) -> Any:
    """Return a function that says whose task this is: the sender of a message, or who adds or posts."""
    graph, net = simulation.lowered.graph, simulation.lowered.network

    def rank(task: int) -> int:
        route = int(graph.route[task])
        if route >= net.processor_route:
            return (route - net.processor_route) % simulation.exchange.ranks
        part = next(part for part in simulation.lowered.parts if task < part.sends.stop)
        return int(part.schedule.src[part.messages.first[task - part.sends.start]])

    return rank


def _route(graph: TaskGraph, task: int) -> npt.NDArray[np.int32]:
    route = graph.route[task]
    return graph.routes.resources[graph.routes.ptr[route] : graph.routes.ptr[route + 1]]


def _union_s(begin: Floats, end: Floats) -> float:
    """Return how long at least one of these intervals lasts."""
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    so_far = np.concatenate(([0.0], np.maximum.accumulate(end)[:-1]))
    return float(np.maximum(end - np.maximum(begin, so_far), 0.0).sum())


def _resource(simulation: Simulation, resource: int) -> str:
    cluster = simulation.cluster
    links = len(cluster.bandwidth_Bps)
    return cluster.link_name(resource) if resource < links else simulation.lowered.graph.resources.describe(resource)


def _say(cause: Cause, segments: Sequence[Segment]) -> str:
    """Say what a cause is and where, its segments being the longest first."""
    where, many = _where(segments), sum(segment.tasks for segment in segments)
    if cause in ("sharing", "queueing"):
        crowd = sum(segment.crowd * segment.share for segment in segments) / sum(segment.share for segment in segments)
        how = f"shared by {crowd:.3g} messages at a time" if cause == "sharing" else f"where {crowd:.3g} go first"
        return f"waits for {where}, {how}"
    return {
        "transfer": f"moves {_counted(many, 'message')} at full speed over {where}",
        "latency": f"latency of {_counted(many, 'hop')} over {where}",
        "overhead": f"overhead of {_counted(many, 'message')} on {where}",
        "adding": f"adds {_counted(many, 'time')} on {where}",
        "posting": f"hands over {_counted(many, 'message')} on {where}",
    }[cause]


def _counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count:,} {what}s in a row"


def _where(segments: Sequence[Segment]) -> str:
    """Name the resource that takes the most, and how many others there are."""
    first, others = segments[0], len(segments) - 1
    name = _known_as(first.resource)
    if not others:
        return name
    alike = first.seconds <= segments[-1].seconds * 1.01
    return f"{others + 1} {_kind(first.resource)}, " + (f"such as {name}" if alike else f"most on {name}")


def _kind(resource: str) -> str:
    return next((plural for word, plural in KINDS if resource.startswith(word)), "links")


def _known_as(resource: str) -> str:
    """Say first what a link of a cluster file's `nodes` topology is: it leaves, or enters, a NIC."""
    leaves, enters = (NIC.fullmatch(end) for end in (resource.partition(" -> ")[0], resource.partition(" -> ")[2]))
    port = leaves if leaves and leaves["side"] == "out" else enters if enters and enters["side"] == "in" else None
    return f"NIC {port['nic']} of node {port['node']} ({resource})" if port else resource
