"""Counted against the kernel: what the simulator predicts is what transports count and Linux sends, to the byte.

Every schedule that runs under torchrun is run by wire_ranks.py, on 2, 3 and 4 ranks. Three counts are compared with
the simulator's: the transport's own, that of each TCP connection (TCP_INFO), and that of the loopback interface, in a
network namespace where nobody else uses it. gloo's framing, packet headers and what TCP has sent again are the only
things that come on top, and not a byte is left unexplained.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import pytest
import wire_ranks
from namespaces import PACKET_BYTES, Connection, namespace, needed
from processes import run
from tensors import assert_counts
from wire_ranks import STRATEGIES, TRAINING, TRAINING_STEPS, Measured

from distsim import exchanges

pytestmark = pytest.mark.timeout(180)

Link = tuple[int, int]
Case = tuple[str, str, int]

NOTICE_BYTES = 48
"""gloo's header. A message needs three: its sender says that it is ready, its receiver says so, then it is sent."""

RANKS = (2, 3, 4)
CASES: list[Case] = [
    *((transport, strategy, ranks) for ranks in RANKS for strategy in STRATEGIES for transport in ("tcp", "gloo")),
    *(("tcp", TRAINING, ranks) for ranks in RANKS),
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


class Amount(NamedTuple):
    """What one rank sends to another, all rounds together."""

    messages: int
    bytes: int


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Measured]]:
    """What the ranks of each case have measured; in a namespace of their own where that is permitted."""
    folder = tmp_path_factory.mktemp("wire")
    command = [sys.executable, "-W", "error", wire_ranks.__file__, str(folder), *map(str, RANKS)]
    ended = run([*(namespace() or ()), *command], folder, timeout_s=150)
    assert (ended.code, ended.left) == (0, []), ended.err
    sorted_out: defaultdict[Case, list[Measured]] = defaultdict(list)
    for values in json.loads(ended.out.splitlines()[-1]):
        each = Measured(**values)
        sorted_out[each.transport, each.what, each.ranks].append(each)
    assert sorted(sorted_out) == sorted(CASES)
    assert all([each.rank for each in ranks] == list(range(case[2])) for case, ranks in sorted_out.items())
    return sorted_out


def predicted(case: list[Measured]) -> dict[Link, Amount]:
    """What the simulator counts, by link."""
    one = case[0]
    messages: Counter[Link] = Counter()
    sizes: Counter[Link] = Counter()
    for strategy, params, itemsize in one.exchanged:
        for src, dst, count, size in built(strategy, one.ranks, params).traffic(itemsize).links():
            messages[src, dst] += one.rounds * count
            sizes[src, dst] += one.rounds * size
    return {link: Amount(messages[link], sizes[link]) for link in sizes}


@cache
def built(strategy: str, ranks: int, params: int) -> Any:
    return exchanges.build(strategy, ranks, params)


def ends(case: list[Measured]) -> dict[tuple[Link, tuple[int, int]], Connection]:
    """What each end of each connection has counted, by own rank, other rank, and ports."""
    owner = {tuple(ports): each.rank for each in case for ports, _ in each.ends}
    return {
        ((each.rank, owner[ports[1], ports[0]]), (ports[0], ports[1])): Connection(0, *counted)
        for each in case
        for ports, counted in each.ends
        if (ports[1], ports[0]) in owner
    }


def by_link(amounts: Iterable[tuple[Link, int]]) -> dict[Link, int]:
    """Sums, without those of nothing."""
    total: Counter[Link] = Counter()
    for link, amount in amounts:
        total[link] += amount
    return {link: amount for link, amount in total.items() if amount}


def framed(transport: str, payload: dict[Link, Amount]) -> dict[Link, int]:
    """Bytes in each direction with what the transport adds to messages."""
    notice = NOTICE_BYTES if transport == "gloo" else 0
    there = [(link, sent.bytes + 2 * notice * sent.messages) for link, sent in payload.items()]
    back = [((dst, src), notice * sent.messages) for (src, dst), sent in payload.items()]
    return by_link([*there, *back])


