"""Transports move messages between ranks and count them where they are sent.

An executor says what it expects, sends what is ready, and asks what has ended, over and over. When and where the
data move is the transport's business: torch.distributed here, sockets in tcp.py, Ray's object store in
ray_transport.py, one process's memory in LocalTransport.
"""

from __future__ import annotations

import heapq
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distsim.errors import DistsimError

AHEAD = 2
"""Steps for which gloo's receives are posted before their data are needed: it has no buffers of its own."""


class Landing(NamedTuple):
    """Where a message's data go."""

    tensor: Tensor
    adds: bool
    """Whether they are added to what is there; only for a transport that can."""


@dataclass(slots=True, eq=False)
class Send:
    """A message to another rank: a contiguous tensor of one dimension."""

    schedule: int
    row: int
    """Which message of a training step it is: its schedule's place in the step, and its first row there."""
    step: int
    src: int
    dst: int
    message: int
    """Its number in the schedule."""
    tensor: Tensor
    buffer: memoryview | None = None
    """The tensor's bytes, for a transport that wants them; kept, since finding them takes longer than a small send."""

    def size_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(slots=True, eq=False)
class Receive:
    """A message from another rank, of which only the place is not yet fixed."""

    schedule: int
    row: int
    step: int
    src: int
    dst: int
    message: int
    size_bytes: int
    land: Callable[[int], Landing]
    """Where message number `message` is to go; asked once, as late as the transport can."""


@dataclass(slots=True)
class MessageLog:
    """What was sent: totals over the whole run, and each message of the training step under way."""

    counts: Counter[tuple[int, int, int, int]] = field(default_factory=Counter)
    """Messages sent by (schedule, src, dst, bytes)."""
    bytes_of: dict[tuple[int, int], int] = field(default_factory=dict)
    sent_s: dict[tuple[int, int], float] = field(default_factory=dict)
    received_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """By (schedule, row), on this machine's monotonic clock, in seconds."""

    def restart(self) -> None:
        """Forget the single messages (not the totals): a new step begins."""
        self.bytes_of.clear()
        self.sent_s.clear()
        self.received_s.clear()


