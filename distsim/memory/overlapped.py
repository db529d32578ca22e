"""The least time within a budget where computing, writing and reading go on at once: exact, for up to 16 layers.

Forwards may be run again, so this is recomputation and offload together. The search is in `overlapped_search.py`; what
is here makes its tables, reads its answers and walks down the budgets.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from distsim.compiled import call
from distsim.errors import ConfigError
from distsim.memory.chain import Chain
from distsim.memory.overlapped_bounds import Tables, at_moments
from distsim.memory.overlapped_search import Lists, States, search
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Op, Point, Row, with_drops
from distsim.memory.replay import replay

Duplex = Literal["half", "full"]
MOST_LAYERS = 16
"""Sets of layers are numbers, and tables have an entry for each set."""
WORK = 64
"""Steps that bounds beforehand may take, for each state that the search may make."""
ROOM = (1 << 16, 1 << 19, 1 << 22, 1 << 24)
"""States that a search may make before it starts over with more room, and at last gives up: of about 150 B each."""


def optimal(chain: Chain, budget: float, overlap: Duplex) -> MemoryPlan:
    """Return a plan of least time within a budget; "full": three engines, "half": writes and reads share one.

    Raises: InfeasibleBudget; ConfigError for a chain without times to write and read, with saved intermediates, of
    more than 16 layers, and where the search is too long, with the bound that it has proven until then.
    """
    return _optimal(chain, budget, overlap, chain.plain_time)


def front(chain: Chain, overlap: Duplex) -> list[Point]:
    """Return all budgets at which the least time gets shorter, ascending, each with its time and a plan.

    Raises: as `optimal`, but for InfeasibleBudget.
    """
    found: list[Point] = []
    least, budget, floor = least_budget(chain), math.inf, chain.plain_time
    while budget >= least:
        plan = _optimal(chain, budget, overlap, floor)
        result = replay(chain, plan, None if budget == math.inf else budget, overlap)
        if found and math.isclose(found[-1].time, result.time, rel_tol=1e-12):
            found.pop()  # the same time with less
        found.append(Point(result.peak_memory, result.time, plan))
        # Every plan of a smaller budget takes at least as long, and any that takes as long lowers the peak.
        budget, floor = chain.below(result.peak_memory), result.time
    return found[::-1]


def least_budget(chain: Chain) -> float:
    """Return the least feasible budget: what the operation needs that needs most.

    With a disk that is enough: everything is written as soon as it is made, and read when it is needed. Engines of
    their own change nothing: the operations of any schedule, one at a time in the order of their starts, need no more.
    """
    _check(chain)
    size, layers = chain.size, chain.layers
    tables = _tables(chain, math.inf, False)
    needed = tables.allocates + tables.set_size[tables.reads]
    needed[layers + 1 : 2 * layers + 1] += size[1:]
    return float(size[0] + needed.max())


def _optimal(chain: Chain, budget: float, overlap: Duplex, floor: float) -> MemoryPlan:
    least = least_budget(chain)
    if budget < least:
        raise InfeasibleBudget(budget, least)
    layers, bound = chain.layers, floor
    tables = _tables(chain, budget, overlap == "half")
    for room in ROOM:
        moments = call(at_moments, room, tables, WORK * room, compiled=True)
        arrays = _room(layers, room)
        makespan, bound, made, last = call(search, room, tables, moments, *arrays, floor, False, compiled=True)
        if made >= 0:
            assert makespan < math.inf, "a feasible budget has a plan"
            rows = _rows(layers, arrays[0], last)
            back = {layer for op, layer in rows if op == Op.READ}
            return with_drops(chain, [row for row in rows if row[0] != Op.WRITE or row[1] in back])
    raise ConfigError(
        f"{layers} layers within {budget:,.15g} are too many to find the least time with overlapping copies: the "
        f"search has made {ROOM[-1]:,} states; it takes at least {bound:,.15g}. "
        "There is a plan without overlap, and one from the fast planner"
    )


def _check(chain: Chain) -> None:
    if chain.saved is not None:
        raise ConfigError("overlapping copies are planned for chains without saved intermediates (size_saved)")
    if chain.write is None:
        raise ConfigError('this chain has no times to "write" and "read" activations: there is nothing to overlap')
    if chain.layers > MOST_LAYERS:
        raise ConfigError(
            f"{chain.layers} layers are too many for an exact plan with overlapping copies; at most {MOST_LAYERS}"
        )


def _tables(chain: Chain, budget: float, half: bool) -> Tables:
    """Return the chain as the search reads it."""
    layers, size = chain.layers, chain.size
    assert chain.write is not None and chain.read is not None
    none = np.zeros(1)
    before_loss = layers + 1
    below = np.array([(1 << i) - 1 for i in range(layers + 1)], np.int64)  # a_1 .. a_i
    single = below - np.concatenate(([0], below[:-1]))
    reads_input = single[:-1]
    backward_reads = {"input": reads_input, "output": single[1:], "both": reads_input | single[1:]}[chain.needs]
    wanted = np.concatenate(([0], below[:layers] if chain.needs == "input" else below[1:], [below[layers]]))
    reads = np.concatenate(([0], reads_input, backward_reads, single[-1:]))

    sets = np.arange(1 << layers)
    members = (sets[:, None] >> np.arange(layers)) & 1
    backward_sum = np.concatenate((none, np.cumsum(chain.backward)))
    last = np.minimum(np.arange(layers + 1) + (chain.needs == "input"), layers)
    tail = backward_sum[last]
    # Reads in descending order: what is read first has the most left to do after it.
    set_read = np.zeros(len(sets))
    total = np.zeros(len(sets))
    for i in range(layers, 0, -1):
        total += members[:, i - 1] * chain.read[i - 1]
        set_read = np.maximum(set_read, members[:, i - 1] * (total + tail[i]))
    set_size = members @ size[1:]

    allocates = np.concatenate((none, size[1:] + chain.tmp(True), size[:-1] + chain.tmp(False), size[-1:]))
    others, lack = np.zeros(layers + 2, np.int64), np.zeros(layers + 2)
    for k in range(1, layers + 2):
        code = layers + k
        others[k] = wanted[k - 1] & ~reads[code]
        held = size[0] + set_size[reads[code]] + allocates[code] + (size[k] if k < before_loss else 0.0)
        lack[k] = set_size[others[k]] + held - budget
    return Tables(
        layers=layers,
        budget=budget,
        half=half,
        duration=np.concatenate((none, chain.forward, chain.backward, none)),
        allocates=allocates,
        reads=reads,
        write=np.concatenate((none, chain.write)),
        read=np.concatenate((none, chain.read)),
        size=size,
        wanted=wanted,
        tail=tail,
        forward_sum=np.concatenate((none, np.cumsum(chain.forward))),
        backward_sum=backward_sum,
        set_size=set_size,
        set_least=np.where(members, size[1:], np.inf).min(axis=1),
        set_forward=members @ chain.forward,
        set_read=set_read,
        set_copies=members @ chain.read,
        set_longest=(members * chain.read).max(axis=1),
        others=others,
        lack=lack,
    )


def _room(layers: int, room: int) -> tuple[States, Lists, Lists]:
    """Return what the search writes to. Pages that it does not touch cost nothing."""
    table = 4 * room  # a power of two, like `room`
    states = States(
        time=np.zeros(room),
        until=np.zeros((room, 3)),
        doing=np.zeros((room, 4), np.int8),
        resident=np.zeros(room, np.int32),
        disk=np.zeros(room, np.int32),
        parent=np.zeros(room, np.int32),
        begun=np.zeros((room, 3), np.int8),
        following=np.full(room, -1, np.int32),
        dead=np.zeros(room, np.int8),
        keys=np.full(table, -1, np.int64),
        first=np.zeros(table, np.int32),
    )
    now, then = (
        Lists(
            at=np.full(count, -1, np.int64),
            length=np.zeros(count, np.int64),
            used=np.zeros(1, np.int64),
            a=np.empty(room),
            b=np.empty(room),
            c=np.empty(room),
        )
        for count in (1 << layers, (layers + 2) << layers)
    )
    return states, now, then


def _rows(layers: int, states: States, last: int) -> list[Row]:
    """Return what was started from the first state to the last, in the order of the starts."""
    rows: list[Row] = []
    while last:
        computes, writes, reads = states.begun[last].tolist()
        if reads:
            rows.append((Op.READ, reads))
        if writes:
            rows.append((Op.WRITE, writes))
        if computes == 2 * layers + 1:
            rows.append((Op.LOSS, layers))
        elif computes:
            rows.append((Op.FORWARD, computes) if computes <= layers else (Op.BACKWARD, computes - layers))
        last = int(states.parent[last])
    return rows[::-1]
