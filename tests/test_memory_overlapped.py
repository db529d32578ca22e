"""The exact planner with overlapping copies: solved instances, brute force, the search without its short cuts."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracles_async import Problem

from distsim.compiled import call
from distsim.errors import ConfigError
from distsim.memory import exact, overlapped
from distsim.memory.chain import Chain
from distsim.memory.overlapped import front, least_budget, optimal
from distsim.memory.overlapped_bounds import at_moments
from distsim.memory.overlapped_search import search
from distsim.memory.plan import InfeasibleBudget
from distsim.memory.replay import replay
from distsim.memory.simple import store_all

DUPLEX: tuple[Literal["full", "half"], ...] = ("full", "half")

# Solved elsewhere: shared/examples/memory/chain_offload_async.json of the issue that asked for this planner.
SOLVED: dict[str, dict[str, Any]] = {
    "O01": {
        "size": [4, 1, 5, 5, 4, 3],
        "fwd": [6, 6, 12, 7, 3],
        "bwd": [12, 14, 18, 9, 7],
        "write": [1, 5, 5, 4, 3],
        "read": [1, 5, 5, 4, 3],
        "full": {19: 105, 20: 99, 21: 99, 23: 94, 24: 94, 25: 94, 26: 94},
        "half": {19: 105, 20: 99, 21: 99, 23: 94, 24: 94, 25: 94, 26: 94},
    },
    "O02": {
        "size": [5, 1, 2, 1, 8, 5],
        "fwd": [10, 10, 12, 9, 7],
        "bwd": [6, 8, 4, 15, 8],
        "write": [2, 4, 2, 16, 10],
        "read": [2, 4, 2, 16, 10],
        "full": {26: 91, 27: 89, 28: 89, 29: 89, 30: 89},
        "half": {26: 91, 27: 89, 28: 89, 29: 89, 30: 89},
    },
}


def chain_of(numbers: dict[str, Any], needs: Any = "input") -> Chain:
    columns: Any = {name: np.array(numbers[name]) for name in ("size", "write", "read")}
    return Chain(forward=np.array(numbers["fwd"]), backward=np.array(numbers["bwd"]), needs=needs, **columns)


def problem(numbers: dict[str, Any], needs: str, budget: int, shared: bool) -> Problem:
    columns: Any = {name: tuple(numbers[name]) for name in ("size", "fwd", "bwd", "write", "read")}
    return Problem(**columns, needs=needs, budget=budget, shared=shared)


@st.composite
def numbers_of(draw: st.DrawFn, layers: st.SearchStrategy[int], most: int) -> dict[str, list[int]]:
    count = draw(layers)
    times = st.lists(st.integers(1, most), min_size=count, max_size=count)
    found = {name: draw(times) for name in ("fwd", "bwd", "write", "read")}
    return found | {"size": draw(st.lists(st.integers(1, 5), min_size=count + 1, max_size=count + 1))}


@pytest.mark.parametrize("duplex", DUPLEX)
@pytest.mark.parametrize("case", SOLVED)
def test_solved_instances(case: str, duplex: Literal["full", "half"]) -> None:
    chain = chain_of(SOLVED[case])
    for budget, time in SOLVED[case][duplex].items():
        result = replay(chain, optimal(chain, budget, duplex), budget, duplex)
        assert (result.time, result.peak_memory <= budget) == (time, True)


@pytest.mark.parametrize("duplex", DUPLEX)
@pytest.mark.parametrize("case", SOLVED)
def test_front_of_solved_instances(case: str, duplex: Literal["full", "half"]) -> None:
    chain, solved = chain_of(SOLVED[case]), SOLVED[case][duplex]
    points = front(chain, duplex)
    assert points[0].budget == min(solved) == least_budget(chain)
    for budget, time in solved.items():
        assert [point.time for point in points if point.budget <= budget][-1] == time
    for point in points:
        result = replay(chain, point.plan, point.budget, duplex)
        assert (result.time, result.peak_memory) == (point.time, point.budget)


@settings(max_examples=40)
@given(
    numbers_of(st.integers(1, 3), 5), st.sampled_from(["input", "output", "both"]), st.booleans(), st.integers(-1, 4)
)
def test_equals_brute_force(numbers: dict[str, list[int]], needs: str, shared: bool, above: int) -> None:
    chain, duplex = chain_of(numbers, needs), DUPLEX[shared]
    budget = int(least_budget(chain)) + above
    expected = problem(numbers, needs, budget, shared).least_makespan()
    if expected is None:
        with pytest.raises(InfeasibleBudget):
            optimal(chain, budget, duplex)
    else:
        assert above >= 0
        assert replay(chain, optimal(chain, budget, duplex), budget, duplex).time == expected


# Least time with engines of their own and with a shared one, at the least budget or a little more.
FOUR_LAYERS: list[tuple[dict[str, list[int]], int, int, int]] = [
    # a_2 is computed again where nothing has to wait for it, to be written and read later
    (
        {
            "size": [1, 2, 2, 3, 1],
            "fwd": [4, 1, 2, 1],
            "bwd": [2, 2, 3, 2],
            "write": [6, 5, 8, 5],
            "read": [6, 8, 3, 2],
        },
        *(8, 26, 26),
    ),
    # the shared engine is the bottleneck
    (
        {
            "size": [1, 1, 5, 1, 3],
            "fwd": [3, 2, 2, 4],
            "bwd": [3, 1, 1, 6],
            "write": [7, 6, 8, 2],
            "read": [1, 5, 1, 3],
        },
        *(12, 24, 25),
    ),
]


@pytest.mark.parametrize(("numbers", "budget", "full", "half"), FOUR_LAYERS)
def test_equals_brute_force_with_four_layers(numbers: dict[str, list[int]], budget: int, full: int, half: int) -> None:
    chain = chain_of(numbers)
    for duplex, time in zip(DUPLEX, (full, half), strict=True):
        assert problem(numbers, "input", budget, duplex == "half").least_makespan() == time
        assert replay(chain, optimal(chain, budget, duplex), budget, duplex).time == time


@settings(max_examples=40)
@given(numbers_of(st.integers(1, 3), 4), st.booleans())
def test_front_has_every_step(numbers: dict[str, list[int]], shared: bool) -> None:
    """At every whole budget up to the one of keeping everything, and below the least, where there is nothing."""
    chain, duplex = chain_of(numbers), DUPLEX[shared]
    points = front(chain, duplex)
    highest = int(replay(chain, store_all(chain)).peak_memory)
    steps: dict[int, int] = {}
    for budget in range(int(points[0].budget) - 1, highest + 1):
        time = problem(numbers, "input", budget, shared).least_makespan()
        if time is not None and time not in steps.values():
            steps[budget] = time
    assert {int(point.budget): int(point.time) for point in points} == steps


def makespan(chain: Chain, budget: float, half: bool, plain: bool) -> float:
    tables = overlapped._tables(chain, budget, half)
    moments = call(at_moments, 0, tables, 10**8, compiled=True)
    room = overlapped._room(chain.layers, 1 << 20)
    found, _, made, _ = call(search, 0, tables, moments, *room, 0.0, plain, compiled=True)
    assert made > 0
    return float(found)


@settings(max_examples=60)
@given(
    numbers_of(st.integers(4, 5), 12),
    st.sampled_from(["input", "output", "both"]),
    st.booleans(),
    st.integers(0, 6),
    st.sampled_from([1, 2]),
)
def test_short_cuts_lose_nothing(
    numbers: dict[str, list[int]], needs: str, half: bool, above: int, copies: int
) -> None:
    """With bounds, with what is wasteful left out and with what is behind left out: the same as without."""
    if above % 2:
        numbers = numbers | {"write": [copies * size for size in numbers["size"][1:]]}
        numbers["read"] = numbers["write"]
    chain = chain_of(numbers, needs)
    budget = least_budget(chain) + above
    assert makespan(chain, budget, half, False) == makespan(chain, budget, half, True)


def test_writes_and_reads_of_a_shared_engine_never_overlap() -> None:
    """Were a write allowed to start during a read, 71 would do."""
    numbers = {
        "size": [3, 2, 4, 4, 3, 4, 2],
        "fwd": [6, 4, 2, 5, 4, 1],
        "bwd": [6, 1, 4, 4, 4, 5],
        "write": [5, 4, 8, 8, 5, 8],
        "read": [8, 7, 5, 3, 4, 1],
    }
    chain = chain_of(numbers)
    budget = least_budget(chain)
    assert makespan(chain, budget, True, True) == makespan(chain, budget, True, False) == 73
    assert makespan(chain, budget, False, False) == 71


@pytest.mark.parametrize("seed", range(6))
def test_more_engines_are_never_slower(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    size = numbers.integers(1, 9, 8)
    columns = {"fwd": numbers.integers(1, 13, 7), "bwd": numbers.integers(2, 21, 7), "size": size}
    chain = chain_of(columns | {"write": size[1:], "read": size[1:]})
    budget = least_budget(chain) + seed
    one = replay(chain, exact.optimal(chain, budget), budget).time
    half, full = (replay(chain, optimal(chain, budget, each), budget, each).time for each in ("half", "full"))
    assert chain.plain_time <= full <= half <= one
    assert least_budget(chain) == exact.least_budget(chain)


def test_times_that_are_no_whole_numbers() -> None:
    whole = chain_of(SOLVED["O01"])
    columns: Any = {name: getattr(whole, name) * 1e-3 / 3 for name in ("forward", "backward", "write", "read")}
    chain = Chain(size=whole.size * 2**20, **columns)
    points, expected = front(chain, "full"), front(whole, "full")
    assert [point.budget for point in points] == [point.budget * 2**20 for point in expected]
    assert [point.time for point in points] == pytest.approx([point.time * 1e-3 / 3 for point in expected], rel=1e-12)


def test_copies_that_take_no_time_are_as_good_as_memory() -> None:
    numbers = SOLVED["O01"] | {"write": [0] * 5, "read": [0] * 5}
    chain = chain_of(numbers)
    points = front(chain, "half")
    assert [(point.budget, point.time) for point in points] == [(19.0, chain.plain_time)]


def test_temporaries_count() -> None:
    chain = chain_of(SOLVED["O02"])
    columns: Any = {name: getattr(chain, name) for name in ("forward", "backward", "size", "write", "read")}
    larger = Chain(**columns, backward_tmp=np.full(5, 3.0), forward_tmp=np.zeros(5))
    assert least_budget(larger) == least_budget(chain) + 3
    result = replay(larger, optimal(larger, 29, "full"), 29, "full")
    assert result.time == SOLVED["O02"]["full"][26]


def test_budget_too_small_names_the_least() -> None:
    with pytest.raises(InfeasibleBudget, match=r"18\.5; the least that is feasible is 19") as caught:
        optimal(chain_of(SOLVED["O01"]), 18.5, "full")
    assert caught.value.least == 19


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"write": None, "read": None}, 'no times to "write" and "read"'),
        ({"saved": np.full(5, 9.0)}, "without saved intermediates"),
    ],
)
def test_chains_that_it_is_not_for(change: dict[str, Any], message: str) -> None:
    chain = chain_of(SOLVED["O01"])
    columns: Any = {name: getattr(chain, name) for name in ("forward", "backward", "size", "write", "read")}
    with pytest.raises(ConfigError, match=message):
        front(Chain(**(columns | change)), "full")


def test_too_many_layers() -> None:
    ones = np.ones(17)
    with pytest.raises(ConfigError, match=r"17 layers are too many .* at most 16"):
        optimal(Chain(forward=ones, backward=ones, size=np.ones(18), write=ones, read=ones), math.inf, "full")


def test_long_search_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlapped, "ROOM", (1 << 6,))
    chain = chain_of(SOLVED["O01"])
    with pytest.raises(ConfigError, match=r"made 64 states; it takes at least \d+") as caught:
        optimal(chain, 19, "full")
    bound = float(str(caught.value).split("at least ")[1].split(".")[0])
    assert chain.plain_time <= bound <= 105


def test_search_starts_over_with_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chain_of(SOLVED["O01"])
    monkeypatch.setattr(overlapped, "ROOM", (1 << 6, 1 << 16))
    assert replay(chain, optimal(chain, 19, "full"), 19, "full").time == 105
