"""Own TCP: who gets in, what crosses the wire to the byte, and data that come in pieces of any size."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import copies, values_for
from threads import LIMIT_S, together
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from transports import as_bytes

from distsim import exchanges
from distsim.errors import DistsimError
from trainers import tcp
from trainers.exchange import ScheduleRunner
from trainers.meeting import ANSWER, HELLO, handshake_bytes, meet
from trainers.tcp import TcpTransport
from trainers.transport import Landing, LocalTransport, Receive, Send

pytestmark = pytest.mark.timeout(120)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Stingy(socket.socket):
    """A socket that takes and gives a few bytes at a time, and now and then none."""

    most = 0
    random = random.Random(0)

    def send(self, data: Any, *flags: Any) -> int:
        return super().send(memoryview(data)[: self._some()])

    def recv_into(self, buffer: Any, size: int = 0, *flags: Any) -> int:
        return super().recv_into(buffer, min(size or len(buffer), self._some()))

    def _some(self) -> int:
        if self.random.random() < 0.1:
            raise BlockingIOError
        return self.random.randint(1, self.most)


@contextlib.contextmanager
def connected(count: int, *, most: int = 0, seed: int = 0, buffer_bytes: int = 0) -> Iterator[list[TcpTransport]]:
    """Transports of `count` ranks, with sockets that are stingy or have small buffers."""
    store = HashStore()
    sockets = together(*(partial(meet, store, rank, count, "127.0.0.1", 30.0) for rank in range(count)))
    for rank, mine in enumerate(sockets):
        for peer, each in mine.items():
            if buffer_bytes:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            if most:
                stingy = Stingy(fileno=each.detach())
                stingy.most, stingy.random = most, random.Random(seed + 10 * rank + peer)
                mine[peer] = stingy
    transports = [TcpTransport(rank, mine, lambda: None, LIMIT_S) for rank, mine in enumerate(sockets)]
    try:
        yield transports
    finally:
        for transport in transports:
            transport.close()


class Letter(NamedTuple):
    """A message, where it goes, and whether it is added there."""

    src: int
    dst: int
    data: Tensor
    target: Tensor
    adds: bool = False


def as_send(letter: Letter, number: int) -> Send:
    return Send(0, number, 0, letter.src, letter.dst, number, letter.data)


def as_receive(letter: Letter, number: int, land: Callable[[int], Landing] | None = None) -> Receive:
    places = [Landing(letter.target, letter.adds)]  # to be asked for once
    size = letter.data.numel() * letter.data.element_size()
    return Receive(0, number, 0, letter.src, letter.dst, number, size, land or (lambda _: places.pop()))


def exchange(transport: TcpTransport, letters: Sequence[Letter]) -> None:
    """Send and receive one rank's part of the letters, and nothing twice."""
    numbered = list(enumerate(letters))
    transport.expect([as_receive(each, number) for number, each in numbered if each.dst == transport.rank])
    transport.send([as_send(each, number) for number, each in numbered if each.src == transport.rank])
    left = {(each.src == transport.rank, number) for number, each in numbered if transport.rank in each[:2]}
    while left:
        for ended in transport.finished():
            left.remove((type(ended) is Send, ended.message))


def deliver(transports: Sequence[TcpTransport], letters: Sequence[Letter]) -> None:
    """Exchange letters between all ranks, and hold what has come against plain copies and sums."""
    wanted = [each.target + each.data if each.adds else each.data.clone() for each in letters]
    together(*(partial(exchange, each, letters) for each in transports))
    for letter, value in zip(letters, wanted, strict=True):
        assert as_bytes(letter.target.view(torch.uint8)) == as_bytes(value.view(torch.uint8))


def letter(
    src: int, dst: int, size: int, dtype: torch.dtype = torch.float32, adds: bool = False, seed: int = 0
) -> Letter:
    data, target = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Letter(src, dst, data, target, adds)


# What crosses the wire


