"""Every algorithm for every collective: proven, counted, timed, and as symmetric as it says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from closed_forms import fair_time_s, pieces
from helpers import Row, rows_of

from distsim import collectives, exchanges
from distsim.check import check
from distsim.cluster import ideal
from distsim.errors import ConfigError, ScheduleError
from distsim.exchanges import ALGORITHMS, MAX_PARAMS
from distsim.formulas import FORMULAS
from distsim.lower import Posting
from distsim.schedule import Exchange, Schedule
from distsim.step import simulate

PERSONALISED = "personalised-all-to-all"
ALL = [(collective, strategy) for collective, strategies in ALGORITHMS.items() for strategy in strategies]
OTHERS = [(collective, strategy) for collective, strategy in ALL if collective != "all-reduce"]
RANKS = [*range(1, 34), 64, 100, 128]

OPTIONS = {
    "all-to-all": ["segments=3"],
    "bruck": ["segments=2"],
    "chain": ["segments=4"],
    "direct": ["segments=3"],
    "double-tree": ["segments=4"],
    "halving-doubling": ["segments=2"],
    "hierarchical": ["node=1", "node=3", "node=4,across=halving-doubling", "inside=ring,segments=2"],
    "pairwise": ["segments=2"],
    "parameter-server": ["servers=3", "servers=2,placement=colocated", "placement=colocated", "servers=4,segments=3"],
    "recursive-doubling": ["segments=2"],
    "ring": ["channels=3", "bidirectional=true", "channels=4,bidirectional=true,node=4", "node=2", "segments=3"],
    "torus": ["rows=1", "rows=3", "segments=2"],
    "tree": ["radix=3", "radix=5,segments=3", "radix=100"],
}


def some_params(n: int) -> list[int]:
    """None, fewer than n, more, so many that n divides them, so many that it does not."""
    return sorted({0, 1, n - 1, 2 * n + 1, 12 * n} if n < 34 else {n - 1, 2 * n + 1})


def proves(spec: str, n: int, collective: str) -> None:
    limit = exchanges.COLLECTIVES[collective].max_workers
    for p in some_params(n) if limit is None or n < 34 else (n + 1,):
        exchange = exchanges.build(spec, n, p, collective)
        assert (exchange.strategy, exchange.collective, exchange.workers, exchange.params) == (spec, collective, n, p)
        check(exchange)


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize(("collective", "strategy"), OTHERS)
def test_every_algorithm_is_right(collective: str, strategy: str, n: int) -> None:
    proves(strategy, n, collective)


@pytest.mark.parametrize(
    ("collective", "strategy", "options"),
    [(collective, strategy, options) for collective, strategy in ALL for options in OPTIONS[strategy]],
)
def test_every_option_is_right(collective: str, strategy: str, options: str) -> None:
    proven = 0
    for n in [*range(1, 17), 24, 32, 33, 64, 100]:
        if collective == PERSONALISED and n > 33:
            continue
        try:
            proves(f"{strategy}:{options}", n, collective)
            proven += 1
        except ConfigError as error:  # what does not fit says so
            assert "does not divide" in str(error) or "colocated servers" in str(error)
    assert proven >= 6


def test_every_strategy_is_tried_with_options() -> None:
    assert OPTIONS.keys() == set(itertools.chain(*ALGORITHMS.values()))


def test_there_is_a_choice_for_every_collective() -> None:
    assert ALGORITHMS.keys() == collectives.COLLECTIVES.keys()
    assert all(len(strategies) >= 2 for strategies in ALGORITHMS.values())


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_definitions_are_those_of_the_words(n: int, blocks: int) -> None:
    """Chunk by chunk, in plain loops: who contributes, and who must hold."""
    part = [[rank == chunk % n for chunk in range(n * blocks)] for rank in range(n)]
    root = [[rank == 0] * n * blocks for rank in range(n)]
    every = [[True] * n * blocks for _ in range(n)]
    wanted = {
        "all-reduce": (every, every),
        "reduce-scatter": (every, part),
        "all-gather": (part, every),
        "broadcast": (root, every),
        "reduce": (every, root),
    }
    for name, (contributes, must_hold) in wanted.items():
        collective = collectives.COLLECTIVES[name]
        assert collective.contributes(n, n * blocks).tolist() == contributes, name
        assert collective.must_hold(n, n * blocks).tolist() == must_hold, name
    personal = collectives.COLLECTIVES[PERSONALISED]
    has, gets = personal.contributes(n, n * n * blocks), personal.must_hold(n, n * n * blocks)
    for block, sender, receiver, rank in itertools.product(range(blocks), *[range(n)] * 3):
        chunk = block * n * n + sender * n + receiver
        assert has[rank, chunk] == (rank == sender)
        assert gets[rank, chunk] == (rank == receiver)


@pytest.mark.parametrize("name", ["reduce-scatter", "all-gather", "broadcast", "reduce", "all-reduce"])
def test_definitions_take_no_memory(name: str) -> None:
    """For 131,072 ranks the flags would be 17 GB each."""
    n = 2**17
    collective = collectives.COLLECTIVES[name]
    for flags in (collective.contributes(n, n), collective.must_hold(n, n)):
        assert flags.shape == (n, n)
        assert flags.base is not None and not flags.flags.writeable


def test_bus_factors_are_those_of_nccl_tests() -> None:
    """Its PERFORMANCE.md, worked out for 8 ranks."""
    known = {"all-reduce": 1.75, "reduce-scatter": 0.875, "all-gather": 0.875, PERSONALISED: 0.875}
    assert {name: exchanges.bus_factor(name, 8) for name in ALGORITHMS} == known | {"broadcast": 1.0, "reduce": 1.0}
    with pytest.raises(ConfigError, match="unknown collective 'allreduce'; did you mean 'all-reduce'"):
        exchanges.bus_factor("allreduce", 8)


def test_sizes_are_those_of_the_larger_buffer() -> None:
    """12 elements of each rank's larger buffer: what goes out of and into one rank where everything is direct."""
    sent = {
        name: exchanges.build("direct", 4, 12, name).traffic(1).sent_bytes().tolist()
        for name in ("reduce-scatter", "all-gather", PERSONALISED)
    }
    assert sent == {"reduce-scatter": [9] * 4, "all-gather": [9] * 4, PERSONALISED: [9] * 4}
    exchange = exchanges.build("direct", 4, 12, PERSONALISED)
    assert (exchange.params, exchange.gradients.params) == (12, 48)
    for rank in range(4):
        owns = exchange.gradients.contributes[rank]
        assert exchange.gradients.chunk_elements[owns].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("collective", "strategy"), ALL)
