"""Slot schedules: closed forms, searches over all states, replays with mistakes, and checkpoint_schedules."""

from __future__ import annotations

import heapq
import random
from functools import cache
from math import comb, inf
from typing import Any, Literal

import checkpoint_schedules as library  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsim.errors import ConfigError
from distsim.memory import disk_revolve, revolve
from distsim.memory.chain import Chain
from distsim.memory.disk_revolve import disk_slots
from distsim.memory.plan import Op, PlanError, with_drops
from distsim.memory.replay import replay as replay_plan
from distsim.memory.revolve import Action, advances, repetitions, rows, slots

Costs = tuple[float, float, float]
NO_DISK: Costs = (1.0, 0.0, 0.0)


def search(steps: int, memory: int, disk: int, costs: Costs, once: bool = False) -> float:
    """Return the least cost over all schedules: Dijkstra over what is in the buffer, in memory and on disk.

    A state is (step to reverse next, buffer, set in memory, set on disk); sets are bit masks. Anything goes: slots
    are emptied at any moment, filled from the buffer, and copied to it. Reversals cost nothing.
    """
    forward, write, read = costs
    best = {(steps, 0, 0, 0): 0.0}
    heap = [(0.0, (steps, 0, 0, 0))]
    while heap:
        cost, state = heapq.heappop(heap)
        left, buffer, held, disked = state
        if left == 0:
            return cost
        if cost > best[state]:
            continue
        following: list[tuple[float, tuple[int, int, int, int]]] = []
        if buffer >= 0:
            bit = 1 << buffer
            if buffer == left - 1:
                useful = bit - 1  # later states are of no use any more
                following.append((0.0, (left - 1, -1, held & useful, disked & useful)))
            else:
                following.append((forward, (left, buffer + 1, held, disked)))
            if held.bit_count() < memory:
                following.append((0.0, (left, buffer, held | bit, disked)))
            if disked.bit_count() < disk:
                following.append((write, (left, buffer, held, disked | bit)))
        for place in range(left):
            bit = 1 << place
            if held & bit:
                following += [(0.0, (left, place, held, disked)), (0.0, (left, buffer, held ^ bit, disked))]
            if disked & bit:
                following.append((read, (left, place, held, disked ^ bit if once else disked)))
                following.append((0.0, (left, buffer, held, disked ^ bit)))
        for more, then in following:
            if cost + more < best.get(then, inf):
                best[then] = cost + more
                heapq.heappush(heap, (cost + more, then))
    return inf


# --- the binomial schedule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_schedule_advances_less(count: int) -> None:
    for steps in range(1, 10):
        assert slots(steps, count).advances == advances(steps, count) == search(steps, count, 0, NO_DISK)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 40, 400])
def test_schedules_meet_the_closed_form(count: int) -> None:
    for steps in [*range(2, 60), 99, 100, 231, 400]:
        least = next(r for r in range(1, steps) if comb(count + r, count) >= steps)
        plan = slots(steps, count)
        assert repetitions(steps, count) == plan.repetitions == least
        assert plan.advances == least * steps - comb(count + least, least - 1)
        assert plan.forwards == plan.advances + steps
        assert plan.loads == steps - 1  # each reversal but the first starts from a slot
        assert plan.stores >= min(count, steps - 1)


@cache
def least(steps: int, count: int) -> tuple[int, int]:
    """Return the fewest advances, and of these schedules the fewest stores besides the start's own: by trying all."""
    if steps == 1:
        return 0, 0
    if count == 1:
        return steps * (steps - 1) // 2, 0
    return min(
        (place + right[0] + left[0], (place < steps - 1) + right[1] + left[1])
        for place in range(1, steps)
        for right, left in [(least(steps - place, count - 1), least(place, count))]
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12])
def test_no_optimal_schedule_stores_less(count: int) -> None:
    for steps in range(2, 80):
        plan = slots(steps, count)
        assert (plan.advances, plan.stores - 1) == least(steps, count), steps


def test_the_smallest_schedules_are_as_written() -> None:
    assert slots(1, 0).text() == "reverse 1"
    assert slots(1, 5).stores == advances(1, 0) == 0
    assert slots(2, 1).text() == "store 0, advance 0 1, reverse 2, restore 0, reverse 1"
    assert slots(3, 2).text().startswith("store 0, advance 0 1, store 1, advance 1 2, reverse 3, restore 1, reverse 2")


