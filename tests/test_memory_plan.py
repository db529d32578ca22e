"""Chains, plans and the checker: what is read, what is refused, and what a plan takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsim.errors import ConfigError
from distsim.memory import chain as chains
from distsim.memory import lower, mixed, simple
from distsim.memory.chain import Chain, Needs
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Op, PlanError, parse, with_drops
from distsim.memory.replay import Overlap, Replay, replay

THREE = {"fwd": [1, 2, 4], "bwd": [10, 20, 40], "size": [5, 6, 7, 8]}
SAVED = {**THREE, "size_saved": [16, 17, 18], "fwd_tmp": [0, 3, 0], "bwd_tmp": [1, 0, 2]}
DISK = {**THREE, "write": [3, 3, 3], "read": [2, 2, 2]}


def chain_of(values: Mapping[str, object], tmp_path: Path) -> Chain:
    path = tmp_path / "chain.json"
    path.write_text(json.dumps(values, indent=1))
    return chains.read(str(path))


def made(chain: Chain, text: str) -> MemoryPlan:
    return with_drops(chain, parse(text, chain.layers).rows())


@st.composite
def any_chain(draw: st.DrawFn, most: int = 5) -> Chain:
    layers = draw(st.integers(1, most))
    sizes, times = st.integers(0, 20), st.integers(0, 30)

    def column(numbers: st.SearchStrategy[int], length: int = layers) -> np.ndarray:
        return np.array(draw(st.lists(numbers, min_size=length, max_size=length)), np.float64)

    size = column(sizes, layers + 1)
    saved = size[1:] + column(sizes) if draw(st.booleans()) else None
    return Chain(
        forward=column(times),
        backward=column(times),
        size=size,
        needs=draw(st.sampled_from(["input", "output", "both"])),
        saved=saved,
        forward_tmp=column(sizes) if draw(st.booleans()) else None,
        backward_tmp=column(sizes) if draw(st.booleans()) else None,
        write=column(times),
        read=column(times),
        write_saved=None if saved is None else column(times),
        read_saved=None if saved is None else column(times),
    )


def test_a_chain_is_read_and_written(tmp_path: Path) -> None:
    for values in (THREE, SAVED, DISK, {**THREE, "needs": "both", "unit": "SI", "names": ["a", "b", "c"]}):
        chain = chain_of(values, tmp_path)
        again = chain_of(json.loads(chain.to_json()), tmp_path)
        assert chain.to_json() == again.to_json()
        assert json.loads(chain.to_json()).items() >= values.items()
    assert chain.layers == 3 and chain.plain_time == 77


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fwd": [1, 2]}, "chain.json:1: fwd has 2 numbers|chain.json:[0-9]+: bwd: 3 numbers; expected 2 for 2 layers"),
        ({"size": [1, 2, 3]}, "chain.json:[0-9]+: size: 3 numbers; expected 4 for 3 layers"),
        ({"bwd": [1, -2, 3]}, "chain.json:[0-9]+: bwd.1: '-2' is not a number from 0 to 1e.30"),
        ({"bwd": [1, "nan", 3]}, "bwd.1: 'nan' is not a number from"),
        ({"bwd": 3}, "bwd: '3' is not a list of numbers"),
        ({"forward": [1]}, "forward: unknown key; .*valid: bwd|forward: unknown key"),
        ({"size_save": [1]}, "size_save: unknown key; did you mean 'size_saved'"),
        ({"needs": "inputs"}, "needs: 'inputs' is unknown; expected input or output or both"),
        ({"unit": "ms"}, "unit: 'ms' is unknown; expected SI"),
        ({"L": 4}, "L: '4' layers, but fwd has 3 numbers"),
        ({"write": [1, 1, 1]}, "write and read belong together"),
        ({"size_saved": [1, 20, 20]}, "size_saved of layer 1 is less than its size"),
        ({"write_saved": [1, 1, 1], "read_saved": [1, 1, 1]}, "write_saved is the time"),
        ({"names": ["a"]}, "names has 1 entries; expected 3"),
        ({"names": "abc"}, "expected a list of names"),
        ({"cases": []}, "several instances"),
    ],
)
def test_a_wrong_chain_is_one_clear_error(change: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        chain_of({**THREE, **change}, tmp_path)


def test_what_is_no_chain_is_refused(tmp_path: Path) -> None:
    for values, said in (([1], "not a chain"), ({"fwd": [1], "bwd": [1]}, 'no "size"')):
        (tmp_path / "chain.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=said):
            chains.read(str(tmp_path / "chain.json"))


def test_solved_instances_replay_to_their_times() -> None:
    """Witnesses of chain_remat, case A01, planned by an exact search that is not ours."""
    chain = Chain(
        forward=np.array([16, 21, 13, 26, 7, 4]),
        backward=np.array([32, 2, 58, 54, 25, 28]),
        size=np.array([5, 19, 3, 9, 4, 16, 15]),
    )
    for budget, time, text in (
        (52, 378, "F_1 F_2 F_3 F_4 F_5 F_6 LOSS B_6 F_1 F_2 F_3 F_4 B_5 B_4 B_3 F_1 B_2 B_1"),
        (59, 315, "F_1 F_2 F_3 F_4 F_5 F_6 LOSS B_6 B_5 F_3 B_4 B_3 F_1 B_2 B_1"),
    ):
        plan = made(chain, text)
        found = replay(chain, plan, budget)
        assert (found.time, found.peak_memory, plan.schedule()) == (time, budget, text)
        assert found.forwards == text.count("F_")
        with pytest.raises(PlanError, match="the budget is"):
            replay(chain, plan, budget - 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F_1 F_3", "operation 2 of 2, F_3: it reads a_2, which is not resident"),
        ("F_1 F_2 D_1 F_3 LOSS B_3 B_2", "B_2: it reads a_1, which is not resident"),
        ("F_1 F_1", "F_1: a_1 is resident already"),
        ("F_1 F_2 F_3 B_3", "B_3: it comes before LOSS"),
        ("F_1 F_2 LOSS", "LOSS: it reads a_3, which is not resident"),
        ("F_1 F_2 F_3 LOSS LOSS", "LOSS: it comes once"),
        ("F_1 F_2 F_3 LOSS B_2", "B_2: it is out of order; expected B_3"),
        ("F_1 F_2 F_3 LOSS B_3 B_3", "B_3: it is out of order; expected B_2"),
        ("F_1 F_2 F_3 LOSS B_3 B_2 B_1 B_1", "expected none: all are done"),
        ("F_1 F_2 F_3 LOSS B_3 B_2", "the plan ends after 6 operations without B_1"),
        ("F_1 F_2 F_3", "without LOSS"),
        ("D_1", "D_1: a_1 is not resident"),
        ("F_1 D_1 D_1", "a_1 is not resident"),
        ("R_1", "R_1: it reads a_1, which is not on disk"),
        ("W_1", "W_1: it reads a_1, which is not resident"),
        ("Fall_1", "Fall_1: this chain has no saved intermediates"),
    ],
)
def test_the_checker_refuses(text: str, said: str, tmp_path: Path) -> None:
    chain = chain_of(DISK, tmp_path)
    with pytest.raises(PlanError, match=said):
        replay(chain, parse(text, 3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F_1 F_2 F_3 LOSS B_3", "B_3: it reads abar_3, of which only a_3 is resident"),
        ("Fall_1 Dall_1 Dall_1", "abar_1 is not resident"),
        ("F_1 W_1", "W_1: this chain has no times for it"),
        ("F_1 Fall_1", "Fall_1: a_1 is resident already"),
    ],
)
def test_the_checker_refuses_with_saved_intermediates(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=said):
        replay(chain_of(SAVED, tmp_path), parse(text, 3))


def test_memory_is_what_is_resident_with_outputs_and_temporaries(tmp_path: Path) -> None:
    chain = chain_of(SAVED, tmp_path)
    plan = parse("F_1 Fall_2 Fall_3 LOSS B_3 B_2 D_1 Fall_1 B_1", 3)
    found = replay(chain, plan)
    expected = {
        "F_1": 5 + 6,
        "Fall_2": 5 + 6 + 17 + 3,
        "Fall_3": 5 + 6 + 17 + 18,
        "LOSS": 5 + 6 + 17 + 18 + 8,
        "B_3": 5 + 6 + 17 + 18 + 8 + 7 + 2,
        "B_2": 5 + 6 + 17 + 7 + 6,
        "Fall_1": 5 + 6 + 16,
        "B_1": 5 + 6 + 16 + 5 + 1,
    }
    assert found.memory_at[~np.isnan(found.memory_at)].tolist() == list(expected.values())
    assert found.peak_memory == max(expected.values())
    assert found.time == chain.plain_time + 1


def test_what_is_dropped_late_is_there_until_then(tmp_path: Path) -> None:
    chain = chain_of(THREE, tmp_path)
    early = parse("F_1 F_2 F_3 LOSS D_3 B_3 D_2 B_2 D_1 B_1", 3)
    late = parse("F_1 F_2 F_3 LOSS B_3 D_3 B_2 D_2 D_1 B_1", 3)
    assert replay(chain, early).peak_memory == 5 + 6 + 7 + 8 + 8
    found = replay(chain, late)
    assert found.peak_memory == 5 + 6 + 7 + 8 + 8 + 7
    assert replay(chain, late, found.peak_memory).peak_memory == found.peak_memory


def test_transfers_run_beside_and_hold_memory_until_they_end(tmp_path: Path) -> None:
    chain = chain_of({**DISK, "write": [9, 9, 9], "read": [15, 15, 15]}, tmp_path)
    plan = made(chain, "F_1 W_1 F_2 F_3 LOSS B_3 R_1 B_2 B_1")
    times: dict[Overlap, tuple[float, float]] = {}
    for overlap in ("none", "half", "full"):
        found = replay(chain, plan, None, overlap)
        times[overlap] = found.time, found.peak_memory
    # One by one LOSS has a_0, a_2, a_3 and g_3. Overlapped it has a_1 as well, on its way out until 10, and R_1 has its
    # 15 within B_3's 40, from 7 to 47.
    assert times["none"] == (77 + 24, 5 + 7 + 8 + 8)
    assert times["full"] == times["half"] == (77, 5 + 6 + 7 + 8 + 8)
    for budget, time in (
        (34, 77),
        (33, 80),  # LOSS waits until a_1 is out
        (28, 95),  # and R_1 for the end of B_3, at 50
    ):
        tight = replay(chain, plan, budget, "full")
        assert (tight.time, tight.peak_memory) == (time, budget)
    with pytest.raises(PlanError, match="LOSS: it needs 28"):
        replay(chain, plan, 27, "full")


@given(any_chain())
def test_simple_plans_run_everywhere_and_the_engine_agrees(chain: Chain) -> None:
    for plan in (
        simple.store_all(chain),
        simple.square_root(chain),
        *(simple.periodic(chain, each) for each in range(1, chain.layers + 1)),
    ):
        found = replay(chain, plan)
        agree(chain, plan, found, "none")
        assert parse(plan.text(), chain.layers).text() == plan.text()
    assert replay(chain, simple.store_all(chain)).time == chain.plain_time


def agree(chain: Chain, plan: MemoryPlan, found: Replay, overlap: Overlap) -> None:
    """The engine, given only durations and waits, starts everything when the checker does."""
    timed, waits = lower.operations(chain, plan, found, overlap)
    timeline = lower.simulate(timed, waits)
    kept = found.engine >= 0
    np.testing.assert_array_equal(timeline.start_s, found.start[kept])
    np.testing.assert_array_equal(timeline.finish_s, found.finish[kept])


@given(any_chain(), st.data())
def test_ways_of_layers_run_in_their_memory_and_the_engine_agrees(chain: Chain, data: st.DataObject) -> None:
    allowed = mixed.allowed(chain)
    ways = tuple(data.draw(st.sampled_from(allowed)) for _ in range(chain.layers))
    plan = with_drops(chain, mixed.rows(chain, ways, data.draw(st.sampled_from(mixed.AHEAD))))
    one_by_one = replay(chain, plan)
    agree(chain, plan, one_by_one, "none")
    assert naive_peak(chain, plan) == one_by_one.peak_memory
    for overlap in ("half", "full"):
        found = replay(chain, plan, one_by_one.peak_memory, overlap)
        agree(chain, plan, found, overlap)
        assert found.peak_memory <= one_by_one.peak_memory
        assert found.time <= one_by_one.time
        assert overlapping_peak(chain, plan, found) <= one_by_one.peak_memory


def naive_peak(chain: Chain, plan: MemoryPlan) -> float:
    """Return the peak of a plan one after another: sets of what is there, nothing else."""
    bare, whole, gradients, peak = {0}, set[int](), set[int](), 0.0

    def resident() -> float:
        saved = sum(chain.saved[each - 1] for each in whole) if chain.saved is not None else 0.0
        return float(sum(chain.size[each] for each in [*bare, *gradients]) + saved)

    for op, layer in plan.rows():
        tmp = 0.0
        if op in (Op.FORWARD, Op.READ):
            bare.add(layer)
        elif op in (Op.RECORD, Op.READ_SAVED):
            whole.add(layer)
        elif op == Op.LOSS:
            gradients.add(layer)
        elif op == Op.BACKWARD:
            gradients.add(layer - 1)
        elif op == Op.DROP:
            bare.discard(layer)
            whole.discard(layer)
        elif op == Op.DROP_SAVED:
            whole.remove(layer)
            bare.add(layer)
        if op in (Op.FORWARD, Op.RECORD) and chain.forward_tmp is not None:
            tmp = float(chain.forward_tmp[layer - 1])
        if op == Op.BACKWARD and chain.backward_tmp is not None:
            tmp = float(chain.backward_tmp[layer - 1])
        peak = max(peak, resident() + tmp)
        if op == Op.BACKWARD:
            gradients.remove(layer)
            whole.discard(layer)
    return peak


def overlapping_peak(chain: Chain, plan: MemoryPlan, found: Replay) -> float:
    """Return the peak from times alone: each thing is there from its maker's start until all its readers have ended."""
    spans: list[tuple[float, float, float]] = [(0.0, np.inf, float(chain.size[0]))]
    maker: dict[int, int] = {}
    last: dict[int, float] = {}
    gradient: dict[int, tuple[float, float]] = {}
    for row, (op, layer) in enumerate(plan.rows()):
        start, finish = found.start[row], found.finish[row]
        for each in range(1, chain.layers + 1):
            reading = {Op.FORWARD: layer - 1, Op.RECORD: layer - 1}.get(op, layer)
            if each in maker and op not in (Op.READ, Op.READ_SAVED, Op.DROP, Op.DROP_SAVED):
                inputs = {reading} | ({layer - 1} if op == Op.BACKWARD and chain.needs != "output" else set())
                if each in inputs:
                    last[each] = max(last[each], finish)
        if op in (Op.FORWARD, Op.READ):
            maker[layer], last[layer] = row, finish
        elif op == Op.DROP and chain.saved is None:
            spans.append((found.start[maker.pop(layer)], last.pop(layer), float(chain.size[layer])))
        elif op == Op.LOSS:
            gradient[layer] = start, np.inf
        elif op == Op.BACKWARD:
            gradient[layer] = gradient[layer][0], finish
            gradient[layer - 1] = start, np.inf
    spans += [(found.start[row], np.inf, float(chain.size[layer])) for layer, row in maker.items()]
    spans += [(*span, float(chain.size[layer])) for layer, span in gradient.items()]
    if chain.saved is not None:
        return 0.0  # told apart by layer only; the others are enough to see
    instants = {start for start, _, _ in spans}
    return max(sum(size for start, end, size in spans if start <= at < end) for at in instants)


