"""Runs a `Schedule`, any schedule, on real tensors over a transport.

A process hosts one rank (torchrun, Ray) or all of them (tests). Messages are posted step by step; before one
reads, the applies that it depends on are made; an apply waits for its arrivals and for the reads of what it
overwrites. All of that comes from `Schedule.messages` and `distsim.dependencies`: no strategy has a branch here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distsim.dependencies import dependencies
from distsim.schedule import Bools, Ints, Op, Schedule, Source
from trainers.transport import Message, Request, Transport


class ScheduleRunner:
    """Executes one schedule, over and over, for the ranks that this process hosts."""

    def __init__(self, schedule: Schedule, ranks: Collection[int], transport: Transport, which: int = 0) -> None:
        """Sort out this process's part: `which` is the schedule's place in its exchange, for the log."""
        self.schedule = schedule
        self.transport = transport
        self.which = which
        self.waits = dependencies(schedule)
        self.messages = schedule.messages()
        hosted = np.zeros(schedule.ranks, dtype=bool)
        hosted[list(ranks)] = True
        edges = np.concatenate(([0], np.cumsum(schedule.chunk_elements)))
        self._slices = [slice(first, last) for first, last in pairwise(edges.tolist())]
        first = self.messages.first
        last = self.messages.last + 1
        self._rows_of = [range(*span) for span in zip(first.tolist(), last.tolist(), strict=True)]
        begin, end = edges[schedule.chunk[first]], edges[schedule.chunk[self.messages.last] + 1]
        self._slice_of = [slice(*span) for span in zip(begin.tolist(), end.tolist(), strict=True)]
        self._message_of: list[int] = self.messages.of_row.tolist()
        self._steps = _by_step(schedule, first, hosted)
        mine = np.flatnonzero(hosted[self.waits.dst])
        self._groups: list[int] = mine[np.argsort(self.waits.step[mine], kind="stable")].tolist()
        self._after_group: list[int] = self.waits.after_group.tolist()
        self._gated_by: defaultdict[int, list[int]] = defaultdict(list)
        for row in np.flatnonzero(hosted[schedule.src] & (self.waits.gates_group >= 0)).tolist():
            self._gated_by[int(self.waits.gates_group[row])].append(self._message_of[row])
        reads_input = np.zeros(schedule.ranks, dtype=bool)
        reads_input[schedule.src[schedule.source == Source.INPUT]] = True
        changes = np.zeros(schedule.ranks, dtype=bool)
        changes[self.waits.dst] = True
        self._keeps_input = np.flatnonzero(hosted & reads_input & changes).tolist()
        self._staging = _Staging()

    @property
    def staging_bytes(self) -> int:
        """Bytes set aside for arrivals, the most that were ever needed at once."""
        return self._staging.total_bytes

    def run(self, values: Mapping[int, Tensor]) -> list[int]:
        """Execute the schedule in place on one flat tensor for each hosted rank, shape (params,).

        On entry a tensor is the rank's contribution, on return its running value. Returns the groups in the
        order in which they were applied.
        """
        return _Run(self, values).execute()


@dataclass(slots=True)
class _Arrival:
    """A message on its way in, and what it carries once it is there."""

    request: Request
    staged: Tensor
    rows_left: int
    """Rows of it that are not applied yet."""
    there: bool = False


class _Run:
    """The state of one execution."""

    def __init__(self, runner: ScheduleRunner, values: Mapping[int, Tensor]) -> None:
        self.runner = runner
        self.waits = runner.waits
        self.work = values
        self.inputs = {**values, **{rank: values[rank].clone() for rank in runner._keeps_input}}
        self.sending: dict[int, Request] = {}
        self.arriving: dict[int, _Arrival] = {}
        self.applied: dict[int, None] = {}

    def execute(self) -> list[int]:
        runner = self.runner
        for outgoing, incoming in runner._steps:
            for message in outgoing:
                for row in runner._rows_of[message]:
                    self.apply(runner._after_group[row])
            sends = [self._message(message, self._read(message)) for message in outgoing]
            receives = [self._message(message, runner._staging.take(self._landing(message))) for message in incoming]
            sending, arriving = runner.transport.post(runner.which, sends, receives)
            self.sending.update(zip(outgoing, sending, strict=True))
            for message, posted, request in zip(incoming, receives, arriving, strict=True):
                self.arriving[message] = _Arrival(request, posted.tensor, len(runner._rows_of[message]))
        for group in runner._groups:
            self.apply(group)
        for request in self.sending.values():
            request.wait()
        assert len(self.applied) == len(runner._groups) and not self.arriving, runner.schedule
        return list(self.applied)

    def apply(self, group: int) -> None:
        """Apply a group, and before it what was to be applied at the same place earlier."""
        chain = []
        while group >= 0 and group not in self.applied:
            chain.append(group)
            group = int(self.waits.previous[group])
        for ready in reversed(chain):
            self._apply_one(ready)

    def _apply_one(self, group: int) -> None:
        runner, waits = self.runner, self.waits
        rank, chunk = int(waits.dst[group]), int(waits.chunk[group])
        own = self.work[rank][runner._slices[chunk]]
        rows = waits.rows_of(group).tolist()
        arrivals = [self._arrive(row) for row in rows]
        for message in runner._gated_by[group]:
            if message in self.sending:
                self.sending.pop(message).wait()
        if waits.op[group] == Op.COPY:
            own.copy_(arrivals[0])
        else:
            _sum_in_order(own, self._terms(group, rows, arrivals, own))
        for row in rows:
            self._done_with(runner._message_of[row])
        self.applied[group] = None

    def _terms(self, group: int, rows: list[int], arrivals: list[Tensor], own: Tensor) -> list[Tensor]:
        """The summands in ascending rank, the receiver's own among them if it has a value yet."""
        rank = int(self.waits.dst[group])
        senders = self.runner.schedule.src[rows].tolist()
        terms = list(arrivals)
        if self.waits.joins_own[group]:
            terms.insert(sum(sender < rank for sender in senders), own)
        return terms

    def _arrive(self, row: int) -> Tensor:
        """Wait for the message that carries a row, unless it is there already; return the row's part of it."""
        runner = self.runner
        message = runner._message_of[row]
        arrival = self.arriving[message]
        if not arrival.there:
            arrival.request.wait()
            arrival.there = True
            runner.transport.log.received_s[runner.which, runner._rows_of[message][0]] = time.monotonic()
        part, begin = runner._slices[int(runner.schedule.chunk[row])], runner._slice_of[message].start
        return arrival.staged[part.start - begin : part.stop - begin]

    def _done_with(self, message: int) -> None:
        """A row has been applied; with a message's last one its staging is free again."""
        arrival = self.arriving[message]
        arrival.rows_left -= 1
        if not arrival.rows_left:
            self.runner._staging.give_back(self.arriving.pop(message).staged)

    def _message(self, message: int, tensor: Tensor) -> Message:
        schedule, row = self.runner.schedule, self.runner._rows_of[message][0]
        return Message(row, int(schedule.src[row]), int(schedule.dst[row]), tensor)

    def _read(self, message: int) -> Tensor:
        schedule, row = self.runner.schedule, self.runner._rows_of[message][0]
        values = self.inputs if schedule.source[row] == Source.INPUT else self.work
        return values[int(schedule.src[row])][self.runner._slice_of[message]]

    def _landing(self, message: int) -> Tensor:
        """Where a message's data will go: what its staging buffer must be like."""
        schedule, row = self.runner.schedule, self.runner._rows_of[message][0]
        return self.work[int(schedule.dst[row])][self.runner._slice_of[message]]