@pytest.mark.parametrize("workers", (2, 3, 4))
def test_the_payload_counted_is_what_the_kernel_counts(workers: int) -> None:
    with connected(workers) as transports:
        for strategy in ("ring", "all-to-all", "recursive-doubling"):
            schedule = exchanges.build(strategy, workers, 100_003).gradients
            values = values_for(schedule, dtype=torch.float32)
            runs = [ScheduleRunner(schedule, [rank], transports[rank]) for rank in range(workers)]
            together(*(partial(run.run, {rank: values[rank]}) for rank, run in enumerate(runs)))
        for transport in transports:
            for peer in set(range(workers)) - {transport.rank}:
                sent, received = (
                    sum(key[3] * count for key, count in each.log.counts.items() if key[1:3] == pair)
                    for each, pair in (
                        (transport, (transport.rank, peer)),
                        (transports[peer], (peer, transport.rank)),
                    )
                )
                assert sent > 0
                acknowledged = sent + handshake_bytes(transport.rank, peer)
                end = time.monotonic() + 10
                while (wire := transport.wire(peer)).bytes_acked < acknowledged and time.monotonic() < end:
                    time.sleep(0.01)  # an acknowledgement may be delayed
                assert wire.bytes_acked == acknowledged
                other_hello = HELLO.size + 32 if peer > transport.rank else ANSWER.size
                assert wire.bytes_received - received in (other_hello, other_hello + 1)  # the SYN may count here, too
                assert wire.segs_out > 0 and (wire.total_retrans > 0) == (wire.bytes_retrans > 0)


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_every_strategy_gives_the_bits_of_one_process(strategy: str) -> None:
    exchange_ = exchanges.build(strategy, 4, 10_007)
    local = LocalTransport()
    with connected(exchange_.ranks, buffer_bytes=4096) as transports:
        for which, schedule in enumerate(exchange_.schedules()):
            before = values_for(schedule, seed=which, dtype=torch.float32)
            wanted, values = copies(before), copies(before)
            ScheduleRunner(schedule, range(exchange_.ranks), local, which).run(wanted)
            runs = [ScheduleRunner(schedule, [rank], each, which) for rank, each in enumerate(transports)]
            together(*(partial(run.run, {rank: values[rank]}) for rank, run in enumerate(runs)))
            for rank in values:
                assert as_bytes(values[rank]) == as_bytes(wanted[rank]), rank
        assert sum((each.log.counts for each in transports), Counter()) == local.log.counts
        if strategy == "all-to-all":  # several arrivals are summed with the own part in its place
            assert all(run.staging_bytes for run in runs)
        assert {row for each in transports for row in each.log.received_s} == set(local.log.received_s)


# Data in pieces


@pytest.mark.parametrize("adds", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_data_in_pieces_of_any_size(dtype: torch.dtype, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "BLOCK_BYTES", 16)
    with connected(2, most=11) as transports:
        letters = [letter(src, 1 - src, size, dtype, adds) for size in (1, 2, 3, 17, 100) for src in (0, 1)]
        deliver(transports, letters)
        deliver(transports, letters)  # nothing is left over from before


@pytest.mark.parametrize("adds", (False, True))
def test_both_send_at_once_far_more_than_fits(adds: bool) -> None:
    with connected(2, buffer_bytes=16384) as transports:
        deliver(transports, [letter(src, 1 - src, 300_007, adds=adds) for src in (0, 1)])


@st.composite
def some_letters(draw: st.DrawFn) -> tuple[int, list[Letter]]:
    ranks = draw(st.integers(2, 3))
    pairs = st.sampled_from([(src, dst) for src in range(ranks) for dst in range(ranks) if src != dst])
    one = st.tuples(pairs, st.integers(1, 60), st.sampled_from(DTYPES), st.booleans())
    made = draw(st.lists(one, max_size=12))
    return ranks, [
        letter(src, dst, size, dtype, adds, seed) for seed, ((src, dst), size, dtype, adds) in enumerate(made)
    ]


@settings(max_examples=40)
@given(some_letters(), st.integers(1, 100), st.sampled_from((16, 32, 80)), st.integers(0, 1000))
def test_any_messages_in_any_order(made: tuple[int, list[Letter]], most: int, block: int, seed: int) -> None:
    ranks, letters = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tcp, "BLOCK_BYTES", block)
        with connected(ranks, most=most, seed=seed) as transports:
            deliver(transports, letters)


