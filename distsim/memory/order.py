"""A plan's operations in the order in which they start: what whoever runs one row after the other needs."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import numpy as np

from distsim.memory.chain import Chain
from distsim.memory.plan import MemoryPlan, PlanError, with_drops
from distsim.memory.replay import COMPUTE, Overlap, Replay, replay


def by_start(chain: Chain, plan: MemoryPlan, budget: float, overlap: Overlap) -> tuple[MemoryPlan, Replay]:
    """Return a plan in the order in which its operations start, copies first, and its replay.

    A copy that goes on beside a computation is then issued before it. Where that order would take longer, the plan
    stays as it is.

    Raises: PlanError as `replay`.
    """
    found = replay(chain, plan, budget, overlap)
    if overlap == "none":
        return plan, found
    try:
        early = _sorted(chain, plan, found)
        again = replay(chain, early, budget, overlap)
    except PlanError:  # it reads back what is made anew meanwhile: one of the two is for nothing
        return plan, found
    return (early, again) if again.time <= found.time * (1 + 1e-9) else (plan, found)


def _sorted(chain: Chain, plan: MemoryPlan, found: Replay) -> MemoryPlan:
    missing = np.zeros(len(plan), np.int64)
    then: list[list[int]] = [[] for _ in missing]
    for before, after in found.waits:
        missing[after] += 1
        then[before].append(after)

    def key(row: int) -> tuple[float, bool, int]:
        return float(found.start[row]), bool(found.engine[row] == COMPUTE), row

    ready = [key(int(row)) for row in np.flatnonzero((missing == 0) & (found.engine >= 0))]
    heapify(ready)
    rows, order = plan.rows(), []
    while ready:
        *_, row = heappop(ready)
        order.append(rows[row])
        for after in then[row]:
            missing[after] -= 1
            if not missing[after]:
                heappush(ready, key(after))
    return with_drops(chain, order)
