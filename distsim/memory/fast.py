"""Plans of hundreds of layers: the best persistent plan, improved; `bound` says how near the optimum it is.

A plan is cut at its backwards into phases, as in `bound`; what it keeps across each backward says all: in phase t the
forwards run that make what B_t reads, and what is kept across it, from what was kept before, in ascending order. So a
plan is a table, phases by layers, of what is kept: nothing, a_j, or abar_j. The best persistent plan is improved by
taking a few layers at a time: with all other layers as they are, what is best for these follows exactly, phase by
phase, from the least time for each state of theirs (a shortest path). Nothing gets worse, and a plan need not stay
persistent: what is kept may be dropped before its backward, to be made again later.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distsim import compiled
from distsim.memory import exact
from distsim.memory.bound import rooms
from distsim.memory.chain import Chain
from distsim.memory.persistent import rows_within
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Op, with_drops
from distsim.memory.weights import BOTH, INPUT, OUTPUT, SAVED, Rows, Weights, weights

WORK = 3.5e6
"""Times a state is looked at in improving, about 0.25 s on 200 layers."""

SHORT = 17
"""Up to one layer less, larger blocks are tried, all layers at once if they are few."""

EXACT = 12
"""Layers for which the exact planner is asked where no persistent plan fits."""


def plan(chain: Chain, budget: float) -> MemoryPlan:
    """Return a fast plan without offload, never slower than the best persistent one.

    Raises: InfeasibleBudget, which says the least budget of all plans for chains of up to 12 layers; for longer ones
    it is the least of persistent plans, and now and then one that is not persistent needs less.
    """
    w = weights(chain)
    try:
        rows = rows_within(w, budget)
    except InfeasibleBudget:
        if chain.layers > EXACT:
            raise
        return exact.optimal(chain, budget, offload=False)
    kept = kept_by(w, rows)
    better = compiled.call(improve, int(WORK), w, kept, takes(w), rooms(w, budget), budget, int(WORK), 1)
    made = rows_of(w, better)
    if forward_time(chain, made) < forward_time(chain, rows):
        rows = made
    return with_drops(chain, [(Op(op), layer) for op, layer in rows])


def forward_time(chain: Chain, rows: Any) -> float:
    """Return the time of a plan's forwards."""
    return float(sum(chain.forward[layer - 1] for op, layer in rows if op in (Op.FORWARD, Op.RECORD)))


def kept_by(w: Weights, rows: Rows) -> Any:
    """Return what a plan keeps across B_t (LOSS is L + 1): [t, j] 0 nothing, 1 a_j, 2 abar_j. Row L + 2 is nothing."""
    n = len(w.size)
    kept = np.zeros((n + 2, n), np.int8)
    wanted = np.zeros(n, np.int8)
    for op, layer in reversed(rows):
        phase = layer + 1 if op == Op.LOSS else layer
        if op in (Op.FORWARD, Op.RECORD):
            wanted[layer] = 0
            wanted[layer - 1] = max(wanted[layer - 1], 1)
        else:
            kept[phase] = wanted
            wanted = np.maximum(wanted, read_by(w.kind, phase, n))
        wanted[0] = 0
    return kept


def read_by(kind: int, phase: int, n: int) -> Any:
    """Return what B_t, or LOSS, reads, as in `kept_by`."""
    read = np.zeros(n, np.int8)
    if phase < n and kind != INPUT:
        read[phase] = 2 if kind == SAVED else 1
    if phase == n or kind != OUTPUT:
        read[phase - 1] = max(read[phase - 1], 1)
    read[0] = 0
    return read


def rows_of(w: Weights, kept: Any) -> Rows:
    """Return the operations that keep what a table says."""
    n = len(w.size)
    rows: Rows = []
    for phase in range(n, 0, -1):
        there = kept[phase + 1]
        wanted = np.maximum(kept[phase], read_by(w.kind, phase, n))
        runs = []
        needed = False
        for j in range(n - 1, 0, -1):
            needed = (needed and there[j] == 0) or wanted[j] > there[j]
            if needed:
                runs.append((int(Op.RECORD if wanted[j] == 2 else Op.FORWARD), j))
        rows += reversed(runs)
        rows.append((int(Op.LOSS), n - 1) if phase == n else (int(Op.BACKWARD), phase))
    return rows