@every_case
def test_transports_count_what_the_simulator_counts(case: Case, found: dict[Case, list[Measured]]) -> None:
    """Of each schedule: messages and bytes of each pair of ranks, and messages of each size."""
    one, counts = found[case][0], sum((counted(each) for each in found[case]), Counter[tuple[int, ...]]())
    schedules = [
        (schedule, itemsize)
        for strategy, params, itemsize in one.exchanged
        for schedule in built(strategy, one.ranks, params).schedules()
    ]
    assert all(count % one.rounds == 0 for count in counts.values())
    for which, (schedule, itemsize) in enumerate(schedules):
        own = {(which, *key[1:]): count // one.rounds for key, count in counts.items() if key[0] == which}
        assert_counts(Counter(own), schedule.traffic(itemsize))  # type: ignore[arg-type]
    assert {which for which, *_ in counts} <= set(range(len(schedules)))


def counted(rank: Measured) -> Counter[tuple[int, ...]]:
    return Counter({tuple(key): count for key, count in rank.counts})


@every_case
def test_connections_carry_what_the_simulator_counts(case: Case, found: dict[Case, list[Measured]]) -> None:
    """At both ends, and nothing between ranks that exchange nothing; no namespace is needed for this."""
    wanted = framed(case[0], predicted(found[case]))
    seen = ends(found[case])
    assert by_link((link, end.acked) for (link, _), end in seen.items()) == wanted
    assert by_link(((dst, src), end.received) for ((src, dst), _), end in seen.items()) == wanted
    for (_, ports), end in seen.items():
        (other,) = (other for (_, others), other in seen.items() if others == ports[::-1])
        assert end.acked == other.received


@every_case
def test_the_interface_carries_what_the_simulator_counts(case: Case, found: dict[Case, list[Measured]]) -> None:
    """Payload, gloo's framing, packet headers, and what TCP has sent again: that is all."""
    needed()
    payload, seen = predicted(found[case]), ends(found[case]).values()
    (measured, packets) = found[case][0].loopback
    assert all(each.loopback == found[case][0].loopback for each in found[case]), "somebody else has talked"
    messages, size = (sum(column) for column in zip(*payload.values(), strict=True))
    framing = sum(framed(case[0], payload).values()) - size
    again = sum(end.again for end in seen)
    print(
        f"{'-'.join(map(str, case))}: payload {size} in {messages} messages, framing {framing}, sent again {again}; "
        f"{packets} packets, {measured} bytes, unexplained {measured - size - framing - again - PACKET_BYTES * packets}"
    )
    assert framing == (144 * messages if case[0] == "gloo" else 0)
    assert packets == sum(end.packets for end in seen)
    assert measured == size + framing + again + PACKET_BYTES * packets


@pytest.mark.parametrize("ranks", RANKS)
def test_something_was_sent_again(ranks: int, found: dict[Case, list[Measured]]) -> None:
    """Without that, nobody would know that what is sent again is told from the rest."""
    cases = [parts for (transport, _, count), parts in found.items() if (transport, count) == ("tcp", ranks)]
    if not cases[0][0].hasty:
        pytest.skip("this Linux cannot be told to send again sooner (before 6.15)")
    assert sum(end.again for parts in cases for end in ends(parts).values()) > 0


@pytest.mark.parametrize("ranks", RANKS)
def test_training_exchanges_its_plan(ranks: int, found: dict[Case, list[Measured]]) -> None:
    """Overlapped buckets of an own loop, by hand: a ring sends 2 (n - 1) times the gradients, and once the numbers."""
    case = found["tcp", TRAINING, ranks]
    params, parameters = 8 * (101 * 101 + 101), 8 * 2
    *buckets, numbers = case[0].exchanged
    assert len(buckets) > 3 and {(strategy, itemsize) for strategy, _, itemsize in buckets} == {("ring", 4)}
    assert sum(size for _, size, _ in buckets) == params
    assert tuple(numbers) == ("recursive-doubling", 2 + parameters, 8)
    messages_of_numbers = {2: 2, 3: 4, 4: 8}[ranks]
    wanted = TRAINING_STEPS * (2 * (ranks - 1) * params * 4 + messages_of_numbers * (2 + parameters) * 8)
    assert sum(end.acked for end in ends(case).values()) == wanted
