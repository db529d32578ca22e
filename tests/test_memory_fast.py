"""Plans of long chains and their lower bound: between the best persistent plan, the optimum and each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_oracles import brute_front
from test_memory_persistent import KINDS, chains, long_chain, rotor_chain

from distsim.compiled import call
from distsim.memory import bound, fast, persistent, weights
from distsim.memory.plan import InfeasibleBudget
from distsim.memory.replay import replay

OPTIMAL = [
    *((52, 459), (53, 432), (55, 405), (57, 383), (65, 365), (69, 363), (72, 361), (73, 344), (83, 343), (84, 337)),
    *((89, 331), (92, 324), (102, 323), (103, 317), (112, 304), (126, 297), (146, 295)),
]
"""Of `rotor_chain`, exact over all schedules."""


@settings(max_examples=25)
@given(chains(most=4), st.booleans())
def test_bound_optimum_fast_persistent_in_this_order(chain: Any, compiled: bool) -> None:
    points = brute_front(chain)
    for budget, time in points:
        target = time if compiled else None
        assert bound.lower_bound(chain, budget, target) <= time
        assert bound.lower_bound(chain, budget, 3 * time) <= time
        try:
            plan = fast.plan(chain, budget)
        except InfeasibleBudget as error:
            assert error.least > budget
            continue
        run = replay(chain, plan, budget)
        assert time <= run.time <= replay(chain, persistent.optimal(chain, budget), budget).time
        assert fast.gap(chain, plan, budget) >= (run.time - time) / time
    budget, time = points[-1]
    assert time == chain.plain_time == bound.lower_bound(chain, budget) == bound.lower_bound(chain, 2 * budget)


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


@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_layers(kind: str) -> None:
    """Within the budget, never worse than persistent, and proven to be near the optimum."""
    chain = long_chain(200, kind)
    w = weights.weights(chain)
    least = call(persistent.least, 10**6, w)[0]
    total = float(w.keep.sum())
    for part, most in ((0.0, math.inf), (0.1, 0.05), (0.5, 0.05)):
        budget = float(least + part * (total - least) // 1)
        plan = fast.plan(chain, budget)
        run = replay(chain, plan, budget)
        slower = replay(chain, persistent.optimal(chain, budget), budget).time
        assert run.time <= slower
        assert 0 <= fast.gap(chain, plan, budget) <= most
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