def takes(w: Weights) -> Any:
    """Return what keeping takes beside all that B_t reads anyway: [t, j, 1 for a_j, 2 for abar_j], t up to L + 1."""
    n = len(w.size)
    found = np.zeros((n + 1, n, 3))
    found[:, :, 1], found[:, :, 2] = w.size, w.keep
    for phase in range(2, n + 1):
        read = [False, w.kind == BOTH or phase == n, True]
        found[phase, phase - 1, read] -= w.size[phase - 1]
    return found


def improve(w: Weights, kept: Any, takes: Any, room: Any, budget: float, work: int, seed: int) -> Any:
    """Return a table of what is kept that takes no more time, after so much work on blocks of layers."""
    n = len(w.size)
    levels = 3 if w.kind == SAVED else 2
    short = n <= SHORT
    most = 6 * work if short else work
    wide = 1
    while wide < n - 1 and n * 2 * (wide + 1) * levels ** (2 * wide + 2) <= (4 * work if short else work // 20):
        wide += 1
    block = np.zeros(wide, np.int64)
    done, quiet, turn = 0, 0, 0
    while done < most and quiet < 40 * n and n > 1:
        # One layer, two, ... in turn, drawn at random (by a linear congruence), near each other and farther apart.
        count = 1 + turn % wide
        seed = (seed * 1103515245 + 12345) % 2147483648
        j = 1 if count == n - 1 else 1 + (seed >> 8) % (n - 1)
        spread = 1 if count == n - 1 else min(n - 1, 3 + (turn // wide) % 20)
        number = 0
        while number < count and j < n:
            block[number] = j
            number += 1
            seed = (seed * 1103515245 + 12345) % 2147483648
            j += 1 + (seed >> 8) % spread
        turn += 1
        done += n * (n + 2 * number * levels ** (2 * number))
        quiet = 0 if renew(w, kept, takes, room, budget, block, number, levels) else quiet + 1
    return kept


def renew(w: Weights, kept: Any, takes: Any, room: Any, budget: float, block: Any, number: int, levels: int) -> bool:
    """Keep of a block of layers (ascending) what is best with all other layers as they are; return if it is faster."""
    n = len(w.size)
    states = levels**number
    level = np.zeros((states, number), np.int64)
    for state in range(states):
        rest = state
        for b in range(number):
            level[state, b] = rest % levels
            rest //= levels
    # Layers of the block and those right above them are looked at one by one, all between as segments.
    single = np.full(n + 1, -2, np.int64)  # -1: with its neighbours' state as it is; b: the block's b-th
    for b in range(number):
        if block[b] + 1 < n and single[block[b] + 1] == -2:
            single[block[b] + 1] = -1
        single[block[b]] = b
    bottom = block[0]
    time = np.full((n + 2, states), np.inf)
    came = np.zeros((n + 2, states), np.int64)
    time[n + 1, 0] = 0.0
    items = np.zeros(4 * number + 1, np.int64)
    costs, needs, peaks = np.zeros((len(items), 2)), np.zeros((len(items), 2), np.int64), np.zeros((len(items), 2))
    sums = np.zeros((len(items), 2))
    which, there, reads = np.zeros(len(items), np.int64), np.zeros(len(items), np.int64), np.zeros(len(items), np.int64)
    fixed_wanted, wanted, beneath = np.zeros_like(which), np.zeros_like(which), np.zeros_like(which)
    sizes, bare = np.zeros((len(items), 3)), np.zeros(len(items))
    old = np.zeros(n + 2, np.int64)
    old_time = 0.0
    for phase in range(n, bottom - 1, -1):
        count, fixed = segments(w, kept, takes, phase, single, items, costs, needs, peaks, sums)
        for b in range(number):
            power = levels**b
            old[phase] += power * kept[phase, block[b]]
        for at in range(count):
            j = items[at]
            if j < 0:
                continue
            which[at] = single[j]
            there[at] = kept[phase + 1, j]
            reads[at] = wanted_by(w, phase, j)
            fixed_wanted[at] = max(kept[phase, j], reads[at])
            sizes[at, 1], sizes[at, 2] = w.size[j], w.keep[j]
            beneath[at] = -1 if j == 1 else single[j - 1]
            bare[at] = 0.0 if j == 1 else w.size[j - 1]
            if j > 1 and (wanted_by(w, phase, j - 1) or (beneath[at] < 0 and kept[phase, j - 1])):
                bare[at] = 0.0
        for now in range(states):
            across = fixed
            allowed = True
            for b in range(number):
                what, j = level[now, b], block[b]
                if what:
                    if j >= phase or (what == 1 and j == phase - 1 and (w.kind == INPUT or w.kind == SAVED)):
                        allowed = False
                    across += takes[phase, j, what]
            if not allowed or across > room[phase]:
                continue
            total = w.size[0] + w.grad[phase]
            for at in range(count):
                if items[at] < 0:
                    total += sums[at, 0]
                    continue
                b = which[at]
                wanted[at] = max(level[now, b], reads[at]) if b >= 0 else fixed_wanted[at]
                total += sizes[at, wanted[at]]
            for before in range(states):
                if time[phase + 1, before] == np.inf:
                    continue
                cost, memory, need = time[phase + 1, before], total, 0
                for at in range(count):
                    if items[at] < 0:
                        if memory + peaks[at, need] > budget:
                            cost = np.inf
                            break
                        cost += costs[at, need]
                        memory += sums[at, 1] - sums[at, 0]
                        need = needs[at, need]
                        continue
                    b = which[at]
                    has = level[before, b] if b >= 0 else there[at]
                    memory -= sizes[at, wanted[at]]
                    need = 1 if (need == 1 and has == 0) or wanted[at] > has else 0
                    if need:
                        under = beneath[at]
                        extra = 0.0 if under >= 0 and level[now, under] else bare[at]
                        if memory + sizes[at, max(1, wanted[at])] + extra + w.forward_tmp[items[at]] > budget:
                            cost = np.inf
                            break
                        cost += w.forward[items[at]]
                    memory += sizes[at, has]
                if before == old[phase + 1] and now == old[phase]:
                    old_time += cost - time[phase + 1, before]
                if cost < time[phase, now]:
                    time[phase, now], came[phase, now] = cost, before
    if not time[bottom, 0] < old_time - 1e-9 * old_time:
        return False
    state = 0
    for phase in range(bottom, n + 1):
        for b in range(number):
            kept[phase, block[b]] = level[state, b]
        state = came[phase, state]
    return True


def held(w: Weights, j: int, what: int) -> float:
    return 0.0 if what == 0 else (w.keep[j] if what == 2 else w.size[j])


def wanted_by(w: Weights, phase: int, j: int) -> int:
    """Return what of layer j B_t, or LOSS, reads."""
    n = len(w.size)
    if j == phase and w.kind != INPUT:
        return 2 if w.kind == SAVED else 1
    return 1 if j == phase - 1 and (phase == n or w.kind != OUTPUT) else 0


def segments(
    w: Weights,
    kept: Any,
    takes: Any,
    phase: int,
    single: Any,
    items: Any,
    costs: Any,
    needs: Any,
    peaks: Any,
    sums: Any,
) -> tuple[int, float]:
    """Sum up what of a phase the block does not change, from the last layer down: layers, and -1 for what is between.

    For each of these segments: what its forwards take if a_j at its top is not needed from above, and if it is;
    whether it needs what is beneath; its peak beside what is wanted beneath it and there above it; what of it is wanted
    and there. Also returns what other layers keep across the phase.
    """
    n = len(w.size)
    fixed = 0.0
    count = 0
    open_segment = False
    for j in range(n - 1, 0, -1):
        if kept[phase, j] and single[j] < 0:
            fixed += takes[phase, j, kept[phase, j]]
        if single[j] != -2:
            items[count] = j
            count += 1
            open_segment = False
            continue
        if not open_segment:
            items[count] = -1
            for way in range(2):
                costs[count, way], needs[count, way], peaks[count, way], sums[count, way] = 0.0, way, -np.inf, 0.0
            count += 1
            open_segment = True
        at = count - 1
        there, wanted = kept[phase + 1, j], max(kept[phase, j], wanted_by(w, phase, j))
        beneath = max(kept[phase, j - 1], wanted_by(w, phase, j - 1)) if j > 1 else 1
        extra = w.size[j - 1] if beneath == 0 else 0.0
        # Peaks are beside all that is wanted in the segment up to here, which the sum below takes off again.
        sums[at, 0] += held(w, j, wanted)
        for way in range(2):
            runs = (needs[at, way] == 1 and there == 0) or wanted > there
            needs[at, way] = 1 if runs else 0
            if runs:
                costs[at, way] += w.forward[j]
                made = w.keep[j] if wanted == 2 else w.size[j]
                now = sums[at, 1] - sums[at, 0] + made + extra + w.forward_tmp[j]
                peaks[at, way] = max(peaks[at, way], now)
        sums[at, 1] += held(w, j, there)
    return count, fixed