# --- the checker -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("advance 1 2", r"action 1, advance 1 2: x_0 is in the buffer"),
        ("advance 0 3", r"to x_2 at most"),
        ("advance 0 0", r"to x_2 at most"),
        ("store 2", r"memory has 2 slots"),
        ("write 1", r"disk has 1 slots"),
        ("store -1", r"memory has 2 slots"),
        ("restore 1", r"slot 1 of memory is empty"),
        ("store 0, read 0", r"action 2, read 0: slot 0 of disk is empty"),
        ("reverse 3", r"x_0 is in the buffer"),
        ("advance 0 2, reverse 2", r"step 3 is the next to reverse"),
        ("advance 0 2, reverse 3, store 0", r"action 3, store 0: nothing is in the buffer"),
        ("advance 0 2, reverse 3, advance 2 1", r"nothing is in the buffer"),
        ("store 0, advance 0 2, reverse 3, restore 0, reverse 1", r"step 2 is the next to reverse"),
        ("store 0, advance 0 2, reverse 3, restore 0, advance 0 1, reverse 2", r"ends before step 1"),
        ("", r"ends before step 3"),
        ("advance 0 2, reverse 3, reverse 3", r"step 2 is the next to reverse"),
        (
            "write 0, advance 0 2, reverse 3, read 0, advance 0 1, reverse 2, read 0, reverse 1",
            r"action 7, read 0: slot 0 of disk is empty",
        ),
    ],
)
def test_the_checker_refuses(text: str, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        revolve.replay(3, 2, 1, parse(text), once=True)


def parse(text: str) -> list[Action]:
    """Read actions as they are written."""
    kinds: dict[str, Any] = {each: each for each in ("advance", "store", "restore", "write", "read", "reverse")}
    words = [each.split() for each in text.split(", ") if each]
    return [Action(kinds[kind], *map(int, numbers)) for kind, *numbers in words]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 5))
def test_actions_read_back_and_count_the_same(steps: int, memory: int, disk: int) -> None:
    plan = disk_slots(steps, memory, disk, 1, 1, 1, 1)
    assert revolve.replay(steps, memory, disk, parse(plan.text())) == plan


@given(st.integers(2, 30), st.integers(1, 6), st.randoms(use_true_random=False))
def test_no_action_can_be_left_out(steps: int, count: int, rng: random.Random) -> None:
    plan = slots(steps, count)
    left_out = rng.randrange(len(plan.actions))
    with pytest.raises(PlanError):
        revolve.replay(steps, count, 0, plan.actions[:left_out] + plan.actions[left_out + 1 :])


# --- slots on disk -----------------------------------------------------------------------------------------------

CASE = st.tuples(st.integers(1, 7), st.integers(0, 3), st.integers(0, 3)).filter(
    lambda case: case[0] == 1 or any(case[1:])
)
COST = st.one_of(st.integers(0, 12), st.sampled_from([0, 0.1, 0.7, 1e6]))


@settings(max_examples=300)
@given(CASE, st.tuples(st.integers(1, 3), COST, COST), st.sampled_from(["any", "once"]))
def test_no_schedule_with_disk_costs_less(
    case: tuple[int, int, int], costs: Costs, reads: Literal["any", "once"]
) -> None:
    steps, memory, disk = case
    wanted = search(steps, memory, disk, costs, once=reads == "once")
    forward, write, read = costs
    plan = disk_slots(steps, memory, disk, forward, 5.0, write, read, reads)
    assert plan.cost(forward, 5.0, write, read) == pytest.approx(wanted + 5.0 * steps, rel=1e-12)


@pytest.mark.parametrize("case", range(12))
def test_no_longer_schedule_with_disk_costs_less(case: int) -> None:
    """Eight steps, where disks cost about what they save."""
    rng = random.Random(case)
    memory, disk = rng.randint(0, 3), rng.randint(1, 3)
    costs = (1.0, float(rng.randint(0, 4)), float(rng.randint(0, 4)))
    for reads in ("any", "once"):
        plan = disk_slots(8, memory, disk, costs[0], 0, *costs[1:], reads="once" if reads == "once" else "any")
        assert plan.cost(costs[0], 0, *costs[1:]) == search(8, memory, disk, costs, reads == "once")


@given(
    st.integers(1, 100),
    st.integers(1, 6),
    st.integers(0, 8),
    st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 30)),
)
def test_more_freedom_never_costs_more(steps: int, memory: int, disk: int, costs: Costs) -> None:
    forward, write, read = costs

    def cost(memory: int, disk: int | None, reads: Literal["any", "once"] = "any") -> float:
        return disk_slots(steps, memory, disk, forward, 1, write, read, reads).cost(forward, 1, write, read)

    here = cost(memory, disk)
    assert cost(memory, 0) == forward * advances(steps, memory) + steps
    assert cost(memory, None) == cost(memory, steps) <= cost(memory, disk + 1) <= here <= cost(memory, 0)
    assert cost(memory + 1, disk) <= here <= cost(memory, disk, "once")
    assert cost(memory, None) <= cost(memory, None, "once") == cost(memory, steps, "once")
    # Slots in memory are at least as good as slots on disk.
    assert advances(steps, memory + disk) * forward + steps <= here


