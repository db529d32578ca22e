"""Transports: what is counted where it is sent, and the order in which messages arrive."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from trainers.transport import LocalTransport, Message, MessageLog, Request


def message(row: int, src: int, dst: int, *values: float) -> Message:
    return Message(row, src, dst, torch.tensor(values, dtype=torch.float64))


def test_only_what_is_sent_is_counted_in_bytes_of_its_own_tensor() -> None:
    transport = LocalTransport()
    empty = torch.empty(3, dtype=torch.float32)
    sends = [message(4, 0, 1, 1, 2, 3), Message(5, 0, 1, empty), Message(6, 1, 0, empty.half())]
    transport.post(1, sends, [])
    assert transport.log.counts == Counter({(0, 1, 24): 1, (0, 1, 12): 1, (1, 0, 6): 1})
    assert transport.log.bytes_of == {(1, 4): 24, (1, 5): 12, (1, 6): 6}
    assert transport.log.received_s == {}

    transport.post(0, [message(4, 0, 1, 1, 2, 3)], [message(0, 1, 0, 0)])
    assert transport.log.counts[0, 1, 24] == 2
    assert transport.log.counts.total() == 4


def test_sending_times_are_on_the_monotonic_clock() -> None:
    transport = LocalTransport()
    before = time.monotonic()
    transport.post(0, [message(0, 0, 1, 1)], [])
    assert before <= transport.log.sent_s[0, 0] <= time.monotonic()


def test_a_message_is_sent_when_its_posting_begins() -> None:
    """Posting takes time in which a receiver may already have it all: it must not arrive before it was sent."""

    class Slow(LocalTransport):
        def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Request], list[Request]]:
            self.started = time.monotonic()
            return super()._start(sends, receives)

    transport = Slow()
    transport.post(0, [message(0, 0, 1, 1)], [])
    assert transport.log.sent_s[0, 0] <= transport.started


def test_a_new_exchange_forgets_single_messages_and_keeps_the_totals() -> None:
    log = MessageLog()
    log.counts[0, 1, 8] += 1
    log.bytes_of[0, 0], log.sent_s[0, 0], log.received_s[0, 0] = 8, 1.0, 2.0
    log.restart()
    assert log.counts == Counter({(0, 1, 8): 1})
    assert not log.bytes_of and not log.sent_s and not log.received_s


def test_messages_of_a_pair_arrive_in_the_order_in_which_they_are_posted() -> None:
    transport = LocalTransport()
    transport.post(0, [message(0, 0, 1, 1), message(1, 2, 1, 7)], [])
    transport.post(0, [message(2, 0, 1, 2)], [])
    first, other, second = message(0, 0, 1, 0), message(1, 2, 1, 0), message(2, 0, 1, 0)
    _, requests = transport.post(0, [], [second, first, other])
    for request in reversed(requests):  # neither row numbers nor the order of waiting count
        request.wait()
    assert [float(each.tensor) for each in (second, first, other)] == [1, 2, 7]


def test_a_sent_tensor_may_be_overwritten_once_its_request_is_over() -> None:
    transport = LocalTransport()
    sent, received = message(0, 0, 1, 5, 6), message(0, 0, 1, 0, 0)
    (sending,), (receiving,) = transport.post(0, [sent], [received])
    sending.wait()
    sent.tensor.zero_()
    receiving.wait()
    assert received.tensor.tolist() == [5, 6]


def test_a_message_that_was_never_sent_does_not_arrive() -> None:
    _, (receiving,) = LocalTransport().post(0, [], [message(0, 0, 1, 0)])
    with pytest.raises(KeyError):
        receiving.wait()
