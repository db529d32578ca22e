"""Lowering: an exchange on a cluster becomes a `TaskGraph` of transfers, applies and updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from distsim.cluster import Cluster
from distsim.dependencies import Dependencies, dependencies
from distsim.messages import Messages
from distsim.network import Network, Sharing, network
from distsim.places import numbers, places
from distsim.schedule import Exchange, Ints, Op, Schedule
from distsim.taskgraph import Edges, Floats, TaskGraph

Index = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)
Posting = Literal["eager", "rounds"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """One schedule of an exchange, and where its messages and applies are among the tasks."""

    schedule: Schedule
    waits: Dependencies
    messages: Messages
    sends: slice
    """The task of each message."""
    groups: Ints
    """The task that ends the apply of each group of `waits`: its own, or the message that it applies as it arrives."""
    posts: slice | None = None
    """The task of each message's handing over, where that takes time."""

    def chunks(self, message: int) -> str:
        """Say which chunks a message carries: `"chunk 2"`, `"chunks 2-5"`."""
        first, last = (int(self.schedule.chunk[rows[message]]) for rows in (self.messages.first, self.messages.last))
        return f"chunk {first}" if first == last else f"chunks {first}-{last}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lowered:
    """A task graph, and where the parts of the exchange are in it."""

    graph: TaskGraph
    network: Network
    parts: tuple[Part, ...]


@dataclass(slots=True)
class _Tasks:
    """Tasks as they get their numbers: first those with a route, then joins."""

    count: int = 0
    amount: list[Floats] = field(default_factory=list)
    route: list[npt.NDArray[np.integer]] = field(default_factory=list)
    edges: list[Edges] = field(default_factory=list)
    names: list[tuple[int, Callable[[int], str]]] = field(default_factory=list)

    def add(self, amount: Floats, route: npt.NDArray[np.integer], name: Callable[[int], str]) -> slice:
        self.amount.append(amount)
        self.route.append(route)
        return self.join(len(amount), name)

    def join(self, count: int, name: Callable[[int], str]) -> slice:
        self.names.append((self.count, name))
        self.count += count
        return slice(self.count - count, self.count)

    def describe(self, task: int) -> str:
        first, name = [named for named in self.names if named[0] <= task][-1]
        return name(task - first)


def lower(
    exchange: Exchange,
    cluster: Cluster,
    itemsize: int,
    *,
    sharing: Sharing | None = None,
    posting: Posting = "eager",
    plans: Sequence[Dependencies] | None = None,
) -> Lowered:
    """Lower an exchange of elements of `itemsize` bytes; rank r runs on device r of the cluster.

    A message moves its bytes over the links of its route, which it shares fairly or takes in order (`sharing`, by
    default the cluster's), and arrives the sum of their latencies later. Those of an ordered pair of ranks leave one
    after another, in row order, as on a connection. Before it, its sender's host spends
    an overhead on it; after it, the receiver's processor adds. Hosts and processors do one thing after another.
    Updates take no time; they keep a rank's parameters from being shared before all of its gradients are in.

    `posting` says when a rank hands its transfers over: `eager`, as soon as what they depend on is there;
    `rounds`, those of a step only when sender and receiver are over with all that they sent and received in earlier
    steps, as where every step is one group of calls on a stream. `plans` are the schedules' dependencies, where they
    are known already.
    """
    net = network(exchange.schedules(), cluster, sharing)
    if plans is None:
        plans = [dependencies(schedule) for schedule in exchange.schedules()]
    return assemble(exchange, net, plans, itemsize, posting)


def assemble(
    exchange: Exchange, net: Network, plans: Sequence[Dependencies], itemsize: int, posting: Posting
) -> Lowered:
    """Make the tasks of an exchange on a network, and what they wait for; the rest is as for `lower`."""
    schedules, cluster = exchange.schedules(), net.cluster
    sent = [schedule.messages() for schedule in schedules]
    tasks = _Tasks()
    sends, posts, groups = [], [], []
    for which, (schedule, each) in enumerate(zip(schedules, sent, strict=True)):
        amount = (each.totals(schedule.elements()) * itemsize).astype(np.float64)
        name = _names(which, "sending", _message_of(schedule, each))
        sends.append(
            tasks.add(amount, net.route_of_rows[which] if each.single else net.route_of_rows[which][each.first], name)
        )
    if (cluster.host_overhead_s[: exchange.ranks] > 0).any():
        for which, (schedule, each) in enumerate(zip(schedules, sent, strict=True)):
            src = schedule.src[each.first]
            name = _names(which, "posting", _message_of(schedule, each))
            posts.append(tasks.add(cluster.host_overhead_s[src], net.host_route + src, name))
    adds = bool(np.isfinite(cluster.reduce_bandwidth_Bps[: exchange.ranks]).any())
    for which, (schedule, waits) in enumerate(zip(schedules, plans, strict=True)):
        if adds:
            amount = (additions(waits) * schedule.chunk_elements[waits.chunk] * itemsize).astype(np.float64)
            name = _names(which, "applying at", _place_of(waits))
            made = tasks.add(amount, net.processor_route + waits.dst, name)
            groups.append(np.arange(made.start, made.stop, dtype=np.int32))
    timed = tasks.count
    if not adds:
        groups = [
            _joins(tasks, which, waits, sends[which].start + each.of_row)
            for which, (waits, each) in enumerate(zip(plans, sent, strict=True))
        ]

    updates, over = (np.full(exchange.ranks, -1, np.int32) for _ in range(2))
    for which, (schedule, waits) in enumerate(zip(schedules, plans, strict=True)):
        message, applied = sent[which].of_row, groups[which]
        sending = sends[which].start
        starting = posts[which].start if posts else sending
        arrives = applied if waits.groups == schedule.rows else applied[waits.group_of_row]
        tasks.edges += [
            Edges(_task_of(applied, waits.after_group), message, 0, starting),
            Edges(message, np.where(arrives == sending + message, -1, arrives), sending, 0),
            Edges(message, _task_of(applied, waits.gates_group), sending, 0),
            Edges(_task_of(applied, _not_implied(waits)), applied, 0, 0),
        ]
        if posts:
            number = numbers(sent[which].count)
            tasks.edges.append(Edges(number, number, starting, sending))
        if (updates >= 0).any():
            first = np.where(waits.after_group < 0, updates[schedule.src], -1)
            tasks.edges.append(Edges(first, message, 0, starting))
        if posting == "rounds":
            over = _rounds(tasks, schedule, waits, message, sending, starting, over)
        if schedule is exchange.gradients and exchange.parameters is not None:
            updating = np.flatnonzero(exchange.updates())
            made = tasks.join(len(updating), _names(which, "updating rank", updating.__getitem__))
            updates[updating] = np.arange(made.start, made.stop)
            tasks.edges.append(Edges(applied, updates[waits.dst]))
    graph = TaskGraph.of(
        amount=_joined(tasks.amount),
        route=_joined(tasks.route).astype(np.int32, copy=False),
        resources=net.resources,
        routes=net.routes,
        edges=tasks.edges,
        joins=tasks.count - timed,
        lines=_joined(tasks.route[: len(sends)]),  # messages of one rank to another leave in row order
        describe=tasks.describe,
    )
    handed: list[slice | None] = [*posts] if posts else [None] * len(plans)
    columns = zip(schedules, plans, sent, sends, groups, handed, strict=True)
    parts = [
        Part(schedule=schedule, waits=waits, messages=each, sends=send, groups=group, posts=post)
        for schedule, waits, each, send, group, post in columns
    ]
    return Lowered(graph=graph, network=net, parts=tuple(parts))


