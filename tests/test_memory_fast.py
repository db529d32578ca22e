"""Plans of long chains and their lower bound: between the best persistent plan, the optimum and each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracles import brute_front
from test_memory_persistent import KINDS, chains, long_chain, rotor_chain, zeros

from distsim.compiled import call
from distsim.memory import bound, exact, fast, persistent, weights
from distsim.memory.plan import InfeasibleBudget
from distsim.memory.replay import replay

OPTIMAL = [
    *((52, 459), (53, 432), (55, 405), (57, 383), (65, 365), (69, 363), (72, 361), (73, 344), (83, 343), (84, 337)),
    *((89, 331), (92, 324), (102, 323), (103, 317), (112, 304), (126, 297), (146, 295)),
]
"""Of `rotor_chain`, exact over all schedules."""


@settings(max_examples=20)
@given(chains(most=4), st.booleans())
def test_bound_optimum_fast_persistent_in_this_order(chain: Any, compiled: bool) -> None:
    points = brute_front(chain)
    for budget, time in points:
        target = time if compiled else None
        assert bound.lower_bound(chain, budget, target) <= time
        assert bound.lower_bound(chain, budget, 3 * time) <= time
        run = replay(chain, fast.plan(chain, budget), budget)
        try:
            assert time <= run.time <= replay(chain, persistent.optimal(chain, budget), budget).time
        except InfeasibleBudget as error:
            assert error.least > budget and run.time == time
    with pytest.raises(InfeasibleBudget) as caught:
        fast.plan(chain, points[0][0] - 1)
    assert caught.value.least == points[0][0]
    budget, time = points[-1]
    for enough in (budget, 2 * budget, math.inf):
        assert time == chain.plain_time == bound.lower_bound(chain, enough)


def test_a_solved_front() -> None:
    """Optimal at all budgets but one, where one more unit of time is taken; persistent plans are up to 13 % slower."""
    chain = rotor_chain()
    over = {}
    for budget, time in OPTIMAL:
        plan = fast.plan(chain, budget)
        over[budget] = replay(chain, plan, budget).time - time
        least = bound.lower_bound(chain, budget, time)
        assert time * 0.93 <= least <= time
    assert sum(over.values()) <= 1 and max(over.values()) <= 1


def test_too_small_for_any_backward_is_an_infinite_bound() -> None:
    """B_1 alone: g_1, g_0, abar_1 and a_0; of all 6 the largest is B_4's with a_3 and g_4, g_3."""
    chain = rotor_chain()
    assert chain.saved is not None
    gradients = chain.size[1:] + chain.size[:-1]
    needs = chain.size[0] + chain.saved + gradients + chain.tmp(False) + np.where(np.arange(6), chain.size[:-1], 0)
    assert bound.lower_bound(chain, float(needs.max()) - 1) == math.inf
    assert bound.lower_bound(chain, float(needs.max())) < math.inf


@pytest.mark.parametrize(
    "kind", ["input", "saved", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("output", "both"))]
)
def test_two_hundred_layers(kind: str) -> None:
    """Within the budget, never worse than persistent, and proven to be near the optimum."""
    chain = long_chain(200, kind)
    w = weights.weights(chain)
    least = call(persistent.least, 10**6, w)[0]
    total = float(w.keep.sum())
    for part, most in ((0.0, math.inf), (0.1, 0.05)):
        budget = float(least + part * (total - least) // 1)
        plan = fast.plan(chain, budget)
        run = replay(chain, plan, budget)
        slower = replay(chain, persistent.optimal(chain, budget), budget).time
        assert run.time <= slower
        least_time = bound.lower_bound(chain, budget, run.time)
        assert chain.plain_time < least_time <= run.time <= (1 + most) * least_time
        if part == 0:  # where memory is scarce, persistent plans are far from the optimum
            assert run.time < slower
    with pytest.raises(InfeasibleBudget) as caught:
        fast.plan(chain, least - 1)
    assert caught.value.least == least


@pytest.mark.parametrize("kind", KINDS)
def test_tables_say_what_plans_keep(kind: str) -> None:
    """A plan, what it keeps, and the plan that keeps this are one and the same."""
    chain = long_chain(12, kind)
    w = weights.weights(chain)
    for budget in (100, 140, 200):
        rows = persistent.rows_within(w, budget)
        assert fast.rows_of(w, fast.kept_by(w, rows)) == rows


@pytest.mark.parametrize("kind", KINDS[:3])
def test_without_sizes_nothing_runs_twice(kind: str) -> None:
    chain = zeros(3, kind)
    for budget in (0.0, math.inf):
        assert replay(chain, fast.plan(chain, budget), budget).time == bound.lower_bound(chain, budget) == 12


@settings(max_examples=40)
@given(st.integers(0, 1000), st.sampled_from(KINDS), st.sampled_from((1e-12, 1.0, 1e9)))
def test_bound_where_most_sizes_and_times_are_zero(seed: int, kind: str, scale: float) -> None:
    """Without a warning of an overflow."""
    chain = long_chain(8, kind, seed)
    rare = np.random.default_rng(seed).random((3, 9)) < 0.3
    size, saved = chain.size * rare[0] * scale, None if chain.saved is None else chain.saved * scale * rare[1, 1:]
    saved = None if saved is None else np.maximum(saved, size[1:])
    chain = replace(chain, size=size, saved=saved, forward=chain.forward * rare[2, 1:])
    least = call(persistent.least, 0, weights.weights(chain))[0]
    for budget in (least, 1.5 * least):
        time = replay(chain, fast.plan(chain, budget), budget).time
        for target in (None, time, 3 * time):
            assert bound.lower_bound(chain, budget, target) <= time


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_moments_are_a_weaker_bound(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching every third backward only; still more than nothing, and below the exact optimum."""
    chain = long_chain(10, kind)
    budget = exact.least_budget(chain, offload=False)
    time = replay(chain, exact.optimal(chain, budget, offload=False), budget).time
    found = [bound.lower_bound(chain, budget, time)]
    for most in (600.0, 250.0):
        monkeypatch.setattr(bound, "MOST_WORK", most)
        found.append(bound.lower_bound(chain, budget, time))
    assert chain.plain_time < found[2] <= time and found[2] < found[0] <= time and found[1] <= time
