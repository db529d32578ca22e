"""The exact planner against brute force, an integer programme and solved instances: whole fronts of each model."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracles import brute_force, brute_front

from benchmarks import memory_planning
from benchmarks.checkmate import checkmate
from distsim.compiled import call
from distsim.errors import ConfigError
from distsim.memory import exact
from distsim.memory.chain import Chain
from distsim.memory.plan import InfeasibleBudget, Op
from distsim.memory.replay import replay

Front = list[tuple[float, float]]
MODELS = ("input", "output", "both", "saved")


@st.composite
def chains(draw: st.DrawFn, model: str, disk: bool = False, most: int = 5) -> Chain:
    layers = draw(st.integers(1, most))

    def column(least: int, largest: int, length: int = layers) -> list[int]:
        return draw(st.lists(st.integers(least, largest), min_size=length, max_size=length))

    size = column(1, 20, layers + 1)
    columns = {"forward": column(0, 30), "backward": column(0, 30), "size": size}
    columns |= {"forward_tmp": column(0, 4), "backward_tmp": column(0, 4)}
    if disk:
        columns |= {"write": column(0, 12), "read": column(0, 12)}
    if model == "saved":
        columns["saved"] = [a + more for a, more in zip(size[1:], column(0, 20), strict=True)]
        if disk:
            columns |= {"write_saved": column(0, 20), "read_saved": column(0, 20)}
    needs = draw(st.sampled_from(["input", "output", "both"])) if model == "saved" else model  # which is ignored
    return Chain(**{key: np.array(each, float) for key, each in columns.items()}, needs=needs)  # type: ignore[arg-type]


def checked_front(chain: Chain, offload: bool = True, rematerialize: bool = True) -> Front:
    """Return the front; each plan, replayed within its budget, takes what the planner says."""
    points = exact.front(chain, offload=offload, rematerialize=rematerialize)
    for budget, time, plan in points:
        run = replay(chain, plan, budget)
        assert (run.time, run.peak_memory) == (time, budget)
        if not rematerialize:
            assert run.forwards == chain.layers
        if not offload:
            assert run.loads == run.stores == 0
    return [(budget, time) for budget, time, _ in points]


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=60)
@given(data=st.data())
def test_whole_front_equals_brute_force(model: str, data: st.DataObject) -> None:
    chain = data.draw(chains(model, most=5 if model == "saved" else 6))
    assert checked_front(chain) == brute_front(chain)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=40)
@given(data=st.data())
def test_whole_front_with_disk_equals_brute_force(model: str, data: st.DataObject) -> None:
    chain = data.draw(chains(model, disk=True, most=2 if model == "saved" else 4))
    assert checked_front(chain) == brute_front(chain)


@pytest.mark.parametrize("seed", range(8))
def test_evenly_drawn_chains_with_disk_equal_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)  # Hypothesis draws few chains on which reads and forwards mix
    names = ("forward", "backward", "write", "read")
    columns = {name: random.integers(1, 31, 5).astype(float) for name in names}
    chain = Chain(**columns, size=random.integers(1, 21, 6).astype(float))  # type: ignore[arg-type]
    assert checked_front(chain) == brute_front(chain)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=40)
@given(data=st.data())
def test_offload_alone_equals_brute_force(model: str, data: st.DataObject) -> None:
    chain = data.draw(chains(model, disk=True, most=2 if model == "saved" else 3))
    assert checked_front(chain, rematerialize=False) == brute_front(chain, once=True)


@pytest.mark.parametrize("model", ("input", "output", "both"))
@settings(max_examples=8)
@given(data=st.data())
def test_no_slower_than_the_integer_programme_and_equal_where_that_has_passes_enough(
    model: str, data: st.DataObject
) -> None:
    chain = data.draw(chains(model, most=4))
    points = exact.front(chain)
    for budget, time, _ in (points[0], points[len(points) // 2]):
        assert checkmate(chain, budget, passes=2) == pytest.approx(time, abs=1e-6)
    assert checkmate(chain, points[0].budget - 1, passes=2) is None


# The first case of each of the solved instances that issue 5 comes with.
SOLVED: dict[str, tuple[dict[str, list[int]], Front]] = {
    "chain_remat": (
        {
            "forward": [16, 21, 13, 26, 7, 4],
            "backward": [32, 2, 58, 54, 25, 28],
            "size": [5, 19, 3, 9, 4, 16, 15],
        },
        [(52, 378), (55, 341), (56, 336), (59, 315), (68, 302), (78, 299), (87, 286)],
    ),
    "chain_rotor": (
        {
            "forward": [20, 7, 20, 2, 19, 22],
            "backward": [11, 28, 41, 26, 52, 47],
            "size": [2, 3, 3, 12, 6, 10, 9],
            "saved": [19, 14, 29, 20, 26, 17],
            "forward_tmp": [0, 0, 1, 3, 1, 3],
            "backward_tmp": [5, 0, 0, 0, 0, 0],
        },
        [
            (52, 459),
            (53, 432),
            (55, 405),
            (57, 383),
            (65, 365),
            (69, 363),
            (72, 361),
            (73, 344),
            (83, 343),
            (84, 337),
            (89, 331),
            (92, 324),
            (102, 323),
            (103, 317),
            (112, 304),
            (126, 297),
            (146, 295),
        ],
    ),
    "chain_offload_sync": (
        {
            "forward": [21, 19, 3, 20, 1, 30],
            "backward": [54, 31, 17, 36, 15, 13],
            "size": [8, 19, 18, 5, 12, 20, 16],
            "write": [19, 18, 5, 12, 20, 16],
            "read": [28, 18, 8, 12, 20, 16],
        },
        [
            (64, 344),
            (68, 327),
            (69, 320),
            (76, 303),
            (81, 300),
            (88, 299),
            (94, 284),
            (95, 282),
            (99, 281),
            (100, 279),
            (113, 263),
            (118, 260),
        ],
    ),
}


@pytest.mark.parametrize("name", SOLVED)
def test_solved_instances(name: str) -> None:
    columns, front = SOLVED[name]
    chain = Chain(**{key: np.array(each, float) for key, each in columns.items()})  # type: ignore[arg-type]
    assert checked_front(chain) == front


def twelve(seed: int, **more: str) -> Chain:
    random = np.random.default_rng(seed)
    columns = {name: random.integers(1, 31, 12).astype(float) for name in ("forward", "backward")}
    return Chain(**columns, size=random.integers(1, 21, 13).astype(float), **more)  # type: ignore[arg-type]


def test_compiled_and_interpreted_search_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = twelve(3)
    budgets = (exact.least_budget(chain), 120.0)
    plans = []
    for compiled in (True, False):
        monkeypatch.setattr(exact, "call", partial(call, compiled=compiled))
        plans.append([exact.optimal(chain, budget).text() for budget in budgets])
    assert plans[0] == plans[1]


def test_a_budget_that_is_no_breakpoint_is_not_overrun() -> None:
    chain = twelve(4)
    points = exact.front(chain)
    for one, two in pairwise(points):
        run = replay(chain, exact.optimal(chain, (one.budget + two.budget) / 2))
        assert (run.time, run.peak_memory) == (one.time, one.budget)
    assert replay(chain, exact.optimal(chain, math.inf)).time == chain.plain_time


def test_an_infeasible_budget_says_the_least_that_is_feasible() -> None:
    chain = twelve(5)
    least = exact.least_budget(chain)
    assert exact.front(chain)[0].budget == least
    assert replay(chain, exact.optimal(chain, least), least).peak_memory == least
    with pytest.raises(InfeasibleBudget, match=f"{least:,.15g}") as caught:
        exact.optimal(chain, least - 0.5)
    assert caught.value.least == least


@pytest.mark.parametrize(
    ("layers", "seed", "budget", "time"),
    [(6, 7, 84, 480), (7, 17, 73, 403), (7, 143, 70, 546), (7, 170, 71, 529), (7, 195, 100, 316)],
)
def test_layers_that_have_to_run_again_are_counted_once(layers: int, seed: int, budget: float, time: float) -> None:
    """Where two activations of one gap are missing, both need the same runs; times are those of the brute force."""
    chain = memory_planning.random_chain(layers, "saved", seed)
    assert replay(chain, exact.optimal(chain, budget), budget).time == time


def test_what_is_saved_may_be_read_back_for_its_activation_alone() -> None:
    chain = Chain(
        forward=np.array([27.0, 22, 1]),
        backward=np.array([6.0, 16, 22]),
        size=np.array([3.0, 3, 3, 3]),
        saved=np.array([8.0, 7, 7]),
        write=np.array([9.0, 16, 1]),
        read=np.array([4.0, 9, 2]),
        write_saved=np.array([12.0, 20, 4]),
        read_saved=np.array([11.0, 14, 3]),
    )
    assert checked_front(chain) == [tuple(point) for point in brute_front(chain)]


def test_fractions_that_do_not_add_up_exactly_give_no_false_points() -> None:
    third = Chain(forward=np.full(4, 0.1), backward=np.full(4, 1 / 3), size=np.full(5, 0.7))
    found = [(point.budget, point.time) for point in exact.front(third)]
    whole = Chain(forward=np.full(4, 3.0), backward=np.full(4, 10.0), size=np.full(5, 7.0))
    scaled = [(budget / 10, time / 30) for budget, time in checked_front(whole)]
    np.testing.assert_allclose(found, scaled, rtol=1e-12)


def test_a_disk_that_costs_nothing_needs_no_forward_twice() -> None:
    chain = twelve(6)
    free = Chain(forward=chain.forward, backward=chain.backward, size=chain.size, write=np.zeros(12), read=np.zeros(12))
    plan = exact.front(free)[0].plan
    assert plan.count(Op.FORWARD) == 12
    assert exact.least_budget(free, rematerialize=False) == exact.least_budget(free) <= exact.least_budget(chain)


def test_long_chains_where_the_budget_is_loose_and_a_clear_end_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forty = Chain(forward=np.arange(1, 41.0), backward=np.ones(40), size=np.ones(41))
    run = replay(forty, exact.optimal(forty, 41), 41)
    assert (run.time, run.forwards) == (forty.plain_time + 1, 41)  # all but a_1 and the a_L that nothing reads
    monkeypatch.setattr(exact, "ROOM", 256)
    monkeypatch.setattr(exact, "MOST_ROOM", 256)
    with pytest.raises(ConfigError, match=r"gave up after 256 states; .*fast planner"):
        exact.front(twelve(7))
    with pytest.raises(ConfigError, match="up to 60 layers, not 61"):
        exact.front(Chain(forward=np.ones(61), backward=np.ones(61), size=np.ones(62)))


def test_brute_force_knows_the_smallest_chain() -> None:
    one = Chain(forward=np.array([3.0]), backward=np.array([5.0]), size=np.array([1.0, 2.0]))
    assert brute_force(one) == (8.0, 5.0)  # a_0, a_1, g_1 at LOSS; then a_0, g_1, g_0
    assert brute_force(one, 4.0) is None
