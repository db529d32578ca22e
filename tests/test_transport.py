"""Transports: what is counted where it is sent, the order in which messages arrive, and where they land."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from distsim.errors import DistsimError
from trainers.transport import Landing, LocalTransport, MessageLog, Receive, Send, deliver


def send(row: int, src: int, dst: int, tensor: Tensor, schedule: int = 0) -> Send:
    return Send(schedule=schedule, row=row, step=0, src=src, dst=dst, message=row, tensor=tensor)


def receive(row: int, src: int, dst: int, land: Callable[[int], Landing], schedule: int = 0) -> Receive:
    return Receive(schedule=schedule, row=row, step=0, src=src, dst=dst, message=row, size_bytes=0, land=land)


def into(tensor: Tensor, adds: bool = False) -> Callable[[int], Landing]:
    return lambda _: Landing(tensor, adds)


def anywhere(_: int) -> Landing:
    return Landing(torch.empty(3, dtype=torch.float64), False)


def test_only_what_is_sent_is_counted_in_bytes_of_its_own_tensor() -> None:
    transport = LocalTransport()
    value = torch.ones(3, dtype=torch.float64)
    places = [(4, 0, 1), (5, 0, 1), (6, 1, 0)]
    transport.expect([receive(*place, anywhere, 1) for place in places])
    assert transport.log == MessageLog()
    transport.send(
        [
            send(row, src, dst, part, 1)
            for (row, src, dst), part in zip(places, (value, value.float(), value.half()), strict=True)
        ]
    )
    counts = Counter({(1, 0, 1, 24): 1, (1, 0, 1, 12): 1, (1, 1, 0, 6): 1})
    assert transport.log.counts == counts
    assert transport.log.bytes_of == {(1, 4): 24, (1, 5): 12, (1, 6): 6}
    assert transport.log.received_s == {}
    transport.finished()
    assert set(transport.log.received_s) == {(1, 4), (1, 5), (1, 6)}
    assert transport.log.counts == counts

    transport.expect([receive(4, 0, 1, anywhere)])
    transport.send([send(4, 0, 1, value)])  # of another schedule
    assert transport.log.counts == counts + Counter({(0, 0, 1, 24): 1})


def test_times_are_on_the_monotonic_clock_and_in_order() -> None:
    transport = LocalTransport()
    before = time.monotonic()
    transport.expect([receive(0, 0, 1, anywhere)])
    transport.send([send(0, 0, 1, torch.ones(3))])
    transport.finished()
    log = transport.log
    assert before <= log.sent_s[0, 0] <= log.received_s[0, 0] <= time.monotonic()


def test_a_message_is_sent_when_its_sending_begins() -> None:
    """Sending takes time in which a receiver may already have it all: it must not arrive before it was sent."""

    class Slow(LocalTransport):
        def _send(self, sends: Sequence[Send]) -> None:
            self.started = time.monotonic()
            super()._send(sends)

    transport = Slow()
    transport.expect([receive(0, 0, 1, anywhere)])
    transport.send([send(0, 0, 1, torch.ones(3))])
    assert transport.log.sent_s[0, 0] <= transport.started


def test_a_message_is_received_when_its_end_is_known() -> None:
    class Slow(LocalTransport):
        def _finished(self) -> Sequence[Send | Receive]:
            ended = super()._finished()
            self.ended = time.monotonic()
            return ended

    transport = Slow()
    transport.expect([receive(0, 0, 1, anywhere)])
    transport.send([send(0, 0, 1, torch.ones(3))])
    transport.finished()
    assert transport.log.received_s[0, 0] >= transport.ended


def test_a_new_step_forgets_single_messages_and_keeps_the_totals() -> None:
    log = MessageLog()
    log.counts[2, 0, 1, 8] += 1
    log.bytes_of[2, 0], log.sent_s[2, 0], log.received_s[2, 0] = 8, 1.0, 2.0
    log.restart()
    assert log.counts == Counter({(2, 0, 1, 8): 1})
    assert not log.bytes_of and not log.sent_s and not log.received_s


def test_messages_of_a_pair_arrive_in_the_order_in_which_they_are_sent() -> None:
    """Neither their numbers nor what else is under way count."""
    transport = LocalTransport()
    first, second, other = (torch.zeros(1) for _ in range(3))
    transport.expect([receive(9, 0, 1, into(first)), receive(3, 2, 1, into(other)), receive(1, 0, 1, into(second))])
    transport.send([send(9, 0, 1, torch.tensor([1.0])), send(3, 2, 1, torch.tensor([7.0]))])
    transport.send([send(1, 0, 1, torch.tensor([2.0]))])
    assert [tensor.item() for tensor in (first, second, other)] == [1, 2, 7]


def test_what_has_ended_is_returned_once_with_both_ends_of_a_message() -> None:
    transport = LocalTransport()
    expected = [receive(row, 0, 1, anywhere) for row in range(2)]
    sends = [send(row, 0, 1, torch.ones(3)) for row in range(2)]
    transport.expect(expected)
    transport.send(sends[:1])
    assert set(map(id, transport.finished())) == {id(sends[0]), id(expected[0])}
    transport.send(sends[1:])
    assert set(map(id, transport.finished())) == {id(sends[1]), id(expected[1])}


def test_where_a_message_goes_is_asked_once_and_not_before_it_is_there() -> None:
    asked: list[int] = []
    target = torch.zeros(2)

    def land(message: int) -> Landing:
        asked.append(message)
        return Landing(target, False)

    transport = LocalTransport()
    transport.expect([receive(7, 0, 1, land)])
    assert asked == []
    transport.send([send(7, 0, 1, torch.tensor([5.0, 6.0]))])
    transport.finished()
    assert asked == [7]
    assert target.tolist() == [5, 6]


@pytest.mark.parametrize(("adds", "expected"), [(False, [5, 6]), (True, [15, 26])])
def test_data_are_copied_or_added_where_they_land(adds: bool, expected: list[float]) -> None:
    whole = torch.tensor([1.0, 10.0, 20.0, 2.0])
    sent = torch.tensor([5.0, 6.0])
    deliver(send(0, 0, 1, sent), receive(0, 0, 1, into(whole[1:3], adds)))
    assert whole.tolist() == [1, *expected, 2]
    assert sent.tolist() == [5, 6]


def test_a_sent_tensor_may_be_overwritten_once_its_message_has_ended() -> None:
    transport = LocalTransport()
    sent, target = torch.tensor([5.0, 6.0]), torch.zeros(2)
    transport.expect([receive(0, 0, 1, into(target))])
    transport.send([send(0, 0, 1, sent)])
    assert any(type(ended) is Send for ended in transport.finished())
    sent.zero_()
    assert target.tolist() == [5, 6]


def test_a_message_that_was_never_sent_is_an_error_and_no_endless_wait() -> None:
    transport = LocalTransport()
    transport.expect([receive(0, 0, 1, anywhere)])
    with pytest.raises(DistsimError, match="a message was never sent"):
        transport.finished()
