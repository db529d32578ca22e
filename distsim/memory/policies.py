"""Every way to plan a chain, by name: `optimal`, `periodic:4`, `fast`, ..."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from distsim.errors import ConfigError, nearest
from distsim.memory import exact, fast, mixed, overlapped, persistent, revolve, simple
from distsim.memory.chain import Chain
from distsim.memory.order import by_start
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Point, with_drops
from distsim.memory.replay import Overlap, Replay, replay
from distsim.units import shown

EXACT, MIXED = 12, 24
"""Layers up to which `auto` plans to the optimum, and tries offload layer by layer."""
WALK = 24
"""Layers up to which the front of a planner that knows no breakpoints is walked down from plan to plan."""
POINTS = 24
"""Budgets of such a front of longer chains, and with offload."""


class Policy(NamedTuple):
    """A planner."""

    summary: str
    make: Callable[[Chain, float, Overlap, int], MemoryPlan]
    """Of a chain, a budget, how transfers overlap, and the policy's number."""
    number: str = ""
    """What the number after the colon is; no number if empty."""
    looks_at_budget: bool = True


def _optimal(chain: Chain, budget: float, overlap: Overlap, *, rematerialize: bool = True) -> MemoryPlan:
    if _sequential(chain, overlap, rematerialize):
        return exact.optimal(chain, budget, rematerialize=rematerialize)
    assert overlap != "none"
    return overlapped.optimal(chain, budget, overlap)


def _sequential(chain: Chain, overlap: Overlap, rematerialize: bool) -> bool:
    """Return whether nothing can overlap; refuse what the exact planner of what does has not learnt."""
    if overlap == "none" or not chain.offloads:
        return True
    if chain.saved is not None or not rematerialize:
        what = "no saved intermediates" if chain.saved is not None else "no plans that must not recompute"
        raise ConfigError(
            f"with --overlap {overlap} the exact planner knows {what}; use --policy mixed, or --overlap none"
        )
    return False


def enough(chain: Chain, budget: float) -> float:
    """Return the budget, or what keeping everything needs where that is less: more changes nothing."""
    return min(budget, replay(chain, simple.store_all(chain)).peak_memory)


def _auto(chain: Chain, budget: float, overlap: Overlap) -> MemoryPlan:
    """The optimum where it is had in seconds, and else the best of what is near it."""
    if chain.layers <= EXACT and not chain.offloads:
        return exact.optimal(chain, budget)
    planners: list[Callable[[], MemoryPlan]] = [lambda: fast.plan(chain, enough(chain, budget))]
    if chain.offloads and chain.layers <= MIXED:
        planners.append(lambda: mixed.plan(chain, budget, overlap))
    found: list[MemoryPlan] = []
    refused: list[InfeasibleBudget] = []
    for make in planners:
        try:
            found.append(make())
        except InfeasibleBudget as error:
            refused.append(error)
    if not found:
        raise min(refused, key=lambda error: error.least)
    return min(found, key=lambda made: replay(chain, made, budget, overlap).time)


POLICIES: dict[str, Policy] = {
    "auto": Policy(
        "optimal for few layers without offload, else the best of fast and mixed", lambda c, b, o, n: _auto(c, b, o)
    ),
    "optimal": Policy("the least time of all plans: recompute and offload", lambda c, b, o, n: _optimal(c, b, o)),
    "optimal-recompute": Policy(
        "the least time without offload", lambda c, b, o, n: exact.optimal(c, b, offload=False)
    ),
    "optimal-offload": Policy(
        "the least time that runs no forward twice", lambda c, b, o, n: _optimal(c, b, o, rematerialize=False)
    ),
    "fast": Policy("recompute, hundreds of layers, with a proven gap", lambda c, b, o, n: fast.plan(c, enough(c, b))),
    "mixed": Policy("keep, recompute or offload, layer by layer", lambda c, b, o, n: mixed.plan(c, b, o)),
    "persistent": Policy(
        "the best that keeps what is stored until its backward", lambda c, b, o, n: persistent.optimal(c, enough(c, b))
    ),
    "store-all": Policy("keep everything", lambda c, b, o, n: simple.store_all(c), looks_at_budget=False),
    "periodic": Policy(
        "keep every K-th activation", lambda c, b, o, n: simple.periodic(c, n), "K", looks_at_budget=False
    ),
    "sqrt": Policy("periodic, K = √L", lambda c, b, o, n: simple.square_root(c), looks_at_budget=False),
    "revolve": Policy(
        "binomial, as if all layers were equal", lambda c, b, o, n: _revolve(c, n), "SLOTS", looks_at_budget=False
    ),
}