def test_messages_are_those_of_the_formulas(collective: str, strategy: str) -> None:
    formula = FORMULAS[collective][strategy]
    for n in (*range(1, 34), 64):
        traffic = exchanges.build(strategy, n, 840 * n, collective).traffic(1)  # 840 is divided by 1 to 8
        assert traffic.messages == formula.messages(n), n
        assert max(traffic.message_sizes, default=0) == formula.largest_elements(n, 840 * n), n
        assert exchanges.build(strategy, n, 12 * n + 5, collective).traffic(1).messages == formula.messages(n), n


@pytest.mark.parametrize(("collective", "strategy"), ALL)
def test_times_are_those_of_the_formulas(collective: str, strategy: str) -> None:
    """On an ideal switch, against a fluid simulation that knows rows and links, and no strategy."""
    formula = FORMULAS[collective][strategy]
    held = 0
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16):
        p = 6 * n
        wanted = formula.time_s(n, 4 * p, 3.0, 2.0)
        if wanted is not None:
            held += n > 1
            exchange = exchanges.build(strategy, n, p, collective)
            parts = (fair_time_s(schedule, 4, 3.0, 2.0, formula.posting) for schedule in exchange.schedules())
            time_s = sum(parts)
            assert time_s == pytest.approx(wanted, rel=1e-9), n
    assert held >= 3