@contextlib.contextmanager
def facing(*peers: int, timeout_s: float = LIMIT_S) -> Iterator[tuple[TcpTransport, dict[int, socket.socket]]]:
    """Rank 0's transport, and the other ends of its connections in our hands."""
    pairs = {peer: socket.socketpair() for peer in peers}
    transport = TcpTransport(0, {peer: ours for peer, (ours, _) in pairs.items()}, lambda: None, timeout_s)
    try:
        yield transport, {peer: theirs for peer, (_, theirs) in pairs.items()}
    finally:
        transport.close()
        for _, theirs in pairs.values():
            theirs.close()


def test_a_landing_is_asked_for_once_and_when_the_first_byte_is_there() -> None:
    letters = [letter(1, 0, 5), letter(2, 0, 7), letter(1, 0, 2)]
    asked: list[int] = []

    def land(number: int) -> Landing:
        asked.append(number)
        return Landing(letters[number].target, False)

    with facing(1, 2) as (transport, others):
        transport.expect([as_receive(each, number, land) for number, each in enumerate(letters)])
        assert asked == []
        others[1].sendall(as_bytes(letters[0].data))
        assert [each.message for each in transport.finished()] == [0] and asked == [0]
        others[2].sendall(as_bytes(letters[1].data)[:1])
        others[1].sendall(as_bytes(letters[2].data))
        assert [each.message for each in transport.finished()] == [2] and sorted(asked) == [0, 1, 2]
        others[2].sendall(as_bytes(letters[1].data)[1:])
        assert [each.message for each in transport.finished()] == [1] and sorted(asked) == [0, 1, 2]
    assert all(torch.equal(each.target, each.data) for each in letters)


def test_what_is_not_expected_yet_waits_and_an_empty_message_does_not_hang() -> None:
    early, late = letter(1, 0, 3), letter(1, 0, 4)
    with facing(1) as (transport, others):
        others[1].sendall(as_bytes(early.data) + as_bytes(late.data))
        exchange(transport, [early])
        assert not torch.equal(late.target, late.data)
        exchange(transport, [late])
        exchange(
            transport, [Letter(1, 0, torch.empty(0), torch.empty(0)), Letter(0, 1, torch.empty(0), torch.empty(0))]
        )
    assert torch.equal(early.target, early.data) and torch.equal(late.target, late.data)


@pytest.mark.parametrize("data", (b"", b"12345"))
def test_a_peer_that_goes_away_while_data_are_awaited(data: bytes) -> None:
    with facing(1, 2) as (transport, others):
        others[2].sendall(data)
        others[2].close()
        with pytest.raises(DistsimError, match=r"^the connection to rank 2 is lost; that rank's own message says why$"):
            exchange(transport, [letter(1, 0, 5), letter(2, 0, 5)])


def test_a_peer_that_goes_away_while_data_are_sent() -> None:
    with facing(3) as (transport, others):
        transport.send([as_send(letter(0, 3, 1_000_000), 0)])
        others[3].close()
        with pytest.raises(DistsimError, match="the connection to rank 3 is lost"):
            transport.finished()
    with facing(3) as (transport, others):
        others[3].close()
        with pytest.raises(DistsimError, match="the connection to rank 3 is lost"):
            transport.send([as_send(letter(0, 3, 1), 0)])


def test_a_peer_that_is_done_and_gone_disturbs_nobody() -> None:
    with facing(1, 2, timeout_s=0.2) as (transport, others):
        last = letter(2, 0, 3)
        others[2].sendall(as_bytes(last.data))
        others[2].close()
        exchange(transport, [last])
        with pytest.raises(DistsimError, match=r"rank 0 has waited 0\.2 s for data from rank 1$"):
            exchange(transport, [letter(1, 0, 1)])


def test_waiting_in_vain_says_for_whom() -> None:
    with facing(1, 2, 3, timeout_s=0.2) as (transport, _):
        transport.expect([as_receive(letter(1, 0, 1), 0)])
        transport.send([as_send(letter(0, 3, 1_000_000), 1)])
        with pytest.raises(
            DistsimError, match=r"^rank 0 has waited 0\.2 s for data from rank 1 and for rank 3 to take data$"
        ):
            transport.finished()


def test_the_barrier_is_the_one_that_was_given() -> None:
    calls: list[str] = []
    transport = TcpTransport(0, {}, lambda: calls.append("barrier"))
    transport.barrier()
    assert calls == ["barrier"]
