"""Transports move chunks between ranks and count them where they are sent."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Request(Protocol):
    """A send or receive under way."""

    def wait(self) -> object:
        """Return once a sent tensor may be overwritten, or once a received one is filled."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a schedule as a process sees it: a tensor to send, or to receive into."""

    row: int
    src: int
    dst: int
    tensor: Tensor


@dataclass(slots=True)
class MessageLog:
    """What was sent: totals over the whole run, and each message of the exchange under way."""

    counts: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """Messages sent by (src, dst, bytes)."""
    bytes_of: dict[tuple[int, int], int] = field(default_factory=dict)
    sent_s: dict[tuple[int, int], float] = field(default_factory=dict)
    received_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """By (schedule of the exchange, row), on this machine's monotonic clock, in seconds."""

    def restart(self) -> None:
        """Forget the single messages (not the totals): a new exchange begins."""
        self.bytes_of.clear()
        self.sent_s.clear()
        self.received_s.clear()


class Transport(ABC):
    """Sends and receives tensors; messages of an ordered pair of ranks arrive in the order they are posted."""

    def __init__(self) -> None:
        self.log = MessageLog()

    def post(
        self, which: int, sends: Sequence[Message], receives: Sequence[Message]
    ) -> tuple[list[Request], list[Request]]:
        """Start the sends and receives of one step of schedule `which` of an exchange, and count the sends."""
        now = time.monotonic()  # before: a receiver may have it all when the sender's call returns
        requests = self._start(sends, receives)
        for message in sends:
            size = message.tensor.numel() * message.tensor.element_size()
            self.log.counts[message.src, message.dst, size] += 1
            self.log.bytes_of[which, message.row] = size
            self.log.sent_s[which, message.row] = now
        return requests

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    @abstractmethod
    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Request], list[Request]]:
        """Start the messages of one step; return their requests in the given orders."""


class TorchTransport(Transport):
    """Point-to-point messages of torch.distributed: gloo on CPU, NCCL on CUDA.

    A step's messages go out as one batch, receives first: gloo has no eager path, and NCCL wants a send and
    its receive in one group.
    """

    def barrier(self) -> None:
        dist.barrier()

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Request], list[Request]]:
        operations = [dist.P2POp(dist.irecv, message.tensor, message.src) for message in receives]
        operations += [dist.P2POp(dist.isend, message.tensor, message.dst) for message in sends]
        if not operations:
            return [], []
        works: list[Request] = list(dist.batch_isend_irecv(operations))
        if len(works) < len(operations):  # NCCL coalesces a batch into one piece of work
            works = [works[0]] * len(operations)
        return works[len(receives) :], works[: len(receives)]


class LocalTransport(Transport):
    """All ranks in one process, for tests with hundreds of ranks.

    The n-th receive posted for an ordered pair gets the n-th message sent, whichever is waited for first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._letters: dict[tuple[int, int, int], Tensor] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._received: Counter[tuple[int, int]] = Counter()

    def barrier(self) -> None:
        pass

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Request], list[Request]]:
        for message in sends:
            self._letters[_address(message, self._sent)] = message.tensor.clone()
        arriving = [
            _LocalReceive(self._letters, _address(message, self._received), message.tensor) for message in receives
        ]
        return [Done()] * len(sends), list(arriving)


def _address(message: Message, numbers: Counter[tuple[int, int]]) -> tuple[int, int, int]:
    """Number a message among those of its ordered pair."""
    numbers[message.src, message.dst] += 1
    return message.src, message.dst, numbers[message.src, message.dst]


class Done:
    """A request that is over from the start."""

    def wait(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _LocalReceive:
    letters: dict[tuple[int, int, int], Tensor]
    address: tuple[int, int, int]
    target: Tensor

    def wait(self) -> None:
        self.target.copy_(self.letters.pop(self.address))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it, so that a clock read now means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