class Transport(ABC):
    """Sends and receives tensors; messages of an ordered pair of ranks arrive in the order they are sent.

    One exchange at a time: `expect` names all its receives, then `send` and `finished` alternate until all that
    was sent and expected has ended.
    """

    adds = False
    """Whether it can add what arrives to what is there (`Landing.adds`)."""
    rounds = False
    """Whether a step's messages must be handed over together, once those of the step before have ended."""

    def __init__(self) -> None:
        self.log = MessageLog()

    @abstractmethod
    def expect(self, receives: Sequence[Receive]) -> None:
        """Take note of an exchange's receives, those of each ordered pair in their order."""

    def send(self, sends: Sequence[Send]) -> None:
        """Start to send, and count; a sent tensor must stay as it is until `finished` returns its message."""
        log, now = self.log, time.monotonic()  # before: a receiver may have it all when the sender's call returns
        for message in sends:
            size = message.size_bytes()
            log.counts[message.schedule, message.src, message.dst, size] += 1
            log.bytes_of[message.schedule, message.row] = size
            log.sent_s[message.schedule, message.row] = now
        self._send(sends)

    def finished(self) -> Sequence[Send | Receive]:
        """Wait until some message has ended; return all that have: a received one is where it should be."""
        ended = self._finished()
        now = time.monotonic()
        for message in ended:
            if type(message) is Receive:
                self.log.received_s[message.schedule, message.row] = now
        return ended

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Give back what the transport holds."""
        return None

    @abstractmethod
    def _send(self, sends: Sequence[Send]) -> None: ...

    @abstractmethod
    def _finished(self) -> Sequence[Send | Receive]: ...


class TorchTransport(Transport):
    """Point-to-point messages of torch.distributed: gloo on CPU, NCCL on CUDA.

    gloo has no eager path, so that receives are posted before sends, for some steps ahead; and it cannot be asked
    what has ended, so that messages are waited for in step order, in which they cannot deadlock. NCCL gets a
    step's sends and receives in one group, and what has "ended" is queued on the current stream.
    """

    def __init__(self, rounds: bool = False) -> None:
        """All ranks call it alike: its messages have a group, and with NCCL a communicator, of their own.

        Others may call torch.distributed meanwhile, from other threads: within a group a batch under construction
        would swallow their calls, and no two ranks would agree on the order of theirs and ours.
        """
        super().__init__()
        self.rounds = rounds
        self._group = dist.new_group()
        dist.barrier(self._group)  # NCCL's first call has to be everybody's
        self._expected: deque[Receive] = deque()
        self._held: list[Send] = []
        self._under_way: list[tuple[int, bool, int, Send | Receive, dist.Work]] = []
        self._serial = 0

    def barrier(self) -> None:
        dist.barrier()

    def expect(self, receives: Sequence[Receive]) -> None:
        self._expected.extend(sorted(receives, key=lambda message: message.step))

    def _send(self, sends: Sequence[Send]) -> None:
        if self.rounds:
            self._held += sends
            return
        for message in sends:
            self._post_receives(message.step + 1)
            self._started(message, dist.isend(message.tensor, message.dst, self._group))

    def _post_receives(self, until: int) -> None:
        while self._expected and self._expected[0].step <= until:
            message = self._expected.popleft()
            self._started(message, dist.irecv(message.land(message.message).tensor, message.src, self._group))

    def _started(self, message: Send | Receive, work: dist.Work | None) -> None:
        assert work is not None, "the rank is in the process group"
        self._serial += 1
        heapq.heappush(self._under_way, (message.step, type(message) is Send, self._serial, message, work))

    def _finished(self) -> Sequence[Send | Receive]:
        if self.rounds:
            return self._round()
        steps = [part[0].step for part in (self._expected,) if part] + [entry[0] for entry in self._under_way[:1]]
        self._post_receives(min(steps) + AHEAD)
        *_, message, work = heapq.heappop(self._under_way)
        work.wait()
        return [message]

    def _round(self) -> Sequence[Send | Receive]:
        """Post the next step's messages as one group, and let the current stream wait for it."""
        step = min(part[0].step for part in (self._expected, self._held) if part)
        receives: list[Receive] = []
        while self._expected and self._expected[0].step == step:
            receives.append(self._expected.popleft())
        sends, self._held = self._held, []
        operations = [
            dist.P2POp(dist.irecv, part.land(part.message).tensor, part.src, self._group) for part in receives
        ]
        operations += [dist.P2POp(dist.isend, part.tensor, part.dst, self._group) for part in sends]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return [*receives, *sends]


class LocalTransport(Transport):
    """All ranks in one process, for tests with hundreds of ranks: what is sent arrives at once."""

    adds = True

    def __init__(self) -> None:
        super().__init__()
        self._expected: dict[tuple[int, int], deque[Receive]] = {}
        self._letters: dict[tuple[int, int], deque[Send]] = {}
        self._ended: list[Send | Receive] = []

    def barrier(self) -> None:
        return None

    def expect(self, receives: Sequence[Receive]) -> None:
        for message in receives:
            self._expected.setdefault((message.src, message.dst), deque()).append(message)

    def _send(self, sends: Sequence[Send]) -> None:
        for message in sends:
            receive = self._expected[message.src, message.dst].popleft()
            deliver(message, receive)
            self._ended += [message, receive]

    def _finished(self) -> Sequence[Send | Receive]:
        if not self._ended:
            raise DistsimError("nothing is under way, but the exchange is not over: a message was never sent")
        ended, self._ended = self._ended, []
        return ended


def deliver(message: Send, receive: Receive) -> None:
    """Put a message's data where they are to go, within one process."""
    target, adds = receive.land(receive.message)
    if adds:
        target.add_(message.tensor)
    else:
        target.copy_(message.tensor)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it, so that a clock read now means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