def test_disk_slots_that_cost_nothing_are_slots_in_memory() -> None:
    for steps in range(1, 60):
        for memory, disk in ((1, 1), (2, 3), (0, 2), (4, 1)):
            assert disk_slots(steps, memory, disk, 1, 0, 0, 0).advances == advances(steps, memory + disk)


@pytest.mark.parametrize(
    ("steps", "memory", "disk", "costs", "least", "least_once"),
    [
        (20, 2, 2, (1, 1, 2, 2), 70, 70),
        (20, 3, 3, (1, 2, 3, 3), 85, 85),
        (30, 2, 4, (1, 2, 5, 2), 150, 151),
    ],
)
def test_solved_cases_are_met(
    steps: int, memory: int, disk: int, costs: tuple[float, float, float, float], least: float, least_once: float
) -> None:
    assert disk_slots(steps, memory, disk, *costs).cost(*costs) == least
    assert disk_slots(steps, memory, None, *costs).cost(*costs) == least
    assert disk_slots(steps, memory, None, *costs, reads="once").cost(*costs) == least_once


# --- beside checkpoint_schedules ---------------------------------------------------------------------------------


def of_library(schedule: Any) -> tuple[int, int, int, int, int]:
    """Return what a schedule of the library does: forwards, stores, loads, writes, reads."""
    forwards = stores = loads = writes = reads = 0
    for action in schedule:
        if isinstance(action, library.Forward):
            forwards += action.n1 - action.n0
            stores += action.write_ics and action.storage == library.StorageType.RAM
            writes += action.write_ics and action.storage == library.StorageType.DISK
        elif isinstance(action, library.Copy | library.Move):
            loads += action.from_storage == library.StorageType.RAM
            reads += action.from_storage == library.StorageType.DISK
    return forwards, stores, loads, writes, reads


def two_levels(period: int, memory: int, steps: int) -> Any:
    """Yield the library's schedule that stores every `period`-th state on disk, with slots in memory between them."""
    schedule = library.TwoLevelCheckpointSchedule(period, memory, binomial_storage=library.StorageType.RAM)
    for action in schedule:
        if isinstance(action, library.Forward) and action.n1 >= steps:
            yield library.Forward(action.n0, min(action.n1, steps), *action.args[2:])
            if schedule.max_n is None:
                schedule.finalize(steps)
        else:
            yield action
        if isinstance(action, library.EndReverse):
            return


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_the_library_does_no_better_in_memory(count: int) -> None:
    for steps in [*range(2, 30), 64, 100]:
        plan = slots(steps, count)
        multistage = of_library(library.MultistageCheckpointSchedule(steps, min(count, steps - 1), 0))
        assert (plan.forwards, plan.stores, plan.loads) == multistage[:3], steps
        assert plan.forwards == of_library(library.Revolve(steps, count))[0]


@pytest.mark.parametrize("costs", [(1, 1, 2, 2), (1, 2, 5, 2), (1, 2, 3, 3), (2, 1, 0, 7), (1, 1, 9, 0), (3, 0, 1, 1)])
def test_the_library_does_no_better_with_disk(costs: tuple[float, float, float, float]) -> None:
    forward, reverse, write, read = costs
    names = {"uf": forward, "ub": reverse, "wd": write, "rd": read}

    def cost(schedule: Any, steps: int) -> float:
        forwards, _, _, writes, reads = of_library(schedule)
        return forward * (forwards - steps) + reverse * steps + write * writes + read * reads

    for steps in (2, 5, 9, 14, 20, 33):
        for memory in (1, 2, 3):
            for disk in (1, 2, 4):
                ours = disk_slots(steps, memory, disk, *costs).cost(*costs)
                assert ours <= cost(library.HRevolve(steps, memory, disk, **names), steps)
                assert ours <= cost(library.MultistageCheckpointSchedule(steps, min(memory, steps - 1), disk), steps)
            ours = disk_slots(steps, memory, None, *costs).cost(*costs)
            assert ours <= cost(library.DiskRevolve(steps, memory, **names), steps)
            assert ours <= cost(library.PeriodicDiskRevolve(steps, memory, **names), steps)
            for period in (1, 3, 8):
                assert ours <= cost(two_levels(period, memory, steps), steps)