def _sum_in_order(own: Tensor, terms: list[Tensor]) -> None:
    """Sum terms from the left into `own`, which may be one of them; arrivals may be overwritten."""
    total = terms[0]
    for term in terms[1:]:
        target = own if term is own or total is own else total
        torch.add(total, term, out=target)
        total = target
    if total is not own:
        own.copy_(total)


def _by_step(schedule: Schedule, first: Ints, hosted: Bools) -> list[tuple[list[int], list[int]]]:
    """For each step in which a hosted rank takes part: the messages that it sends and those that it receives."""
    sent, received = hosted[schedule.src[first]], hosted[schedule.dst[first]]
    chosen = np.flatnonzero(sent | received)
    steps, start = np.unique(schedule.step[first[chosen]], return_index=True)
    parts = np.split(chosen, start[1:]) if len(steps) else []
    return [(part[sent[part]].tolist(), part[received[part]].tolist()) for part in parts]


class _Staging:
    """Buffers for arrivals, used again for later arrivals of the same size."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, like: Tensor) -> Tensor:
        free = self._free[like.numel()]
        if free:
            return free.pop()
        self.total_bytes += like.numel() * like.element_size()
        return torch.empty_like(like)

    def give_back(self, buffer: Tensor) -> None:
        self._free[buffer.numel()].append(buffer)
