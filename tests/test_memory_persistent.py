"""The best persistent plan, against all sequences of what a persistent plan can keep."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim.compiled import call
from distsim.memory import persistent, simple, weights
from distsim.memory.chain import Chain
from distsim.memory.plan import DROPS, InfeasibleBudget
from distsim.memory.replay import replay

KINDS = ("input", "output", "both", "saved")
ROTOR = """{"size": [2, 3, 3, 12, 6, 10, 9], "saved": [19, 14, 29, 20, 26, 17], "forward": [20, 7, 20, 2, 19, 22],
 "backward": [11, 28, 41, 26, 52, 47], "forward_tmp": [0, 0, 1, 3, 1, 3], "backward_tmp": [5, 0, 0, 0, 0, 0]}"""
ROTOR_FRONT = [
    *((52, 486), (54, 437), (55, 405), (57, 383), (65, 365), (69, 363), (73, 344), (85, 343), (87, 337), (91, 331)),
    *((92, 324), (103, 317), (116, 316), (121, 304), (132, 297), (146, 295)),
]
"""A solved instance: the exact front of persistent plans, by a programme of its own."""


def rotor_chain() -> Chain:
    columns: dict[str, Any] = {name: np.array(column, np.float64) for name, column in json.loads(ROTOR).items()}
    return Chain(**columns)


@st.composite
def chains(draw: Any, most: int = 5, largest: int = 8) -> Chain:
    """A short chain of any kind, with temporaries."""
    layers = draw(st.integers(1, most))
    kind = draw(st.sampled_from(KINDS))

    def numbers(count: int, low: int, high: int) -> Any:
        return np.array(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), np.float64)

    size = numbers(layers + 1, 1, largest)
    return Chain(
        forward=numbers(layers, 1, 9),
        backward=numbers(layers, 1, 9),
        size=size,
        needs="input" if kind == "saved" else kind,
        saved=size[1:] + numbers(layers, 0, largest) if kind == "saved" else None,
        forward_tmp=numbers(layers, 0, 3),
        backward_tmp=numbers(layers, 0, 3),
    )


def brute(chain: Chain, budget: float) -> float | None:
    """The least time over all sequences of what is kept across each backward, phase by phase.

    Kept: pairs (layer, whether all of abar). What is kept stays until its backward (where B_j reads a_j, a_j may go
    after B_(j + 1) or stay); forwards begin at the last layer that is kept, and a layer is recorded only directly
    after one that is kept, as in rotor.
    """
    layers = chain.layers
    states: dict[frozenset[tuple[int, bool]], float] = {frozenset(): 0.0}
    for phase in range(layers + 1, 0, -1):
        reached: dict[frozenset[tuple[int, bool]], float] = {}
        for there, time in states.items():
            for kept in possible(chain, there, phase):
                cost = phase_time(chain, there, kept, phase, budget)
                if cost is not None and time + cost < reached.get(kept, np.inf):
                    reached[kept] = time + cost
        states = reached
    return min(states.values(), default=None)


def possible(chain: Chain, there: frozenset[tuple[int, bool]], phase: int) -> Any:
    late = chain.saved is None and chain.needs != "input"
    must = {(j, whole) for j, whole in there if (j < phase if whole else j < phase - 1)}
    may = {(j, False) for j in range(1, phase - (0 if late else 1))} - must
    if chain.saved is not None:
        may |= {(j, True) for j in range(1, phase)} - must
    top = max((j for j, _ in there if j != phase), default=0)
    may = {(j, whole) for j, whole in may if j > top or (j, whole) in there}
    for count in range(len(may) + 1):
        for more in itertools.combinations(sorted(may), count):
            kept = must | set(more)
            layers = [j for j, _ in kept]
            recorded_well = all(j - 1 in (0, *layers) for j, whole in kept if whole)
            if len(set(layers)) == len(layers) and recorded_well:
                yield frozenset(kept)


def phase_time(chain: Chain, there: Any, kept: Any, phase: int, budget: float) -> float | None:
    layers, size = chain.layers, chain.size
    reads: set[tuple[int, bool]] = set()
    if phase == layers + 1:
        reads = {(layers, False)}
    elif chain.saved is not None:
        reads = {(phase - 1, False), (phase, True)}
    else:
        reads |= {(phase - 1, False)} if chain.needs != "output" else set()
        reads |= {(phase, False)} if chain.needs != "input" else set()
    held = {0: float(size[0])} | {j: memory(chain, j, whole) for j, whole in there}
    wanted: dict[int, float] = {}
    for j, whole in kept | reads:
        wanted[j] = max(wanted.get(j, 0.0), memory(chain, j, whole))
    top = max(held.keys() - {phase})  # beneath a_phase, kept as the output of its backward
    last = max((j for j in wanted if wanted[j] > held.get(j, 0.0)), default=0)
    if any(wanted[j] > held.get(j, 0.0) for j in wanted if j <= top or j > last):
        return None
    gradient = size[phase] if phase <= layers else 0.0
    time = 0.0
    for j in range(top + 1, last + 1):
        if j in held and held[j] >= wanted.get(j, 0.0):
            return None
        held[j] = wanted.get(j, float(size[j]))
        if sum(held.values()) + gradient + chain.tmp(True)[j - 1] > budget:
            return None
        if j - 1 > top and j - 1 not in wanted:
            del held[j - 1]
        time += float(chain.forward[j - 1])
    final = {j: amount for j, amount in held.items() if j == 0 or j in wanted}
    final = {j: (amount if j == 0 else wanted[j]) for j, amount in final.items()}
    if (phase - 1, False) in there:  # it goes after this backward, if it does
        final[phase - 1] = float(size[phase - 1])
    after = size[phase - 1] + (chain.tmp(False)[phase - 1] if phase <= layers else 0.0)
    return time if sum(final.values()) + gradient + after <= budget else None


def memory(chain: Chain, j: int, whole: bool) -> float:
    return float(chain.saved[j - 1] if whole and chain.saved is not None else chain.size[j])


@settings(max_examples=100)
@given(chains(), st.floats(0, 1))
def test_equals_all_persistent_plans(chain: Chain, part: float) -> None:
    w = weights.weights(chain)
    least = call(persistent.least, 0, w)[0]
    most = float(w.keep.sum() + w.need.max())
    for budget in {least - 1, least, np.floor(least + part * max(0.0, most - least)), most}:
        expected = brute(chain, budget)
        if expected is None:
            with pytest.raises(InfeasibleBudget) as caught:
                persistent.optimal(chain, budget)
            assert caught.value.least == least and brute(chain, least) is not None
            continue
        run = replay(chain, persistent.optimal(chain, budget), budget)
        assert run.time == expected + chain.backward.sum()


def test_what_the_next_backward_reads_may_be_made_before_this_one() -> None:
    """F_2 does not fit beside g_2, but beside g_3 and a_3, which B_3 reads."""
    ones = np.ones(5)
    chain = Chain(
        forward=ones,
        backward=ones,
        size=np.array([1.0, 1, 3, 1, 1, 2]),
        needs="output",
        forward_tmp=np.array([0.0, 2, 0, 0, 0]),
        backward_tmp=np.array([0.0, 0, 0, 0, 1]),
    )
    assert brute(chain, 9) == 8
    assert replay(chain, persistent.optimal(chain, 9), 9).time == 8 + 5


def test_a_solved_front() -> None:
    chain = rotor_chain()
    for budget in (*(least for least, _ in ROTOR_FRONT), *range(53, 150, 8)):
        run = replay(chain, persistent.optimal(chain, budget), budget)
        assert run.time == [time for least, time in ROTOR_FRONT if least <= budget][-1]
    with pytest.raises(InfeasibleBudget, match="the least that is feasible is 52"):
        persistent.optimal(chain, 51)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_interpreted_agree(kind: str) -> None:
    """And the peak that is worked out from operations alone is the replay's."""
    chain = long_chain(9, kind)
    w = weights.weights(chain)
    rounded = w._replace(**{name: getattr(w, name).astype(np.int64) for name in w._fields[1:-1]})
    least = call(persistent.least, 0, w)[0]
    for slots in (int(least), int(least) + 13, int(least) + 40):
        tables = [call(persistent.fill, 0, rounded, slots, 0, compiled=how) for how in (False, True)]
        assert all((one == other).all() for one, other in zip(*tables, strict=True))
        plan = persistent.optimal(chain, slots)
        rows = np.array([(int(op), layer) for op, layer in plan.rows() if op not in DROPS])
        peaks = [call(weights.peak, 0, w, rows, compiled=how) for how in (False, True)]
        assert peaks == [replay(chain, plan).peak_memory] * 2


