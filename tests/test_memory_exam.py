"""The exam's case: closed forms against a literal walk, the mix against all subsets, operations against the engine."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsim.errors import ConfigError
from distsim.memory import lower
from distsim.memory.exam import MOST, WORDS, Convention, mixed_layers, operations, periodic

CONVENTIONS = [
    Convention.parse(",".join(words)) for count in range(6) for words in itertools.combinations(WORDS, count)
]
INPUT = -1


def walk(layers: int, every: int, convention: Convention, from_disk: frozenset[int] = frozenset()) -> tuple[int, ...]:
    """Do it: keep sets of what is in memory, count forwards, loads and loads from disk (layers counted from 1).

    Layers are handled by their own numbers, the input as -1, so that `from-zero` is no shift of anything.
    """
    first = convention.first_layer
    last = first + layers - 1
    stored = {INPUT} | {layer for layer in range(first, last + 1) if layer % every == 0}
    if not convention.last_stored:
        stored.discard(last)
    cache: set[int] = set()
    forwards = loads = disk = 0
    for layer in range(last, first - 1, -1):
        if layer - first + 1 in from_disk:
            disk += 1
            continue
        source = max(held for held in stored | cache if held <= layer)
        counted = convention.input_loads or source != INPUT
        if convention.cached and convention.loads == "stored":
            counted = counted and source not in cache
        loads += counted
        for made in range(first if source == INPUT else source + 1, layer + 1):
            forwards += 1
            if convention.cached:
                cache.add(made)
        if convention.cached:
            cache.add(source)
    return forwards, loads, disk


@pytest.mark.parametrize("convention", CONVENTIONS, ids=Convention.text)
def test_closed_forms_are_what_a_literal_walk_counts(convention: Convention) -> None:
    for layers in range(1, 61):
        for every in range(1, layers + 2):
            found = periodic(layers, every, 3.0, 5.0, convention)
            forwards, loads, _ = walk(layers, every, convention)
            assert (found.forwards, found.loads) == (forwards, loads), (layers, every)
            assert found.time_s == 3 * forwards + 5 * loads
            assert found.breakeven_loaddisk_s == float(Fraction(3 * forwards + 5 * loads, layers))


def test_the_conventions_are_all_different_and_read_back() -> None:
    assert len(set(CONVENTIONS)) == 32
    assert [Convention.parse(each.text()) for each in CONVENTIONS] == CONVENTIONS
    assert Convention() == Convention.parse("") == Convention.parse("exam")
    assert Convention.parse(" cached , free-input") == Convention(cached=True, input_loads=False)


@pytest.mark.parametrize(
    ("words", "forwards", "loads", "time_s", "breakeven_s"),
    [
        ("exam", 20, 10, 5e-7, 5e-8),
        ("from-zero", 20, 10, 5e-7, 5e-8),
        ("free-input", 20, 6, 4.6e-7, 4.6e-8),
        ("last-not-stored", 25, 10, 6e-7, 6e-8),
        ("cached", 8, 10, 2.6e-7, 2.6e-8),
        ("cached,stored-loads", 8, 3, 1.9e-7, 1.9e-8),
    ],
)
def test_the_exam_is_answered_to_the_last_digit(
    words: str, forwards: int, loads: int, time_s: float, breakeven_s: float
) -> None:
    found = periodic(10, 5, 20e-9, 10e-9, Convention.parse(words))
    assert (found.forwards, found.loads) == (forwards, loads)
    assert (found.time_s, found.breakeven_loaddisk_s) == (time_s, breakeven_s)


def test_the_mix_beats_both_at_break_even() -> None:
    found = periodic(10, 5, 20e-9, 10e-9)
    assert found.time_s == found.disk_time_s == 5e-7
    assert found.mixed_time_s == 3.8e-7  # 10 + 30 and three times 50 ns in each half
    assert found.mixed_loaddisks == 4
    assert mixed_layers(10, 5, 20e-9, 10e-9) == {3, 4, 8, 9}


@given(
    st.integers(1, 9),
    st.integers(1, 10),
    st.integers(0, 6),
    st.integers(0, 6),
    st.one_of(st.none(), st.integers(0, 40)),
    st.sampled_from(CONVENTIONS),
)
def test_the_mix_is_the_best_of_all_subsets(
    layers: int, every: int, forward: int, load: int, disk: int | None, convention: Convention
) -> None:
    found = periodic(layers, every, forward, load, convention, disk)
    pure = walk(layers, every, convention)
    loaddisk = Fraction(disk) if disk is not None else Fraction(pure[0] * forward + pure[1] * load, layers)

    def time(from_disk: frozenset[int]) -> Fraction:
        forwards, loads, disks = walk(layers, every, convention, from_disk)
        return forwards * forward + loads * load + disks * loaddisk

    best = min(
        time(frozenset(chosen))
        for count in range(layers + 1)
        for chosen in itertools.combinations(range(1, layers + 1), count)
    )
    chosen = mixed_layers(layers, every, forward, load, convention, disk)
    assert found.mixed_time_s == float(best)
    assert time(chosen) == best
    assert len(chosen) == found.mixed_loaddisks
    assert found.disk_time_s == float(layers * loaddisk)
    assert found.mixed_time_s <= min(found.time_s, found.disk_time_s)


@given(st.integers(1, 60), st.integers(1, 61), st.integers(0, 9), st.integers(0, 9))
def test_the_mix_is_strictly_better_where_layers_differ(layers: int, every: int, forward: int, load: int) -> None:
    found = periodic(layers, every, forward, load)
    differ = every > 1 and layers > 1 and forward > 0
    assert (found.mixed_time_s < found.time_s) == differ


@given(st.integers(1, 40), st.integers(1, 41), st.sampled_from(CONVENTIONS), st.booleans())
def test_the_engine_takes_the_same_time(layers: int, every: int, convention: Convention, mixed: bool) -> None:
    found = periodic(layers, every, 20e-9, 10e-9, convention)
    chosen = mixed_layers(layers, every, 20e-9, 10e-9, convention) if mixed else frozenset[int]()
    timed, waits = operations(layers, every, 20e-9, 10e-9, convention, found.loaddisk_s, chosen)
    finish = max(lower.simulate(timed, waits).finish_s.tolist(), default=0.0)
    assert finish == pytest.approx(found.mixed_time_s if mixed else found.time_s, rel=1e-12)
    kinds = [each.resource for each in timed]
    counts = walk(layers, every, convention, chosen)
    assert (kinds.count("compute"), kinds.count("memory bus"), kinds.count("disk")) == counts


def test_operations_have_the_numbers_of_the_convention() -> None:
    timed, waits = operations(2, 3, 2.0, 1.0)
    assert [each.name for each in timed] == ["loadmem input", "fwd 1", "fwd 2", "loadmem input", "fwd 1"]
    assert waits == [(0, 1), (1, 2), (2, 3), (3, 4)]
    zero = operations(2, 3, 2.0, 1.0, Convention(first_layer=0), 7.0, frozenset({2}))[0]
    assert zero == [("loaddisk 1", "disk", 7.0), ("loadmem 0", "memory bus", 1.0)]


def test_large_numbers_stay_exact() -> None:
    layers, every = 10**9 + 7, 1000
    quotient, rest = divmod(layers, every)
    found = periodic(layers, every, 1e-9, 0.0)
    assert found.forwards == quotient * every * (every - 1) // 2 + rest * (rest + 1) // 2
    assert found.time_s == found.forwards / 10**9


@pytest.mark.parametrize(
    ("layers", "every", "forward", "load", "disk", "match"),
    [
        (0, 1, 1.0, 1.0, None, "layers: expected a whole number from 1"),
        (MOST + 1, 1, 1.0, 1.0, None, "layers: expected a whole number from 1"),
        (3, 0, 1.0, 1.0, None, "period of stored layers: expected a whole number from 1"),
        (3, 1, -1.0, 1.0, None, "time of a forward: expected seconds"),
        (3, 1, 1.0, float("nan"), None, "time of a load: expected seconds"),
        (3, 1, 1.0, 1.0, float("inf"), "time of a loaddisk: expected seconds"),
    ],
)
def test_what_makes_no_sense_is_refused(
    layers: int, every: int, forward: float, load: float, disk: float | None, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        periodic(layers, every, forward, load, None, disk)
    with pytest.raises(ConfigError, match=match):
        mixed_layers(layers, every, forward, load, None, disk)
    with pytest.raises(ConfigError, match=match):
        operations(layers, every, forward, load, None, disk or 0.0)


def test_an_unknown_convention_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown convention 'free_input'; did you mean 'free-input'\?"):
        Convention.parse("cached,free_input")