def test_the_library_is_beaten_where_its_costs_are_swapped() -> None:
    costs = (1.0, 2.0, 5.0, 2.0)
    forwards, _, _, writes, reads = of_library(library.HRevolve(30, 2, 4, uf=1, ub=2, wd=5, rd=2))
    assert forwards - 30 + 2 * 30 + 5 * writes + 2 * reads == 152
    assert disk_slots(30, 2, 4, *costs).cost(*costs) == 150


# --- as a memory plan --------------------------------------------------------------------------------------------


def uniform(layers: int, saved: bool, needs: Literal["input", "output", "both"] = "input") -> Chain:
    """Make a chain of equal layers: activations of 1, saved sets of 10."""
    ones = np.ones(layers)
    return Chain(
        forward=ones,
        backward=2 * ones,
        size=np.ones(layers + 1),
        needs=needs,
        saved=10 * ones if saved else None,
        write=3 * ones,
        read=4 * ones,
    )


@given(st.integers(1, 25), st.integers(1, 5))
def test_a_schedule_runs_as_a_memory_plan(layers: int, count: int) -> None:
    schedule = slots(layers, count)
    chain = uniform(layers, saved=True)
    result = replay_plan(chain, with_drops(chain, rows(schedule, chain)))
    assert result.forwards == schedule.forwards
    assert result.time == schedule.cost(1.0, 3.0)
    # Besides the slots' activations: the buffer's, abar of 10 and two gradients, or two activations before the first.
    assert result.peak_memory <= count + 1 + 10 + 2


@pytest.mark.parametrize("needs", ["input", "output", "both"])
@pytest.mark.parametrize("layers", [1, 2, 5, 11])
def test_a_schedule_with_disk_runs_as_a_memory_plan(layers: int, needs: Literal["input", "output", "both"]) -> None:
    schedule = disk_slots(layers, 1, 3, 1.0, 3.0, 0.25, 0.5)
    chain = uniform(layers, saved=False, needs=needs)
    plan = with_drops(chain, rows(schedule, chain))
    result = replay_plan(chain, plan)
    assert result.forwards == schedule.advances + (1 if needs == "input" else layers)
    # The first disk slot holds x_0, and a_0 is not copied.
    kinds = [each.kind for each in schedule.actions if each.at > 0]
    assert (plan.count(Op.WRITE), plan.count(Op.READ)) == (kinds.count("write"), kinds.count("read"))


def test_a_schedule_fits_chains_of_its_length_alone() -> None:
    with pytest.raises(ConfigError, match="a schedule of 3 steps does not fit a chain of 4 layers"):
        rows(slots(3, 2), uniform(4, saved=False))


# --- what makes no sense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "count"), [(0, 1), (-3, 1), (revolve.MOST + 1, 1), (2, 0), (5, -1), (1, -1)])
def test_slots_that_make_no_sense_are_refused(steps: int, count: int) -> None:
    for planner in (slots, advances):
        with pytest.raises(ConfigError, match="expected a whole number from 1"):
            planner(steps, count)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"steps": 0}, "steps: expected a whole number from 1"),
        ({"steps": disk_revolve.MOST + 1}, "steps: expected a whole number from 1"),
        ({"memory": -1}, "slots in memory: expected a whole number from 0"),
        ({"disk": -1}, "slots in disk: expected a whole number from 0"),
        ({"memory": 0, "disk": 0}, "5 steps need at least 1 slot"),
        ({"forward": -1.0}, "cost of a forward: expected a number from 0"),
        ({"reverse": inf}, "cost of a reverse: expected a number from 0"),
        ({"write": float("nan")}, "cost of a write: expected a number from 0"),
        ({"read": -1e-9}, "cost of a read: expected a number from 0"),
        ({"reads": "one"}, r"unknown reads 'one'; did you mean 'once'\?"),
    ],
)
def test_disk_slots_that_make_no_sense_are_refused(changed: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"steps": 5, "memory": 1, "disk": 1}
    arguments |= {"forward": 1.0, "reverse": 1.0, "write": 1.0, "read": 1.0}
    with pytest.raises(ConfigError, match=match):
        disk_slots(**arguments | changed)


def test_disk_alone_is_enough() -> None:
    plan = disk_slots(3, 0, 1, 1.0, 0.0, 2.0, 3.0)
    assert plan.text() == "write 0, advance 0 2, reverse 3, read 0, advance 0 1, reverse 2, read 0, reverse 1"
    assert plan.cost(1.0, 0.0, 2.0, 3.0) == 3 + 2 + 6
    assert disk_slots(1, 0, 0, 1.0, 1.0, 1.0, 1.0).actions == (Action("reverse", 1),)
