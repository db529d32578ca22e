"""The optimum among persistent schedules: what is stored stays until the backward that it is stored for.

The dynamic programme of Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, "Optimal checkpointing for heterogeneous
chains" (2019, INRIA RR-9302), with this package's rules of memory, for all that a backward may need. The state
(i, j, m) stands for the backwards j, ..., i + 1 with a_i resident and m left beside it, from which g_j is paid. LOSS
is backward L + 1, which reads a_L and has no gradient. The first a_k that is stored splits a state: a forward path
from i to k, then (k, j, m - a_k), then (i, k, m). Where a backward reads its layer's output, a_k may stay on for B_k:
a second table, `held`, has the states in which a_j is resident at the start, paid from m too; what lies below
may be made before B_j or after it.

Sizes that are multiples of something not too small are taken as they are, and the plan is the optimum. Others are
rounded to parts of the budget; the plan is then the best that is found to fit unrounded.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from distsim import compiled
from distsim.memory.chain import Chain
from distsim.memory.plan import InfeasibleBudget, MemoryPlan, Op, with_drops
from distsim.memory.weights import BOTH, INPUT, OUTPUT, SAVED, Rows, Weights, nudged, peak, weights

SLOTS = 2_000
"""Most parts of a budget whose sizes have no common measure; rotor takes 500."""
WORK = 200**3
"""Layers^3, twice that if outputs are read, up to which there are so many parts; for 400 layers there are 500 to 700.
Time grows with layers^1.5 then, and memory with their root.
"""
EXACT_WORK, EXACT_CELLS = 5e10, 1.2e8
"""Nothing is rounded while that work, and layers^2 / 2, times the number of multiples in the budget are below these:
about a second, and half a GB."""
SPARE = 0.03
"""Part of the budget by which a plan of rounded sizes may have to stay below it."""
NEVER = 1 << 60
BLOCK = 8
STATE, RECORDED = -1, 0
NOTHING = np.zeros((0, 0, 0), np.int64)


def optimal(chain: Chain, budget: float) -> MemoryPlan:
    """Return the fastest persistent plan within a budget.

    Raises: InfeasibleBudget, which says the least budget that a persistent plan can have.
    """
    return with_drops(chain, [(Op(op), layer) for op, layer in rows_within(weights(chain), budget)])


def rows_within(exact: Weights, budget: float) -> Rows:
    """Return the operations of `optimal`, without drops."""
    layers = len(exact.forward) - 1
    lowest, picks = compiled.call(least, layers**3 // 2, exact)
    lowest = nudged(exact, lowest, 1)
    if budget < lowest:
        raise InfeasibleBudget(budget, lowest)
    work = layers**3 * (2 if exact.kind >= OUTPUT else 1)
    everything = float(exact.keep.sum() + exact.need.max() + exact.forward_tmp.max())
    unit = measure(exact)
    parts = min(budget, everything) / unit
    whole = parts * work <= EXACT_WORK and parts * layers**2 / 2 <= EXACT_CELLS
    if whole:
        slots = math.floor(parts * (1 + 1e-12))
    else:
        slots = int(SLOTS * min(1.0, math.sqrt(WORK / work)))
        budget = min(budget, 2 * everything)  # room for what rounding up adds
        unit = budget / slots
    # To the nearest part errors even out, but where parts are few what is rounded down is preferred too often. Rounded
    # up, whatever fits in parts fits.
    for rounding, spare in ((np.rint, 0 if whole else math.ceil(SPARE * slots)), (np.ceil, 0)):
        rounded = exact._replace(
            **{name: rounding(getattr(exact, name) / unit).astype(np.int64) for name in Weights._fields[1:-1]}
        )
        tables = compiled.call(fill, layers**3 * slots // 6, rounded, slots, spare)
        for room in range(slots, slots - spare - 1, -1):
            rows: Rows = compiled.call(trace, layers**2, rounded, room, (NOTHING, *tables))
            if rows and (whole or compiled.call(peak, len(rows), exact, np.array(rows)) <= nudged(exact, budget, -1)):
                return rows
    rows = compiled.call(trace, layers**2, rounded, slots, (picks, *tables))
    return rows


def measure(exact: Weights) -> float:
    """Return the largest number of which all sizes are whole multiples, exactly; of 0.1 and 0.3 it is tiny.

    If all are 0, it is 1.
    """
    sizes = {Fraction(each) for column in exact[1:-1] for each in column.tolist()}
    denominator = math.lcm(*(each.denominator for each in sizes))
    return (math.gcd(*(int(each * denominator) for each in sizes)) or denominator) / denominator


def least(w: Weights) -> Any:
    """Return the least budget of a persistent plan, and for each state what leads to it: k, RECORDED, or -1: neither.

    For table 2 it is 1 where keeping a_j needs no more than dropping it.
    """
    n = len(w.size)
    found = np.full((3, n, n + 1), np.inf)
    pick = np.full((3, n, n + 1), -1, np.int64)
    rest = 2 if w.kind >= OUTPUT else 0
    for i in range(n - 1, -1, -1):
        for j in range(i + 1, n + 1):
            path = 0.0
            for t in range(1 if w.kind >= OUTPUT and j < n else 0, -1, -1):
                held = w.size[j] if t else 0
                path = 0.0
                if j == i + 1 and (j == n or t or w.kind == INPUT):
                    found[t, i, j] = w.need[j]
                for k in range(i + 1, j):
                    path = max(path, (w.size[k - 1] if k - 1 > i else 0) + w.size[k] + w.forward_tmp[k])
                    value = max(held + w.grad[j] + path, w.size[k] + found[t, k, j], found[rest, i, k])
                    if value < found[t, i, j]:
                        found[t, i, j], pick[t, i, j] = value, k
            if w.kind == OUTPUT and j < n:
                value = max(w.need[j], found[0, i, j - 1] if j - 1 > i else 0)
                if value <= found[1, i, j]:
                    found[1, i, j], pick[1, i, j] = value, -1
            if w.kind == SAVED and i + 1 < n:
                inner = found[0, i + 1, j] if j > i + 1 else 0
                whole = w.grad[j] + w.keep[i + 1] + w.forward_tmp[i + 1]
                value = max(whole, w.need[i + 1], w.keep[i + 1] + inner)
                if value < found[0, i, j]:
                    found[0, i, j], pick[0, i, j] = value, RECORDED
            if w.kind >= OUTPUT and j < n:
                path = max(path, (w.size[j - 1] if j - 1 > i else 0) + w.size[j] + w.forward_tmp[j])
                value = max(w.grad[j] + path, found[1, i, j])
                if value < found[0, i, j]:
                    found[0, i, j], pick[0, i, j] = value, j
            if w.kind >= OUTPUT:
                found[2, i, j] = min(found[0, i, j], found[1, i, j])
                pick[2, i, j] = 1 if found[1, i, j] <= found[0, i, j] else 0
    return w.size[0] + found[0, 0, n], pick


def limits(w: Weights, slots: int, spare: int) -> Any:
    """Return which m a state is tabulated for: up to `top`, from where on more is of no use; from `bottom` on.

    Below `bottom[i]` no state (i, j) is ever left with, even if all that can be is stored beneath a_i.
    """
    n = len(w.size)
    top = np.zeros((n, n + 1), np.int64)
    bottom = np.zeros(n, np.int64)
    below = w.size[0]
    for i in range(n):
        below += w.keep[i] if i else 0
        bottom[i] = max(0, slots - spare - below)
    for j in range(1, n + 1):
        held = w.size[j] if w.kind >= OUTPUT and j < n else 0
        for i in range(j - 1, -1, -1):
            store = w.keep[i + 1] if i + 1 < n else 0
            tmp = w.forward_tmp[i + 1] if i + 1 < n else 0
            enough = max(held + w.grad[j] + store + tmp, w.need[i + 1] + store)
            if j > i + 1:
                enough = max(enough, store + top[i + 1, j], top[i, j - 1])
            top[i, j] = enough
    start = np.zeros((3, n, n + 1), np.int64)
    cells = 0
    for t in range(3 if w.kind >= OUTPUT else 1):
        for i in range(n):
            room = slots - w.size[0] - (w.size[i] if i else 0)
            for j in range(i + 1, n + 1):
                top[i, j] = min(top[i, j], room)
                start[t, i, j] = cells
                cells += max(0, top[i, j] + 1)
    return top, bottom, start, cells


def fill(w: Weights, slots: int, spare: int) -> Any:
    """Return the least time of forwards of every state: at [start of (table, i, j) + m]; inf where there is none.

    Table 0: a_j is not resident at first; 1: it is; 2: the lesser of both (where backwards read outputs).
    Blocks of i are done together, for each time that a state (k, j) is fetched from memory.
    """
    n = len(w.size)
    top, bottom, start, cells = limits(w, slots, spare)
    table = np.full(cells, np.inf)
    rest = 2 if w.kind >= OUTPUT else 0
    low = np.full((3, n, n + 1), NEVER)
    path = np.zeros((n, n + 1), np.int64)
    time = np.zeros((n, n + 1))
    for i in range(n):
        for k in range(i + 1, n):
            pair = (w.size[k - 1] if k - 1 > i else 0) + w.size[k] + w.forward_tmp[k]
            path[i, k] = max(path[i, k - 1], pair)
            time[i, k] = time[i, k - 1] + w.forward[k]
    above = n
    while above > 0:
        block = max(0, above - BLOCK)
        for j in range(block + 1, n + 1):
            for k in range(j - 1, block - 1, -1):
                if k < above:  # all that splits (k, j) has been
                    others(w, table, low, top, bottom[k], start, path[k], time[k], k, j)
                for t in range(1 if w.kind >= OUTPUT and j < n else 0, -1, -1):
                    for i in range(min(above, k) - 1, block - 1, -1):
                        at = max(w.grad[j] + path[i, k], low[t, k, j] + w.size[k], low[rest, i, k])
                        at = max(at, min(bottom[i], top[i, j]))
                        if t:
                            at = max(at, w.size[j] + w.grad[j] + path[i, k])
                        if at <= top[i, j]:
                            low[t, i, j] = min(low[t, i, j], at)
                            upper, lower = start[t, k, j] - w.size[k], start[rest, i, k]
                            ends = top[i, j], top[k, j] + w.size[k], top[i, k]
                            split(table, start[t, i, j], upper, lower, ends, at, time[i, k])
        above = block
    return table, top, start


def split(table: Any, out: int, upper: int, lower: int, ends: tuple[int, int, int], at: int, time: float) -> None:
    """Take a split of a state into account: of m from `at` on, with all three at their offset + m up to their end.

    Beyond their ends the two parts are constant. Slices let LLVM vectorise.
    """
    last, end_upper, end_lower = ends
    end = min(last, end_upper, end_lower) + 1
    if at < end:
        to, one, two = table[out + at : out + end], table[upper + at : upper + end], table[lower + at : lower + end]
        for m in range(len(to)):
            value = time + one[m] + two[m]
            to[m] = value if value < to[m] else to[m]
        at = end
    known, varies, end = upper + end_upper, lower, end_lower
    if end_lower < end_upper:
        known, varies, end = lower + end_lower, upper, end_upper
    end = min(last, end) + 1
    if at < end:
        to, one = table[out + at : out + end], table[varies + at : varies + end]
        shift = time + table[known]
        for m in range(len(to)):
            value = shift + one[m]
            to[m] = value if value < to[m] else to[m]
        at = end
    if at <= last:
        to = table[out + at : out + last + 1]
        value = time + table[upper + end_upper] + table[lower + end_lower]
        for m in range(len(to)):
            to[m] = value if value < to[m] else to[m]


def others(
    w: Weights, table: Any, low: Any, top: Any, bottom: int, start: Any, path: Any, time: Any, i: int, j: int
) -> None:
    """Take into account what else (i, j) may be: one backward; recording i + 1 first; going on to j and keeping a_j."""
    n = len(w.size)
    last, o = top[i, j], start[0, i, j]
    lowest = min(bottom, last)
    if j == i + 1 and (j == n or w.kind in (INPUT, BOTH)):
        t = 1 if w.kind == BOTH and j < n else 0
        at = max(w.need[j], lowest)
        for m in range(at, last + 1):
            table[start[t, i, j] + m] = 0.0
        low[t, i, j] = at if at <= last else NEVER
    if w.kind == OUTPUT and j < n:
        at = max(w.need[j], lowest)
        if j > i + 1:
            at = max(at, low[0, i, j - 1])
        for m in range(at, last + 1):
            value = table[start[0, i, j - 1] + min(m, top[i, j - 1])] if j > i + 1 else 0.0
            table[start[1, i, j] + m] = min(table[start[1, i, j] + m], value)
        if at <= last:
            low[1, i, j] = min(low[1, i, j], at)
    if w.kind == SAVED and i + 1 < n:
        store = w.keep[i + 1]
        at = max(w.grad[j] + store + w.forward_tmp[i + 1], w.need[i + 1], lowest)
        if j > i + 1:
            at = max(at, low[0, i + 1, j] + store)
        for m in range(at, last + 1):
            inner = table[start[0, i + 1, j] + min(m - store, top[i + 1, j])] if j > i + 1 else 0.0
            table[o + m] = min(table[o + m], w.forward[i + 1] + inner)
        if at <= last:
            low[0, i, j] = min(low[0, i, j], at)
    if w.kind >= OUTPUT:
        if j < n:
            at = max(w.grad[j] + path[j], low[1, i, j], lowest)
            for m in range(at, last + 1):
                table[o + m] = min(table[o + m], time[j] + table[start[1, i, j] + m])
            if at <= last:
                low[0, i, j] = min(low[0, i, j], at)
        for m in range(last + 1):
            table[start[2, i, j] + m] = min(table[o + m], table[start[1, i, j] + m])
        low[2, i, j] = min(low[0, i, j], low[1, i, j])


def trace(w: Weights, slots: int, tables: tuple[Any, Any, Any, Any]) -> Any:
    """Return the operations that a table, or else `pick`, stands for within a budget; none if there are none."""
    pick, table, top, start = tables  # a tuple, which `compiled.call` leaves as it is
    n = len(w.size)
    room = slots - w.size[0]
    picked = len(pick) > 0
    if not picked and (room < 0 or table[start[0, 0, n] + min(room, top[0, n])] == np.inf):
        return [(0, 0)][:0]
    rows = [(0, 0)]
    stack = [(STATE, 0, 0, n, room)]
    while stack:
        op, t, i, j, m = stack.pop()
        if op != STATE:
            rows.append((op, i))
            continue
        if i == j:
            continue
        if t == 2:
            if picked:
                t = pick[2, i, j]
            else:
                at = min(m, top[i, j])
                t = 1 if table[start[1, i, j] + at] <= table[start[0, i, j] + at] else 0
        k = pick[t, i, j] if picked else best(w, table, top, start, t, i, j, m)
        if t and w.kind == OUTPUT and k < 0:
            stack.append((STATE, 0, i, j - 1, m))
            stack.append((3, 0, j, 0, 0))
        elif k < 0:
            stack.append((2, 0, n - 1, 0, 0) if j == n else (3, 0, j, 0, 0))
        elif k == RECORDED:
            stack.append((3, 0, i + 1, 0, 0))
            stack.append((STATE, 0, i + 1, j, m - w.keep[i + 1]))
            stack.append((1, 0, i + 1, 0, 0))
        else:
            if k == j:
                stack.append((STATE, 1, i, j, m))
            else:
                stack.append((STATE, 2 if w.kind >= OUTPUT else 0, i, k, m))
                stack.append((STATE, t, k, j, m - w.size[k]))
            for x in range(k, i, -1):
                stack.append((0, 0, x, 0, 0))
    return rows[1:]


def best(w: Weights, table: Any, top: Any, start: Any, t: int, i: int, j: int, m: int) -> int:
    """Return what a state of the table begins with: storing a_k, RECORDED, j to keep a_j for B_j; -1 for none."""
    n = len(w.size)
    held = w.size[j] if t else 0
    found, least_time = -1, np.inf
    path, time = 0, 0.0
    if t and w.kind == OUTPUT and m >= w.need[j]:
        least_time = table[start[0, i, j - 1] + min(m, top[i, j - 1])] if j > i + 1 else 0.0
    for k in range(i + 1, min(j, n - 1) + 1):
        path = max(path, (w.size[k - 1] if k - 1 > i else 0) + w.size[k] + w.forward_tmp[k])
        time += w.forward[k]
        value = np.inf
        if k < j:
            if m >= max(held + w.grad[j] + path, w.size[k]):
                first = table[start[t, k, j] + min(m - w.size[k], top[k, j])]
                value = time + first + table[start[2 if w.kind >= OUTPUT else 0, i, k] + min(m, top[i, k])]
        elif t == 0 and w.kind >= OUTPUT and m >= w.grad[j] + path:
            value = time + table[start[1, i, j] + min(m, top[i, j])]
        if value < least_time:
            found, least_time = k, value
    if w.kind == SAVED and i + 1 < n:
        store = w.keep[i + 1]
        if m >= max(w.grad[j] + store + w.forward_tmp[i + 1], w.need[i + 1]):
            inner = table[start[0, i + 1, j] + min(m - store, top[i + 1, j])] if j > i + 1 else 0.0
            if w.forward[i + 1] + inner <= least_time:
                found = RECORDED
    return found
