"""The exact planner where nothing overlaps: the least time within a budget over all schedules, and the whole front.

For chains of up to 12 layers in seconds, and for longer ones where the budget is loose; `search.py` has the search.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from distsim.compiled import call
from distsim.errors import ConfigError
from distsim.memory.chain import Chain, Floats
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Op, Point, Row, with_drops
from distsim.memory.search import Problem, States, search

LAYERS = 60
"""Most layers: sets of them are the bits of one number."""
ROOM = 1 << 12
MOST_ROOM = 1 << 23
"""How many states the search has room for at first, and at most (about 100 bytes each)."""


def optimal(chain: Chain, budget: float, *, offload: bool = True, rematerialize: bool = True) -> MemoryPlan:
    """Return a plan of the least time within `budget`, and of the least peak among those.

    Without `rematerialize` each layer runs forward once; without `offload` nothing is written to disk.

    Raises: InfeasibleBudget naming the least budget that is feasible; ConfigError if the chain is too long.
    """
    problem = _problem(chain, offload, rematerialize)
    least = _least(problem)
    if budget < least:  # to find that out by looking at all that fits would take much longer
        raise InfeasibleBudget(budget, least)
    return with_drops(chain, _best(problem._replace(budget=budget, floor=least))[2])


def least_budget(chain: Chain, *, offload: bool = True, rematerialize: bool = True) -> float:
    """Return the least budget within which there is a plan; ConfigError if the chain is too long."""
    return _least(_problem(chain, offload, rematerialize))


def front(chain: Chain, *, offload: bool = True, rematerialize: bool = True) -> list[Point]:
    """Return all points of time against budget, ascending budgets: each is the least budget for its time.

    Raises: ConfigError if the chain is too long.
    """
    problem = _problem(chain, offload, rematerialize)
    problem = problem._replace(floor=_least(problem))
    points: list[Point] = []
    budget = math.inf
    while budget >= problem.floor:
        time, peak, rows = _best(problem._replace(budget=budget))
        budget = chain.below(peak)
        points.append(Point(peak, time, with_drops(chain, rows)))
    return points[::-1]


def _least(problem: Problem) -> float:
    """Return the least peak of all schedules: that of the best if no operation takes time."""
    times = ("forward", "backward", "write", "read", "write_saved", "read_saved")
    free: dict[str, Any] = {name: np.where(np.isfinite(getattr(problem, name)), 0.0, math.inf) for name in times}
    return _best(problem._replace(**free))[1]


def _problem(chain: Chain, offload: bool, rematerialize: bool) -> Problem:
    """Make columns over layers 0..L; what the chain has not, or what is not allowed, takes forever."""
    layers = chain.layers
    if layers > LAYERS:
        raise ConfigError(f"the exact planner takes chains of up to {LAYERS} layers, not {layers}{_INSTEAD}")

    def column(values: Floats | None, default: float = 0.0) -> Floats:
        return np.full(layers + 1, default) if values is None else np.concatenate([[0.0], values])

    copies = (chain.write, chain.read, chain.write_saved, chain.read_saved)
    copying = [column(each if offload else None, math.inf) for each in copies]
    times = _exact(column(chain.forward), column(chain.backward), *copying)
    sizes = (chain.size, column(chain.saved), column(chain.forward_tmp), column(chain.backward_tmp))  # have exact sums
    saved = chain.saved is not None
    reads_input, reads_output = saved or chain.needs != "output", not saved and chain.needs != "input"
    # Each operation needs a_0, what it reads, and what it makes.
    size, whole, forward_tmp, backward_tmp = sizes
    below = np.concatenate([[0.0], size[1:-1]])  # of a_(i-1), beside a_0
    made = whole[1:] if saved else size[1:]
    read = whole[1:] + below if saved else below * reads_input + size[1:] * reads_output
    forwards = size[0] + below + made + forward_tmp[1:]
    backwards = size[0] + read + size[1:] + size[:-1] + backward_tmp[1:]
    floor = max(float(forwards.max()), float(backwards.max()), float(size[0] + 2 * size[-1]))
    by_value = np.argsort(-column(chain.forward) / np.maximum(whole, 1e-300), kind="stable")
    rules = (layers, saved, reads_input, reads_output, rematerialize, offload and chain.offloads)
    return Problem(*rules, math.inf, floor, by_value, *sizes, *times)


def _exact(*columns: Floats) -> list[Floats]:
    """Round numbers to multiples of a power of two, so fine that only the last bits of long fractions change, and
    so coarse that all sums are exact: then two ways of the same time have equal times, in whatever order summed.
    """
    finite = [column[np.isfinite(column)] for column in columns]
    total = max(1, len(columns[0])) ** 2 * sum(float(column.sum()) for column in finite)
    if total == 0:
        return list(columns)
    grain = 2.0 ** (math.frexp(total)[1] - 53)
    return [np.rint(column / grain) * grain for column in columns]


def _best(problem: Problem) -> tuple[float, float, list[Row]]:
    """Return time, peak and operations of the best schedule within the budget, which is feasible."""
    room = ROOM
    while True:
        row, states = call(search, room, problem, _states(room))
        if states.count[0] <= room:
            break
        if room == MOST_ROOM:
            raise ConfigError(f"the exact planner gave up after {room:,} states{_INSTEAD}")
        room = min(64 * room, MOST_ROOM)
    assert row >= 0, "feasible"
    return float(states.time[row]), float(states.peak[row]), _rows(states, row)


_INSTEAD = "; for such a chain use the fast planner, which says how near the optimum it is"


def _states(room: int) -> States:
    ids, sets, numbers = np.int32, np.int64, np.float64
    kinds = (np.int8, sets, sets, sets, sets, numbers, numbers, ids, np.int8, np.int8, ids)
    columns: list[Any] = [np.empty(room, kind) for kind in kinds]
    columns += [np.full(4 * room, -1, ids), np.zeros(1, np.int64)]
    return States(*columns)


def _rows(states: States, last: int) -> list[Row]:
    """Return the operations on the best way to a state: the reads' writes follow what is made first."""
    way = []
    row = last
    while row >= 0:
        way.append(row)
        row = int(states.before[row])
    way.reverse()
    to_write = {int(states.layer[row]) for row in way if states.op[row] == Op.READ}
    rows: list[Row] = []
    for before, row in pairwise(way):
        op, layer = Op(int(states.op[row])), int(states.layer[row])
        rows.append((op, layer))
        if op in (Op.FORWARD, Op.RECORD) and layer in to_write:
            to_write.remove(layer)
            rows.append((Op.WRITE, layer))
        if (
            op == Op.RECORD
            and int(states.copied_whole[row]) >> layer & 1 > int(states.copied_whole[before]) >> layer & 1
        ):
            rows.append((Op.WRITE_SAVED, layer))
    return rows