def test_mixed_is_the_best_of_all_ways_of_small_chains() -> None:
    random = np.random.default_rng(7)
    cases: list[tuple[Overlap, Needs]] = [("none", "input"), ("none", "both"), ("full", "input"), ("full", "output")]
    for overlap, needs in cases:
        size = random.integers(1, 20, 5).astype(np.float64)
        chain = Chain(
            forward=random.integers(1, 30, 4).astype(np.float64),
            backward=random.integers(1, 30, 4).astype(np.float64),
            size=size,
            needs=needs,
            write=size[1:],
            read=size[1:],
        )
        plans = [
            with_drops(chain, mixed.rows(chain, ways, ahead))
            for ways in itertools.product(mixed.allowed(chain), repeat=4)
            for ahead in mixed.AHEAD
        ]
        peaks = [replay(chain, plan).peak_memory for plan in plans]
        for budget in (min(peaks), float(np.median(peaks)), max(peaks) - 1):
            fitting = [plan for plan, peak in zip(plans, peaks, strict=True) if peak <= budget]
            least = min(replay(chain, plan, budget, overlap).time for plan in fitting)
            assert replay(chain, mixed.plan(chain, budget, overlap), budget, overlap).time == least
        with pytest.raises(InfeasibleBudget) as error:
            mixed.plan(chain, min(peaks) - 1, overlap)
        assert error.value.least == min(peaks)
