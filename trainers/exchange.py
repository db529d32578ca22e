"""Runs a `Schedule`, any schedule, on real tensors over a transport.

A process hosts one rank (torchrun, Ray) or all of them (tests). Everything happens as soon as it may: a message is
sent when what it reads is applied, an apply is made when its arrivals are there and what it overwrites has been
read. All of that comes from `Schedule.messages` and `distsim.dependencies`: no strategy has a branch here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distsim.dependencies import dependencies
from distsim.schedule import Op, Schedule, Source
from trainers.transport import Landing, Receive, Send, Transport


class ScheduleRunner:
    """Executes one schedule, over and over, for the ranks that this process hosts."""

    def __init__(
        self,
        schedule: Schedule,
        ranks: Collection[int],
        transport: Transport,
        which: int = 0,
        staging: Staging | None = None,
    ) -> None:
        """Sort out this process's part; `which` is the schedule's place in a training step, for the log.

        Runners that never run at once can share their `staging`.
        """
        self.schedule = schedule
        self.transport = transport
        self.which = which
        self.waits = waits = dependencies(schedule)
        self.messages = messages = schedule.messages()
        hosted = np.zeros(schedule.ranks, dtype=bool)
        hosted[list(ranks)] = True
        edges = np.concatenate(([0], np.cumsum(schedule.chunk_elements)))
        self._slices = [slice(first, last) for first, last in pairwise(edges.tolist())]
        first, last = messages.first, messages.last
        begin, end = edges[schedule.chunk[first]], edges[schedule.chunk[last] + 1]
        self._slice_of = [slice(*span) for span in zip(begin.tolist(), end.tolist(), strict=True)]
        self._rows_of = [range(*span) for span in zip(first.tolist(), (last + 1).tolist(), strict=True)]
        self._message_of: list[int] = messages.of_row.tolist()
        self._step_of: list[int] = schedule.step[first].tolist()

        sent = np.flatnonzero(hosted[schedule.src[first]]).tolist()
        self._received: list[int] = np.flatnonzero(hosted[schedule.dst[first]]).tolist()
        self._groups: list[int] = np.flatnonzero(hosted[waits.dst]).tolist()
        self._src, self._dst = schedule.src[first].tolist(), schedule.dst[first].tolist()
        self._reads_input: list[bool] = (schedule.source[first] == Source.INPUT).tolist()
        self._wire(sent)
        self._landing = self._landings()

        reads_input = np.zeros(schedule.ranks, dtype=bool)
        reads_input[schedule.src[schedule.source == Source.INPUT]] = True
        changes = np.zeros(schedule.ranks, dtype=bool)
        changes[waits.dst] = True
        self._keeps_input: list[int] = np.flatnonzero(hosted & reads_input & changes).tolist()
        self._staging = staging or Staging()
        self._sends: dict[int, Send] = {}
        self._bound: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._run: _Run | None = None

    def _wire(self, sent: list[int]) -> None:
        """Count what each send and each apply waits for, and note who waits for it."""
        waits = self.waits
        self._group_of: list[int] = waits.group_of_row.tolist()
        self._sends_after: defaultdict[int, list[int]] = defaultdict(list)  # group -> sends that read what it applies
        self._sends_behind: dict[int, int] = {}  # send -> the next one of its pair: they leave in line
        self._groups_gated: defaultdict[int, list[int]] = defaultdict(
            list
        )  # send -> groups that overwrite what it reads
        self._groups_fed: defaultdict[int, list[int]] = defaultdict(list)  # received message -> groups that apply it
        self._send_needs: dict[int, int] = {}
        self._group_needs = dict.fromkeys(self._groups, 0)
        after, gates = waits.after_group.tolist(), waits.gates_group.tolist()
        in_line: dict[tuple[int, int], int] = {}
        self._starts = sent  # each send waits for the exchange to begin, too
        for message in sent:
            rows = self._rows_of[message]
            before = {after[row] for row in rows} - {-1}
            self._send_needs[message] = 1 + len(before)
            for group in before:
                self._sends_after[group].append(message)
            pair = self._src[message], self._dst[message]
            if pair in in_line:
                self._sends_behind[in_line[pair]] = message
                self._send_needs[message] += 1
            in_line[pair] = message
            for group in {gates[row] for row in rows} - {-1}:
                self._groups_gated[message].append(group)
                self._group_needs[group] += 1
        for message in self._received:
            for group in dict.fromkeys(self._group_of[row] for row in self._rows_of[message]):
                self._groups_fed[message].append(group)
                self._group_needs[group] += 1
        self._group_behind: dict[int, int] = {}  # group -> the next one at its place
        previous = waits.previous.tolist()
        for group in self._groups:
            if previous[group] >= 0:
                self._group_behind[previous[group]] = group
                self._group_needs[group] += 1
        self._steps: dict[int, int] = {}  # step -> how many of this process's messages it has
        for message in (*sent, *self._received):
            self._steps[self._step_of[message]] = self._steps.get(self._step_of[message], 0) + 1
        self._receives = [
            Receive(
                schedule=self.which,
                row=self._rows_of[message][0],
                step=self._step_of[message],
                src=self._src[message],
                dst=self._dst[message],
                message=message,
                size_bytes=0,
                land=self._land,
            )
            for message in self._received
        ]

    def _landings(self) -> dict[int, str]:
        """Which messages could go straight to where they are applied: by a copy, or by an addition to what is there."""
        waits, found = self.waits, {}
        alone = np.diff(waits.member_ptr) == 1
        copies = alone & ~waits.joins_own  # a first value is a copy, too
        adds = alone & waits.joins_own
        for message in self._received:
            groups = self._groups_fed[message]
            if copies[groups].all():
                found[message] = "copy"
            elif adds[groups].all():
                found[message] = "add"
        return found

    @property
    def staging_bytes(self) -> int:
        """Bytes set aside for arrivals, the most that were ever needed at once."""
        return self._staging.total_bytes

    def run(self, values: Mapping[int, Tensor]) -> list[int]:
        """Execute the schedule in place on one flat tensor for each hosted rank, shape (params,).

        On entry a tensor is the rank's contribution, on return its running value. Returns the groups in the
        order in which they were applied.
        """
        self._bind(values)
        for rank in self._keeps_input:
            self._inputs[rank].copy_(values[rank])
        self._run = run = _Run(self, values)
        return run.execute()

    def _bind(self, values: Mapping[int, Tensor]) -> None:
        """Prepare the messages for these tensors, unless they are those of the last run."""
        if self._bound.keys() == values.keys() and all(self._bound[rank] is values[rank] for rank in values):
            return
        self._bound = dict(values)
        self._inputs = {**values, **{rank: torch.empty_like(values[rank]) for rank in self._keeps_input}}
        itemsize = next(iter(values.values())).element_size() if values else 0
        for receive in self._receives:
            part = self._slice_of[receive.message]
            receive.size_bytes = (part.stop - part.start) * itemsize
        self._sends = {
            message: Send(
                schedule=self.which,
                row=self._rows_of[message][0],
                step=self._step_of[message],
                src=self._src[message],
                dst=self._dst[message],
                message=message,
                tensor=(self._inputs if self._reads_input[message] else values)[self._src[message]][
                    self._slice_of[message]
                ],
            )
            for message in self._send_needs
        }

    def _land(self, message: int) -> Landing:
        assert self._run is not None, "nothing arrives before a run"
        return self._run.land(message)


class _Run:
    """The state of one execution."""

    def __init__(self, runner: ScheduleRunner, values: Mapping[int, Tensor]) -> None:
        self.runner = runner
        self.work = values
        self.send_needs = dict(runner._send_needs)
        self.group_needs = dict(runner._group_needs)
        self.staged: dict[int, Tensor] = {}  # received message -> where its data are, unless straight at their place
        self.unread: dict[int, int] = {}  # staged message -> groups that have not yet applied their part of it
        self.applied: list[int] = []
        self.ready: list[Send] = []
        self.held: defaultdict[int, list[Send]] = defaultdict(list)  # in rounds: sends of later steps
        self.steps = dict(sorted(runner._steps.items()))
        self.messages_left = sum(self.steps.values())

    def execute(self) -> list[int]:
        runner, transport = self.runner, self.runner.transport
        transport.expect(runner._receives)
        for message in runner._starts:
            self._one_send_less(message)
        while self.messages_left:
            self._send_ready()
            for ended in transport.finished():
                self.messages_left -= 1
                self.steps[ended.step] -= 1
                if type(ended) is Send:
                    self._one_less(runner._groups_gated.get(ended.message, ()))
                else:
                    self._arrived(ended.message)
        assert len(self.applied) == len(runner._groups), runner.schedule
        return self.applied

    def _send_ready(self) -> None:
        """Hand over all that is ready; in rounds, no more than one step's."""
        if self.runner.transport.rounds:
            while next(iter(self.steps.values()), 1) == 0:
                del self.steps[next(iter(self.steps))]
            self.ready = self.held.pop(next(iter(self.steps)), [])
        while self.ready:
            sends, self.ready = self.ready, []
            self.runner.transport.send(sends)

    def _one_send_less(self, message: int) -> None:
        """One thing less that a send waits for; those behind it in line may leave once it does."""
        needs, behind = self.send_needs, self.runner._sends_behind
        needs[message] -= 1
        while needs[message] == 0:
            send = self.runner._sends[message]
            if self.runner.transport.rounds:
                self.held[send.step].append(send)
            else:
                self.ready.append(send)
            if message not in behind:
                return
            message = behind[message]
            needs[message] -= 1

    def land(self, message: int) -> Landing:
        """Say where a message's data go: straight to their place if nothing else stands against it."""
        runner = self.runner
        how = runner._landing.get(message)
        place = self.work[runner._dst[message]][runner._slice_of[message]]
        straight = how is not None and (how == "copy" or runner.transport.adds)
        if straight and all(self.group_needs[group] == 1 for group in runner._groups_fed[message]):
            return Landing(place, how == "add")
        self.staged[message] = buffer = runner._staging.take(place)
        self.unread[message] = len(runner._rows_of[message])
        return Landing(buffer, False)

    def _arrived(self, message: int) -> None:
        if message in self.staged:
            self._one_less(self.runner._groups_fed[message])
        else:  # they have landed where they belong
            for group in self.runner._groups_fed[message]:
                self._is_applied(group)

    def _one_less(self, groups: Iterable[int]) -> None:
        """One thing less that these applies wait for."""
        for group in groups:
            self.group_needs[group] -= 1
            if self.group_needs[group] == 0:
                self._apply(group)
                self._is_applied(group)

    def _apply(self, group: int) -> None:
        runner, waits = self.runner, self.runner.waits
        rank, chunk = int(waits.dst[group]), int(waits.chunk[group])
        own = self.work[rank][runner._slices[chunk]]
        rows = waits.rows_of(group).tolist()
        terms = [self._part(row) for row in rows]
        if waits.op[group] == Op.COPY:
            own.copy_(terms[0])
        else:
            if waits.joins_own[group]:
                terms.insert(sum(runner._src[runner._message_of[row]] < rank for row in rows), own)
            sum_in_order(own, terms)
        for row in rows:
            self._done_with(runner._message_of[row])

    def _is_applied(self, group: int) -> None:
        """What reads a group's value may be sent, and the next group at its place may follow."""
        needs, behind = self.group_needs, self.runner._group_behind
        while True:
            self.applied.append(group)
            for message in self.runner._sends_after.get(group, ()):
                self._one_send_less(message)
            if group not in behind:
                return
            group = behind[group]
            needs[group] -= 1
            if needs[group]:
                return
            self._apply(group)

    def _part(self, row: int) -> Tensor:
        """Return a row's part of the message that has brought it."""
        runner = self.runner
        message = runner._message_of[row]
        part, begin = runner._slices[int(runner.schedule.chunk[row])], runner._slice_of[message].start
        return self.staged[message][part.start - begin : part.stop - begin]

    def _done_with(self, message: int) -> None:
        """A row has been applied; with a message's last one its staging is free again."""
        self.unread[message] -= 1
        if not self.unread[message]:
            self.runner._staging.give_back(self.staged.pop(message))


def sum_in_order(own: Tensor, terms: list[Tensor]) -> None:
    """Sum terms from the left into `own`, which may be one of them; the others may be overwritten."""
    total = terms[0]
    for term in terms[1:]:
        target = own if term is own or total is own else total
        torch.add(total, term, out=target)
        total = target
    if total is not own:
        own.copy_(total)


class Staging:
    """Buffers for arrivals, used again for later arrivals of the same size and type."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._free: defaultdict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)

    def take(self, like: Tensor) -> Tensor:
        """Return a buffer of the tensor's size and type."""
        free = self._free[like.numel(), like.dtype]
        if free:
            return free.pop()
        self.total_bytes += like.numel() * like.element_size()
        return torch.empty_like(like)

    def give_back(self, buffer: Tensor) -> None:
        """Take back a buffer whose data are no longer needed."""
        self._free[buffer.numel(), buffer.dtype].append(buffer)