def test_channels_change_messages_but_not_the_rounds_of_a_ring() -> None:
    """In rounds they take the time of one ring; eager, links stay busy while messages of other rings arrive."""
    ring = FORMULAS["all-reduce"]["ring"]
    a_s, B_Bps, size = 5e-6, 12.5e9, 100_000  # of a message, which flows for 8 us
    for n, spec, rings in ((4, "ring:channels=3", 3), (5, "ring:channels=2,bidirectional=true", 4)):
        exchange = exchanges.build(spec, n, rings * n * size // 4)
        assert exchange.traffic(1).messages == rings * ring.messages(n)
        in_rounds_s = ring.time_s(n, rings * n * size, a_s, B_Bps)
        eager_s = 2 * (n - 1) * rings * size / B_Bps + a_s
        assert fair_time_s(exchange.gradients, 4, a_s, B_Bps, "rounds") == pytest.approx(in_rounds_s, rel=1e-9)
        assert simulate(exchange, ideal(n), posting="rounds").time_s == pytest.approx(in_rounds_s, rel=1e-9)
        assert fair_time_s(exchange.gradients, 4, a_s, B_Bps) == pytest.approx(eager_s, rel=1e-9)
        assert simulate(exchange, ideal(n)).time_s == pytest.approx(eager_s, rel=1e-9)


@pytest.mark.parametrize(("collective", "strategy"), ALL)
@pytest.mark.parametrize("posting", ["eager", "rounds"])
def test_times_without_formulas_are_those_of_the_fluid(collective: str, strategy: str, posting: Posting) -> None:
    """Engine and naive simulation agree also where no closed form is known."""
    for n, segments in ((3, 2), (5, 1), (6, 1), (8, 2)):
        exchange = exchanges.build(f"{strategy}:segments={segments}", n, 3000 * n + 7, collective)
        cluster = ideal(exchange.ranks)
        wanted = sum(fair_time_s(schedule, 4, 5e-6, 12.5e9, posting) for schedule in exchange.schedules())
        assert simulate(exchange, cluster, posting=posting).time_s == pytest.approx(wanted, rel=1e-9), n


SYMMETRIC = [
    *ALL,
    ("all-reduce", "ring:channels=2,bidirectional=true"),
    ("all-reduce", "ring:channels=2,node=2"),
    ("all-gather", "ring:channels=3,segments=2"),
    ("reduce-scatter", "hierarchical:node=2,across=halving-doubling"),
    ("all-reduce", "hierarchical:node=2,inside=ring"),
    ("all-reduce", "halving-doubling:segments=2"),
    ("all-reduce", "torus:rows=2,segments=3"),
]
NONE_PROPOSED = {"bruck", "chain", "double-tree", "parameter-server", "pairwise", "tree"}


@pytest.mark.parametrize(("collective", "spec"), SYMMETRIC)
def test_rows_are_as_symmetric_as_is_proposed(collective: str, spec: str) -> None:
    """The rows of rank 0's unit, moved by each element of the group, are all rows; so are all rows, moved."""
    name = spec.partition(":")[0]
    proposed = 0
    for n in (1, 2, 3, 4, 6, 8, 12, 16, 20):
        try:
            symmetry = exchanges.symmetry_of(spec, n, collective)
        except ConfigError:  # nodes of 2 in an odd number of ranks
            continue
        if symmetry is None:
            continue
        proposed += n > 1
        schedule = exchanges.build(spec, n, 30 * n, collective).gradients
        every = sorted(rows_of(schedule))
        first = rows_of(exchanges.rows_of(spec, n, 30 * n, np.arange(symmetry.unit), collective))
        moved = []
        for k in range(symmetry.elements):
            copies = [
                row._replace(
                    src=int(symmetry.rank(k, row.src)),
                    dst=int(symmetry.rank(k, row.dst)),
                    chunk=int(symmetry.chunk(k, row.chunk)),
                )
                for row in first
            ]
            moved += copies
        assert sorted(moved) == every, n
        chunks = np.arange(schedule.chunks)
        for k in range(symmetry.elements):  # what is there before and after moves with the rows, and sizes agree
            ranks = symmetry.rank(k, np.arange(n))
            assert sorted(ranks.tolist()) == list(range(n))
            where = symmetry.chunk(k, chunks)
            assert (schedule.contributes[ranks][:, where] == schedule.contributes).all()
            assert (schedule.must_hold[ranks][:, where] == schedule.must_hold).all()
    assert (proposed > 2) == (name not in NONE_PROPOSED and (collective, name) not in PROPOSES_NOTHING)


def messages_of(schedule: Schedule) -> list[list[Row]]:
    """Rows by the messages in which they travel."""
    rows = rows_of(schedule)
    return [[rows[i] for i in piece] for piece in pieces(rows, schedule.coalesced)]


PROPOSES_NOTHING = {("broadcast", "direct"), ("reduce", "direct"), (PERSONALISED, "direct")}


@pytest.mark.parametrize(("collective", "strategy"), ALL)
def test_rows_of_some_ranks_are_those_in_the_whole_table(collective: str, strategy: str) -> None:
    for n, spec in itertools.product((1, 2, 5, 6, 8, 13), (strategy, f"{strategy}:segments=2")):
        if strategy == "parameter-server":
            with pytest.raises(ConfigError, match="build it whole"):
                exchanges.rows_of(spec, n, 4 * n, [0], collective)
            continue
        whole = exchanges.build(spec, n, 4 * n + 1, collective).gradients
        for sources in ([0], [n - 1], list(range(0, n, 2)), list(range(n))):
            part = exchanges.rows_of(spec, n, 4 * n + 1, sources, collective)
            assert rows_of(part) == [row for row in rows_of(whole) if row.src in sources]
            assert messages_of(part) == [each for each in messages_of(whole) if each[0].src in sources]
            assert (part.chunk_elements == whole.chunk_elements).all()
            assert (part.contributes == whole.contributes).all()
            assert (part.must_hold == whole.must_hold).all()


@pytest.mark.parametrize("strategy", [name for name in ALGORITHMS["all-reduce"] if name != "parameter-server"])
def test_parts_of_schedules_that_are_too_large_to_build(strategy: str) -> None:
    part = exchanges.rows_of(strategy, 2**17, 2**30, [0, 77, 2**17 - 1])
    assert set(part.src.tolist()) <= {0, 77, 2**17 - 1}
    assert part.rows
    assert part.contributes.shape == (2**17, part.chunks)


def test_parts_of_other_collectives_keep_their_flags_small() -> None:
    part = exchanges.rows_of("ring:segments=2", 2**17, 2**30, [3], "reduce-scatter")
    assert part.rows == 2 * (2**17 - 1)
    assert part.must_hold.shape == (2**17, 2**18)
    assert [bool(part.must_hold[rank, 2**17 + 3]) for rank in (2, 3)] == [False, True]


def test_sources_are_ranks() -> None:
    with pytest.raises(ConfigError, match=r"sources must be ranks from 0 to 3, not 2\.\.4"):
        exchanges.rows_of("ring", 4, 4, [4, 2])
    with pytest.raises(ConfigError, match="at most 2147483647 workers"):
        exchanges.rows_of("ring", 2**31, 4, [0])


def test_a_personalised_all_to_all_has_a_limit() -> None:
    for strategy in ALGORITHMS[PERSONALISED]:
        exchange = exchanges.build(strategy, 256, MAX_PARAMS, PERSONALISED)
        assert exchange.params == MAX_PARAMS
    with pytest.raises(ConfigError, match=f"at most 256 workers for {PERSONALISED}, not 257: .* memory"):
        exchanges.build("direct", 257, 5, PERSONALISED)


def test_unknown_collectives_and_algorithms_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown collective 'broadcas'; did you mean 'broadcast'"):
        exchanges.build("tree", 4, 4, "broadcas")
    with pytest.raises(ConfigError, match="unknown strategy 'rign'; did you mean 'ring'"):
        exchanges.build("rign", 4, 4, "all-gather")
    with pytest.raises(ConfigError, match=r"torus does all-reduce, .*, not broadcast; valid for broadcast: chain,"):
        exchanges.build("torus", 4, 4, "broadcast")


def test_the_digest_knows_the_collective() -> None:
    gather = exchanges.build("direct", 1, 4, "all-gather")
    assert gather.digest() != replace(gather, collective="reduce-scatter").digest()


GATHER = exchanges.build("ring", 3, 7, "all-gather")
SCATTER = exchanges.build("ring", 3, 7, "reduce-scatter")
SERVER = exchanges.build("parameter-server", 3, 7)


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (replace(GATHER, collective="broadcast"), "in broadcast of 3 ranks, rank 0 does contribute to chunk 1"),
        (replace(GATHER, collective="reduce-scatter"), "in reduce-scatter .* rank 0 does contribute to chunk 1"),
        (replace(SCATTER, collective="reduce"), "in reduce of 3 ranks, rank 0 does have to hold chunk 1"),
        (
            replace(exchanges.build("ring", 3, 7), collective="reduce-scatter"),
            "in reduce-scatter of 3 ranks, rank 0 does not have to hold chunk 1",
        ),
        (replace(GATHER, workers=2), "all-gather of 2 workers goes among 3 ranks"),
        (replace(GATHER, parameters=GATHER.gradients), "all-gather is no training step: it shares no parameters"),
        (replace(SCATTER, collective="all-gather"), "in all-gather of 3 ranks, rank 0 does not contribute to chunk 1"),
        (
            replace(SCATTER, gradients=replace(SCATTER.gradients, op=1 - SCATTER.gradients.op)),
            "ends with a wrong chunk",
        ),
    ],
)
def test_what_is_not_the_collective_is_refused(exchange: Exchange, message: str) -> None:
    check(GATHER)
    check(SCATTER)
    with pytest.raises(ScheduleError, match=message):
        check(exchange)
