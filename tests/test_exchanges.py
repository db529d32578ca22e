"""The strategies: counts from the tables' own rows against the closed forms, for every small number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from closed_forms import PARTS, PLAIN, expected, observed
from helpers import rows_of

from distsim import exchanges
from distsim.errors import ConfigError
from distsim.exchanges import MAX_PARAMS, MAX_WORKERS
from distsim.schedule import Op, Source

STRATEGIES = list(exchanges.STRATEGIES)


def some_params(n: int) -> list[int]:
    """Parameter counts that n divides, that it does not, fewer than n, and none."""
    return sorted({0, 1, n - 1, n, n + 1, 2 * n + 1, 97, 12 * n})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("n", [*range(1, 34), 64, 100])
def test_rows_are_those_of_the_closed_forms(strategy: str, n: int) -> None:
    for p in some_params(n) if n < 64 else (n - 1, 2 * n + 1):
        exchange = exchanges.build(strategy, n, p)
        counted, wanted = observed(exchange), expected(strategy, n, p)
        assert counted.sizes == wanted.sizes, (n, p)
        assert counted.links == wanted.links, (n, p)
        assert counted.steps == wanted.steps, (n, p)
        if p >= max(n, 2):
            assert counted.waits == wanted.waits, (n, p)
        assert counted.turns == wanted.turns, (n, p)
        traffic = exchange.traffic(4)
        assert traffic.message_sizes == {4 * size: count for size, count in wanted.sizes.items()}
        assert traffic.links() == [(*pair, count, 4 * size) for pair, (count, size) in sorted(wanted.links.items())]
        assert traffic.messages == sum(wanted.sizes.values())
        assert traffic.bytes == 4 * sum(size * count for size, count in wanted.sizes.items())


@pytest.mark.parametrize("strategy", PLAIN)
@pytest.mark.parametrize("n", range(1, 34))
def test_rows_are_those_of_plain_loops(strategy: str, n: int) -> None:
    rows = rows_of(exchanges.build(strategy, n, 2 * n).gradients)
    assert sorted(rows) == sorted(PLAIN[strategy](n))


def test_every_strategy_has_an_independent_description() -> None:
    assert PLAIN.keys() | {"all-to-all", "parameter-server", "ring"} == exchanges.STRATEGIES.keys()
    assert PARTS.keys() <= PLAIN.keys()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_the_table_of_the_readme(n: int) -> None:
    """Messages and their size, for p that n divides, as numbers of the formulas alone."""
    p = 10 * n
    messages = {"all-to-all": n * (n - 1), "parameter-server": 2 * n, "ring": n * 2 * (n - 1)}
    size = {"all-to-all": p, "parameter-server": p, "ring": p // n}
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


def test_channels_are_rings_of_their_own() -> None:
    """Three channels, each a pair of rings that go opposite ways, over a block of chunks each."""
    rows = exchanges.build("ring:channels=3,bidirectional=true", 5, 300).gradients
    ring, part = np.divmod(rows.chunk, 5)
    assert rows.chunks == 30
    assert ((rows.dst - rows.src) % 5 == np.where(ring % 2, 4, 1)).all()
    for each in range(6):
        forward = exchanges.build("ring", 5, 300).gradients
        way = -1 if each % 2 else 1
        src, chunk = (way * column[ring == each] % 5 for column in (rows.src, part))
        mine = zip(rows.step[ring == each], src, chunk, strict=True)
        assert sorted(mine) == sorted(zip(forward.step, forward.src, forward.chunk, strict=True))


def test_channels_leave_nodes_by_different_ranks() -> None:
    """Four nodes of three: each channel is a ring that keeps nodes together and enters them one rank further on."""
    rows = exchanges.build("ring:channels=3,node=3", 12, 360).gradients
    for channel in range(3):
        mine = rows.chunk // 12 == channel
        after = dict(zip(rows.src[mine].tolist(), rows.dst[mine].tolist(), strict=True))
        walk = [0]
        while after[walk[-1]] != 0:
            walk.append(after[walk[-1]])
        assert sorted(walk) == list(range(12))
        crossings = [(a, b) for a, b in after.items() if a // 3 != b // 3]
        assert sorted(crossings) == [(node * 3 + (channel + 2) % 3, (node + 1) % 4 * 3 + channel) for node in range(4)]


@pytest.mark.parametrize("n", range(2, 34))
def test_no_rank_has_children_in_both_trees(n: int) -> None:
    rows = exchanges.build("double-tree", n, 2).gradients
    up = rows.op == Op.REDUCE
    inner = [set(rows.dst[up & (rows.chunk == tree)].tolist()) for tree in range(2)]
    assert not inner[0] & inner[1]
    for tree in range(2):
        mine = up & (rows.chunk == tree)
        assert len(set(rows.src[mine].tolist())) == n - 1  # everybody but the root has one parent
        assert np.bincount(rows.dst[mine]).max() <= 2  # and nobody more than two children
        down = (rows.op == Op.COPY) & (rows.chunk == tree)
        assert sorted(zip(rows.src[down], rows.dst[down], strict=True)) == sorted(
            zip(rows.dst[mine], rows.src[mine], strict=True)
        )
    assert rows.steps <= 2 * n.bit_length()


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("strategy", ["recursive-doubling", "halving-doubling"])
def test_partners_differ_in_one_bit(strategy: str, n: int) -> None:
    rows = exchanges.build(strategy, n, n).gradients
    power = n.bit_length() - 1
    distance = np.minimum(rows.step, 2 * power - 1 - rows.step) if strategy == "halving-doubling" else rows.step
    assert (rows.src ^ rows.dst == 1 << distance).all()
    assert rows.steps == (2 * power if strategy == "halving-doubling" else power)


def test_halving_halves_what_is_sent() -> None:
    rows = exchanges.build("halving-doubling", 16, 160).gradients
    assert [int((rows.step == step).sum()) // 16 for step in range(8)] == [8, 4, 2, 1, 1, 2, 4, 8]


def test_a_torus_talks_to_neighbours() -> None:
    rows = exchanges.build("torus:rows=3", 12, 12).gradients
    (row_a, column_a), (row_b, column_b) = np.divmod(rows.src, 4), np.divmod(rows.dst, 4)
    along_row = (row_a == row_b) & ((column_a + 1) % 4 == column_b)
    along_column = (column_a == column_b) & ((row_a + 1) % 3 == row_b)
    assert (along_row ^ along_column).all()
    assert rows.steps == 2 * (3 + 2)


def test_hierarchical_crosses_nodes_among_equals_and_with_little() -> None:
    for across in ("ring", "halving-doubling"):
        exchange = exchanges.build(f"hierarchical:node=4,across={across}", 16, 1600)
        rows = exchange.gradients
        crosses = rows.src // 4 != rows.dst // 4
        assert (rows.src % 4 == rows.dst % 4)[crosses].all()
        assert int(rows.elements()[crosses].sum()) == 4 * 4 * 2 * 3 * 100  # 4 rings of 4 ranks: 2(N - 1) chunks a rank


def test_shards_go_to_their_servers() -> None:
    apart = exchanges.build("parameter-server:servers=3", 4, 31)
    assert apart.parameters is not None
    assert (apart.ranks, apart.workers, apart.updates().tolist()) == (7, 4, [False] * 4 + [True] * 3)
    assert (apart.gradients.dst == 4 + apart.gradients.chunk).all()
    assert apart.traffic(1).message_sizes == {10: 16, 11: 8}
    among = exchanges.build("parameter-server:servers=2,placement=colocated", 4, 31)
    assert (among.ranks, among.updates().tolist()) == (4, [True, False, True, False])  # evenly spread
    assert among.gradients.rows == 2 * 3
    assert among.parameters is not None and (among.parameters.src == 2 * among.parameters.chunk).all()


def test_all_to_all_goes_in_shifts() -> None:
    """No two neighbouring rows meet at a sender or receiver, so that first come, first served wastes no link."""
    rows = exchanges.build("all-to-all", 5, 1).gradients
    for first in range(0, rows.rows, 5):
        shift = slice(first, first + 5)
        assert sorted(rows.src[shift].tolist()) == sorted(rows.dst[shift].tolist()) == [*range(5)]
    assert (rows.source == Source.INPUT).all()


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "parameter-server"])
def test_one_rank_sends_nothing(strategy: str) -> None:
    exchange = exchanges.build(strategy, 1, 9)
    assert (exchange.ranks, exchange.gradients.rows, exchange.gradients.steps) == (1, 0, 0)


@pytest.mark.parametrize(
    ("strategy", "workers", "params", "message"),
    [
        ("rign", 2, 2, "unknown strategy 'rign'; did you mean 'ring'\\?"),
        ("all_to_all", 2, 2, "unknown strategy 'all_to_all'; did you mean 'all-to-all'\\?"),
        ("Parameter-Server", 2, 2, "did you mean 'parameter-server'\\?"),
        ("xyz", 2, 2, "unknown strategy 'xyz'; valid: all-to-all, direct, .*, torus, tree"),
        ("ring", 0, 2, "workers must be at least 1, not 0"),
        ("ring", -3, 2, "workers must be at least 1, not -3"),
        ("ring", MAX_WORKERS + 1, 2, f"at most {MAX_WORKERS} workers, not {MAX_WORKERS + 1}: .* memory"),
        ("parameter-server", 10**6, 2, "at most 4096 workers"),
        ("ring", 2, -1, "the parameter count cannot be negative, but is -1"),
        ("all-to-all", 2, MAX_PARAMS + 1, "at most 140737488355328 parameters"),
        ("ring", 2, 10**30, "at most 140737488355328 parameters"),
        ("ring:", 2, 2, "'ring:': expected KEY=VALUE, not '', as in ring:segments=2"),
        ("ring:channels", 2, 2, "expected KEY=VALUE, not 'channels'"),
        ("ring:channels=2,", 2, 2, "expected KEY=VALUE, not ''"),
        ("ring:chanels=2", 2, 2, "ring has no option 'chanels'; did you mean 'channels'\\?"),
        ("all-to-all:radix=2", 2, 2, "all-to-all has no option 'radix'; valid: segments"),
        ("tree:radix=2,radix=3", 2, 2, "radix is given twice"),
        ("ring:channels=two", 2, 2, "ring: channels must be a whole number from 1 to 4096, not 'two'"),
        ("ring:channels=0", 2, 2, "ring: channels must be a whole number from 1 to 4096, not '0'"),
        ("ring:channels=5000", 2, 2, "channels must be a whole number from 1 to 4096, not '5000'"),
        ("ring:segments=9999999999", 2, 2, "segments must be a whole number from 1 to 4096, not '9999999999'"),
        ("ring:bidirectional=yes", 2, 2, "ring: bidirectional must be true or false, not 'yes'"),
        ("parameter-server:placement=dedicate", 2, 2, "placement cannot be 'dedicate'; did you mean 'dedicated'\\?"),
        ("parameter-server:servers=3,placement=colocated", 2, 2, "colocated servers are among the workers, so 2 at"),
        ("tree:radix=1", 2, 2, "radix=1: a tree's radix is at least 2"),
        ("hierarchical:node=8", 12, 2, "node=8 does not divide 12 workers; use one of: 1, 2, 3, 4, 6, 12"),
        ("torus:rows=5", 12, 2, "rows=5 does not divide 12 workers; use one of: 1, 2, 3, 4, 6, 12"),
        ("ring:node=5", 12, 2, "node=5 does not divide 12 workers"),
        ("ring:channels=64", 4096, 2, "ring:channels=64 among 4096 workers has about 2,1.* transfers; 67,108,864 fit"),
        ("ring:channels=4096", 4096, 2, "transfers; 67,108,864 fit in memory"),
        ("all-to-all:segments=4096", 4096, 2, "transfers; 67,108,864 fit in memory"),
    ],
)
def test_wrong_requests_are_refused(strategy: str, workers: int, params: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        exchanges.build(strategy, workers, params)


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("ring", "ring"),
        ("ring:channels=1,bidirectional=false,segments=1", "ring"),
        ("ring:segments=2,bidirectional=true,channels=02", "ring:channels=2,bidirectional=true,segments=2"),
        ("parameter-server:placement=dedicated,servers=2", "parameter-server:servers=2"),
        ("hierarchical:across=halving-doubling,inside=direct,node=2", "hierarchical:node=2,across=halving-doubling"),
    ],
)
def test_specs_have_one_canonical_form(given: str, canonical: str) -> None:
    exchange = exchanges.build(given, 4, 9)
    assert exchange.strategy == canonical == str(exchanges.parse(given)) == str(exchanges.parse(canonical))
    assert exchange.digest() == exchanges.build(canonical, 4, 9).digest()


def test_the_largest_counts_do_not_overflow() -> None:
    exchange = exchanges.build("parameter-server", MAX_WORKERS, MAX_PARAMS)
    traffic = exchange.traffic(8)
    assert int(traffic.received_bytes()[-1]) == MAX_WORKERS * MAX_PARAMS * 8 == 2**62
    assert traffic.bytes == 2**63


def test_counts_may_be_numpys_integers_but_not_fractions() -> None:
    same = exchanges.build("ring", np.int64(3), np.int32(12))  # type: ignore[arg-type]
    assert same.digest() == exchanges.build("ring", 3, 12).digest()
    with pytest.raises(ConfigError, match="whole numbers"):
        exchanges.build("ring", 3, 12.0)  # type: ignore[arg-type]
