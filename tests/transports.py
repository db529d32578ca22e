"""Transports to test executors with: one that does everything as late and as oddly as it may, one between threads."""

from __future__ import annotations

import queue
import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trainers.transport import Landing, Receive, Send, Transport

Pair = tuple[int, int]


@dataclass(eq=False)
class _Letter:
    send: Send
    as_sent: bytes
    data: Tensor | None = None
    """What was sent, once it has been read."""


class LateTransport(Transport):
    """All ranks in one process; one thing happens at a time, in a random order of all that a network may do.

    A message is read some time after it was sent, its sender hears of that later, and it arrives later still, those
    of an ordered pair in line. Where it goes is asked at any time before. While it arrives its place holds NaN, so
    that nobody can read or write there unnoticed.
    """

    def __init__(self, seed: int = 0, *, adds: bool = False, rounds: bool = False) -> None:
        super().__init__()
        self.adds, self.rounds = adds, rounds
        self.added = 0  # arrivals that were added to what was there
        self._random = random.Random(seed)
        self._events: list[Callable[[], None]] = []
        self._letters: defaultdict[Pair, deque[_Letter]] = defaultdict(deque)
        self._expected: defaultdict[Pair, deque[Receive]] = defaultdict(deque)
        self._arriving: set[Pair] = set()
        self._unasked: set[Receive] = set()
        self._landings: dict[Receive, Landing] = {}
        self._ended: list[Send | Receive] = []

    def barrier(self) -> None:
        return None

    def expect(self, receives: Sequence[Receive]) -> None:
        assert not any(self._letters.values()) and not any(self._expected.values()), "one exchange at a time"
        for receive in receives:
            self._expected[receive.src, receive.dst].append(receive)
            self._unasked.add(receive)
            self._events.append(partial(self._ask, receive))

    def _send(self, sends: Sequence[Send]) -> None:
        for send in sends:
            assert send.tensor.ndim == 1 and send.tensor.is_contiguous() and send.tensor.numel() > 0
            letter = _Letter(send, as_bytes(send.tensor))
            self._letters[send.src, send.dst].append(letter)
            self._events.append(partial(self._read, letter))

    def _finished(self) -> Sequence[Send | Receive]:
        wanted = 1
        if self.rounds:
            sends = [letter.send for line in self._letters.values() for letter in line]
            receives = [receive for line in self._expected.values() for receive in line]
            step = min(receive.step for receive in receives)
            group = [receive.message for receive in receives if receive.step == step]
            assert sorted(send.message for send in sends) == sorted(group), "a round is not one whole step"
            wanted = 2 * len(group)
        while self._events and (len(self._ended) < wanted or (not self.rounds and self._random.random() < 0.3)):
            place = self._random.randrange(len(self._events))
            self._events[place], self._events[-1] = self._events[-1], self._events[place]
            self._events.pop()()
        assert self._ended, "everybody waits, and nothing is under way"
        ended, self._ended = self._ended, []
        return ended

    def _ask(self, receive: Receive) -> None:
        if receive in self._unasked:
            self._unasked.remove(receive)
            self._landings[receive] = landing = receive.land(receive.message)
            assert landing.tensor.numel() * landing.tensor.element_size() == receive.size_bytes
            assert self.adds or not landing.adds

    def _read(self, letter: _Letter) -> None:
        assert as_bytes(letter.send.tensor) == letter.as_sent, f"{letter.send} has changed before it was read"
        letter.data = letter.send.tensor.clone()
        self._events.append(partial(self._end, letter.send))
        self._go_on((letter.send.src, letter.send.dst))

    def _end(self, send: Send) -> None:
        self._ended.append(send)  # a list of its own for each answer: not to be bound any earlier

    def _go_on(self, pair: Pair) -> None:
        """Let the first message in line arrive if it is there and none is arriving."""
        if pair not in self._arriving and self._letters[pair] and self._letters[pair][0].data is not None:
            self._arriving.add(pair)
            self._events.append(partial(self._begin, pair))

    def _begin(self, pair: Pair) -> None:
        send, receive = self._letters[pair][0].send, self._expected[pair][0]
        for name in ("schedule", "row", "step", "message"):
            assert getattr(send, name) == getattr(receive, name), f"{send} arrives as {receive}"
        assert send.size_bytes() == receive.size_bytes
        self._ask(receive)
        target, adds = self._landings[receive]
        before = target.clone() if adds else None
        self.added += adds
        target.fill_(torch.nan)
        self._events.append(partial(self._arrive, pair, before))

    def _arrive(self, pair: Pair, before: Tensor | None) -> None:
        data, receive = self._letters[pair].popleft().data, self._expected[pair].popleft()
        target = self._landings.pop(receive).tensor
        assert data is not None
        assert bool(target.isnan().all()), f"somebody has written where {receive} arrives"
        target.copy_(data if before is None else before + data)
        self._ended.append(receive)
        self._arriving.remove(pair)
        self._go_on(pair)


class ThreadTransport(Transport):
    """One rank in a thread of its own; `boxes` holds a box for each rank, into which the others put their messages."""

    def __init__(self, rank: int, boxes: Sequence[queue.Queue[tuple[int, Tensor]]], *, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self._rank, self._boxes = rank, boxes
        self._expected: defaultdict[int, deque[Receive]] = defaultdict(deque)
        self._ended: list[Send | Receive] = []

    def barrier(self) -> None:
        return None

    def expect(self, receives: Sequence[Receive]) -> None:
        for receive in receives:
            assert receive.dst == self._rank
            self._expected[receive.src].append(receive)

    def _send(self, sends: Sequence[Send]) -> None:
        for send in sends:
            assert send.src == self._rank
            self._boxes[send.dst].put((send.src, send.tensor.clone()))
        self._ended += sends

    def _finished(self) -> Sequence[Send | Receive]:
        if not self._ended:
            src, data = self._boxes[self._rank].get(timeout=30)
            receive = self._expected[src].popleft()
            target, adds = receive.land(receive.message)
            target.copy_(target + data if adds else data)
            self._ended.append(receive)
        ended, self._ended = self._ended, []
        return ended


def as_bytes(tensor: Tensor) -> bytes:
    """A tensor's bits, in which NaN equals itself."""
    return tensor.numpy().tobytes()
