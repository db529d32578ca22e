"""The strategies: counts from the tables' own rows against the closed forms, for every small number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import expected, observed

from distsim import exchanges
from distsim.errors import ConfigError
from distsim.exchanges import MAX_PARAMS, MAX_WORKERS
from distsim.schedule import Exchange, Op, Source

STRATEGIES = list(exchanges.STRATEGIES)


def some_params(n: int) -> list[int]:
    """Parameter counts that n divides, that it does not, fewer than n, and none."""
    return sorted({0, 1, n - 1, n, n + 1, 2 * n + 1, 97, 12 * n})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("n", range(1, 65))
def test_rows_are_those_of_the_closed_forms(strategy: str, n: int) -> None:
    for p in some_params(n):
        exchange = exchanges.build(strategy, n, p)
        counted, wanted = observed(exchange), expected(strategy, n, p)
        assert counted.sizes == wanted.sizes, (n, p)
        assert counted.links == wanted.links, (n, p)
        assert counted.steps == wanted.steps, (n, p)
        if p >= n:
            assert counted.waits == wanted.waits, (n, p)
        traffic = exchange.traffic(4)
        assert traffic.message_sizes == {4 * size: count for size, count in wanted.sizes.items()}
        assert traffic.links() == [(*pair, count, 4 * size) for pair, (count, size) in sorted(wanted.links.items())]
        assert traffic.messages == sum(wanted.sizes.values())
        assert traffic.bytes == 4 * sum(size * count for size, count in wanted.sizes.items())


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_the_table_of_the_readme(n: int) -> None:
    """Messages and their size, for p that n divides, as numbers of the formulas alone."""
    p = 10 * n
    messages = {"all-to-all": n * (n - 1), "parameter-server": 2 * n, "ring": n * 2 * (n - 1)}
    size = {"all-to-all": p, "parameter-server": p, "ring": p // n}
    assert messages.keys() == exchanges.STRATEGIES.keys()
    for strategy, count in messages.items():
        traffic = exchanges.build(strategy, n, p).traffic(8)
        assert traffic.messages == count
        assert traffic.message_sizes == ({8 * size[strategy]: count} if count else {})
        assert traffic.bytes == 8 * count * size[strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_built_exchanges_say_what_they_are(strategy: str) -> None:
    exchange = exchanges.build(strategy, 3, 7)
    assert (exchange.strategy, exchange.workers, exchange.params) == (strategy, 3, 7)
    server = strategy == "parameter-server"
    assert exchange.ranks == 3 + server
    assert len(exchange.schedules()) == 1 + server
    assert exchange.updates().tolist() == ([False] * 3 + [True] if server else [True] * 3)


def test_a_ring_goes_round() -> None:
    ring = exchanges.build("ring", 5, 11).gradients
    assert ((ring.src + 1) % 5 == ring.dst).all()
    assert (ring.op[ring.step < 4] == Op.REDUCE).all()
    assert (ring.op[ring.step >= 4] == Op.COPY).all()
    for step in range(ring.steps):  # at each step every rank sends one chunk, and no two the same
        assert sorted(ring.src[ring.step == step].tolist()) == list(range(5))
        assert sorted(ring.chunk[ring.step == step].tolist()) == list(range(5))


def test_all_to_all_goes_in_shifts() -> None:
    """No two neighbouring rows meet at a sender or receiver, so that first come, first served wastes no link."""
    rows = exchanges.build("all-to-all", 5, 1).gradients
    for first in range(0, rows.messages, 5):
        shift = slice(first, first + 5)
        assert sorted(rows.src[shift].tolist()) == sorted(rows.dst[shift].tolist()) == [*range(5)]
    assert (rows.source == Source.INPUT).all()


@pytest.mark.parametrize("strategy", ["ring", "all-to-all"])
def test_one_rank_sends_nothing(strategy: str) -> None:
    exchange = exchanges.build(strategy, 1, 9)
    assert (exchange.ranks, exchange.gradients.messages, exchange.gradients.steps) == (1, 0, 0)


@pytest.mark.parametrize(
    ("strategy", "workers", "params", "message"),
    [
        ("rign", 2, 2, "unknown strategy 'rign'; did you mean 'ring'\\?"),
        ("all_to_all", 2, 2, "unknown strategy 'all_to_all'; did you mean 'all-to-all'\\?"),
        ("Parameter-Server", 2, 2, "did you mean 'parameter-server'\\?"),
        ("xyz", 2, 2, "unknown strategy 'xyz'; valid: all-to-all, parameter-server, ring"),
        ("ring", 0, 2, "workers must be at least 1, not 0"),
        ("ring", -3, 2, "workers must be at least 1, not -3"),
        ("ring", MAX_WORKERS + 1, 2, f"at most {MAX_WORKERS} workers, not {MAX_WORKERS + 1}: .* memory"),
        ("parameter-server", 10**6, 2, "at most 4096 workers"),
        ("ring", 2, -1, "the parameter count cannot be negative, but is -1"),
        ("all-to-all", 2, MAX_PARAMS + 1, "at most 140737488355328 parameters"),
        ("ring", 2, 10**30, "at most 140737488355328 parameters"),
    ],
)
def test_wrong_requests_are_refused(strategy: str, workers: int, params: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        exchanges.build(strategy, workers, params)


def test_the_largest_counts_do_not_overflow() -> None:
    exchange: Exchange = exchanges.build("parameter-server", MAX_WORKERS, MAX_PARAMS)
    traffic = exchange.traffic(8)
    assert int(traffic.received_bytes()[-1]) == MAX_WORKERS * MAX_PARAMS * 8 == 2**62
    assert traffic.bytes == 2**63


def test_counts_may_be_numpys_integers_but_not_fractions() -> None:
    same = exchanges.build("ring", np.int64(3), np.int32(12))  # type: ignore[arg-type]
    assert same.digest() == exchanges.build("ring", 3, 12).digest()
    with pytest.raises(ConfigError, match="whole numbers"):
        exchanges.build("ring", 3, 12.0)  # type: ignore[arg-type]