class Named(NamedTuple):
    """A policy with its number, 0 where it has none."""

    name: str
    number: int

    @property
    def policy(self) -> Policy:
        """The planner."""
        return POLICIES[self.name]

    def __str__(self) -> str:
        return f"{self.name}:{self.number}" if self.number else self.name


def parse(text: str, *, number_wanted: bool = True) -> Named:
    """Read `NAME` or `NAME:NUMBER`.

    Raises: ConfigError with the nearest valid name, or saying what the number is.
    """
    name, colon, number = text.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {shown(name)}{nearest(name[:40], POLICIES)}")
    wanted = POLICIES[name].number
    if not wanted and colon:
        raise ConfigError(f"policy {name} takes no number; expected --policy {name}")
    if wanted and not colon and number_wanted:
        raise ConfigError(f"policy {name} needs a number; expected --policy {name}:{wanted}")
    if colon and not (re.fullmatch("[0-9]{1,9}", number) and int(number) >= 1):
        raise ConfigError(f"{shown(text)}: {wanted} must be a whole number of at least 1; expected {name}:{wanted}")
    return Named(name, int(number or 0))


def plan(chain: Chain, named: Named, budget: float, overlap: Overlap = "none") -> tuple[MemoryPlan, Replay]:
    """Plan a chain, and replay the plan within the budget; rows are in the order in which they start.

    Raises: ConfigError if the policy cannot plan it, or its plan does not fit into the budget.
    """
    budget = chain.allowed(budget)
    found = named.policy.make(chain, budget, overlap, named.number)
    peak = replay(chain, found).peak_memory
    if peak > budget:
        raise InfeasibleBudget(budget, peak, str(named))
    return by_start(chain, found, budget, overlap)


def front(chain: Chain, named: Named, overlap: Overlap = "none") -> Iterator[Point]:
    """Yield plans for all budgets: of exact planners each breakpoint, of others a point for each budget or number.

    Points come in no order, and some may be worse than others; `best` sorts them out.
    """
    policy = named.policy
    if not policy.looks_at_budget:
        for number in range(1, chain.layers + 1) if policy.number and not named.number else [named.number]:
            made = policy.make(chain, np.inf, overlap, number)
            yield _point(chain, made, overlap, replay(chain, made).peak_memory)
    elif named.name == "optimal-recompute" or (named.name.startswith("optimal") and not chain.offloads):
        yield from exact.front(chain, offload=False)
    elif named.name.startswith("optimal"):
        rematerialize = named.name == "optimal"
        if _sequential(chain, overlap, rematerialize):
            yield from exact.front(chain, rematerialize=rematerialize)
        else:
            assert overlap != "none"
            yield from overlapped.front(chain, overlap)
    else:
        yield from _down(chain, policy, overlap)


def _down(chain: Chain, policy: Policy, overlap: Overlap) -> Iterator[Point]:
    """Yield a planner's points from the loosest budget on; of long chains, and with offload, at even distances."""
    budget = most = enough(chain, np.inf)
    step = 0.0
    if chain.layers > WALK or chain.offloads:
        try:
            policy.make(chain, 0.0, overlap, 0)
        except InfeasibleBudget as error:
            step = (most - error.least) / (POINTS - 1)
    while True:
        try:
            made = policy.make(chain, budget, overlap, 0)
        except InfeasibleBudget:
            return
        point = _point(chain, made, overlap, budget)
        yield point
        budget = point.budget * (1 - 1e-9) if not step else budget - step
        if budget < 0:
            return


def _point(chain: Chain, made: MemoryPlan, overlap: Overlap, budget: float = np.inf) -> Point:
    """Return a plan with its time, and the least budget with which it takes no longer."""
    made, found = by_start(chain, made, budget, overlap)
    again = replay(chain, made, found.peak_memory, overlap)
    return Point(found.peak_memory if again.time <= found.time else budget, found.time, made)


def best(points: list[Point]) -> list[Point]:
    """Return those of which none is as fast within less, by budget."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.budget, each.time)):
        if not found or point.time < found[-1].time:
            found.append(point)
    return found


def _revolve(chain: Chain, slots: int) -> MemoryPlan:
    return with_drops(chain, revolve.rows(revolve.slots(chain.layers, slots), chain))