def _joins(tasks: _Tasks, which: int, waits: Dependencies, task_of_row: Ints) -> Ints:
    """Give each apply that takes no time a join, unless it waits for one message alone; return the task of each."""
    alone = (np.diff(waits.member_ptr) == 1) & (waits.previous < 0)
    alone[waits.gates_group[waits.gates_group >= 0]] = False
    applied = np.empty(waits.groups, np.int32)
    applied[alone] = task_of_row[waits.members[waits.member_ptr[:-1][alone]]]
    place = _place_of(waits)
    name = _names(which, "applying at", lambda join: place(int(np.flatnonzero(~alone)[join])))
    made = tasks.join(waits.groups - int(alone.sum()), name)
    applied[~alone] = np.arange(made.start, made.stop)
    return applied


def _task_of(applied: Ints, group: Ints) -> Ints:
    """Return the task of each group, -1 for none."""
    return np.append(applied, np.int32(-1))[group]


def _not_implied(waits: Dependencies) -> Ints:
    """Return `previous` without those that follow from a read in between, after the one apply and before the next."""
    gated = waits.gates_group
    between = gated[(gated >= 0) & (waits.after_group >= 0) & (waits.previous[gated] == waits.after_group)]
    previous = waits.previous.copy()
    previous[between] = -1
    return previous


def _rounds(
    tasks: _Tasks, schedule: Schedule, waits: Dependencies, message: Ints, sending: int, starting: int, over: Ints
) -> Ints:
    """Let a rank's messages of a step wait for all that it sends and receives in its step before.

    `over` is, per rank, the task that ends its last step in an earlier schedule, -1 for none; returns those of this.
    """
    lands = waits.dst[waits.group_of_row]
    # Steps first: what happens at about the same time then lies close together in memory.
    (sends, receives), count = places(schedule.ranks, (schedule.step, schedule.src), (schedule.step, lands))
    owner = np.full(count, -1, np.int32)
    owner[sends], owner[receives] = schedule.src, lands
    number = np.cumsum(owner >= 0, dtype=np.int32) - np.int32(1)
    owner = owner[owner >= 0]
    ends = tasks.join(len(owner), lambda end: f"a step of rank {owner[end]}").start
    in_turn = np.argsort(owner, kind="stable").astype(np.int32)
    first = np.diff(owner[in_turn], prepend=-1) != 0
    before = np.empty(len(owner), np.int32)
    before[in_turn[1:]] = ends + in_turn[:-1]
    before[in_turn[first]] = over[owner[in_turn[first]]]
    for side in (number[sends], number[receives]):
        tasks.edges += [Edges(message, side, sending, ends), Edges(before[side], message, 0, starting)]
    last = over.copy()
    last[owner] = np.arange(ends, ends + len(owner))  # of one rank's steps the last is entered last
    return last


def additions(waits: Dependencies) -> Index:
    """Additions that each group makes: one less than the terms of a reduce, none for a copy; shape (groups,)."""
    return np.where(waits.op == Op.REDUCE, np.diff(waits.member_ptr) + waits.joins_own - 1, 0).astype(np.int64)


def _joined(columns: list[npt.NDArray[Number]]) -> npt.NDArray[Number]:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _names(which: int, doing: str, name: Callable[[int], object]) -> Callable[[int], str]:
    what = ("gradients", "parameters")[which]
    return lambda task: f"{what}: {doing} {name(task)}"


def _place_of(waits: Dependencies) -> Callable[[int], str]:
    return lambda group: f"step {waits.step[group]}, rank {waits.dst[group]}, chunk {waits.chunk[group]}"


def _message_of(schedule: Schedule, each: Messages) -> Callable[[int], str]:
    return lambda message: schedule.describe(int(each.first[message]))