def long_chain(layers: int, kind: str, seed: int = 0, scale: float = 1.0) -> Chain:
    random = np.random.default_rng(seed)
    size = random.integers(1, 21, layers + 1) * scale
    saved = np.maximum(random.integers(5, 41, layers) * scale, size[1:]) if kind == "saved" else None
    return Chain(
        forward=random.integers(1, 31, layers).astype(float), backward=random.integers(1, 61, layers).astype(float),
        size=size, saved=saved, needs="input" if kind == "saved" else kind,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_without_a_common_measure(kind: str) -> None:
    """Rounding costs little: as good as the exact plan for 1 % less; and the least budget is feasible all the same."""
    chain, scaled = long_chain(40, kind), long_chain(40, kind, scale=np.pi)
    least = call(persistent.least, 10**6, weights.weights(chain))[0]
    for budget in (least, 1.5 * least, 4 * least):
        run = replay(scaled, persistent.optimal(scaled, budget * np.pi * (1 + 1e-9)), budget * np.pi * (1 + 1e-9))
        if budget > least:
            assert run.time <= replay(chain, persistent.optimal(chain, 0.99 * budget)).time


def test_many_layers_of_sizes_without_a_common_measure() -> None:
    """Parts are few for each layer; still it is faster than a plan that does not look at sizes."""
    chain = long_chain(400, "input", scale=np.pi)
    root = replay(chain, simple.square_root(chain))
    assert replay(chain, persistent.optimal(chain, root.peak_memory), root.peak_memory).time < root.time


def zeros(layers: int, kind: Any) -> Chain:
    """A chain whose times are 1, 2, ..., without sizes."""
    times = np.arange(1.0, layers + 1)
    return Chain(forward=times, backward=times, size=np.zeros(layers + 1), needs=kind)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_without_sizes_nothing_runs_twice(kind: str) -> None:
    chain = zeros(3, kind)
    for budget in (0.0, 5.0, math.inf):
        assert replay(chain, persistent.optimal(chain, budget), budget).time == 12
