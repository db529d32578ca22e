"""A proven lower bound on the time of any plan that recomputes, by pricing memory (a Lagrangian relaxation).

Cut a schedule at its backwards into phases L + 1 (up to LOSS), L, ..., 1 (up to the end of B_t). Draw a cell (t, j) for
"a_j is available in phase t": F_j leads from (t, j - 1) to (t, j), and keeping a_j across B_t from (t, j) to
(t - 1, j). What B_t reads must be reached from a_0, which is available in all phases, so a schedule contains a tree
to all cells that backwards read, and its forwards cost at least what the tree's do. What is kept across B_t must fit
beside all that B_t itself needs. Instead of forbidding more, charge price_t for every unit of it, and refund price_t
times the room: the cheapest tree, refunds deducted, is a lower bound for any prices that are not negative. All cells
that are read lie on the border of the drawing, so trees need not cross and the cheapest is found by a dynamic
programme over intervals of phases (as Erickson, Monma and Veinott do for networks in the plane, 1987). Subgradient
steps raise the bound.

With saved intermediates abar_j, recorded in phase t, may be kept up to B_j, and is a_j to all phases between. Of long
chains only what every second, third, ... backward reads must be reached: the bound is weaker, and as valid.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim import compiled
from distsim.memory.chain import Chain, Floats
from distsim.memory.weights import BOTH, OUTPUT, SAVED, Weights, weights

STEPS, WORK = 60, 6e8
"""Steps at most, and additions over all of them: about half a second."""
FEWEST, MOST_WORK = 3, 4e9
"""Steps at least, and additions that are too many for these: about 1.5 seconds."""


class Moments(NamedTuple):
    """What is read, in order: LOSS reads a_L, then each B_t what it does, abar_t before its input.

    Where B_t reads both input and output, only the input: its output, which B_(t + 1) has read, is there for nothing.
    """

    layer: npt.NDArray[np.int64]
    """Which a_j, or abar_j, is read."""
    phase: npt.NDArray[np.int64]
    whole: npt.NDArray[np.bool_]
    """Whether it is abar_j."""
    last: npt.NDArray[np.int64]
    """Of each layer j = 0, ..., L: the last moment that can be served from a plain a_j."""
    ends: npt.NDArray[np.bool_]
    """Whether the moment is the last of its phase."""


def moments(kind: int, layers: int, every: int) -> Moments:
    """Return the moments of a chain, of every so-manieth backward."""
    found = [(layers, layers + 1, False)]
    for phase in range(layers, 0, -every):
        if kind in (OUTPUT, SAVED):
            found.append((phase, phase, kind == SAVED))
        if kind != OUTPUT:
            found.append((phase - 1, phase, False))
    last = [
        max(at for at, (layer, _, whole) in enumerate(found) if layer >= j and not whole) for j in range(layers + 1)
    ]
    phases = [phase for _, phase, _ in found]
    ends = [at + 1 == len(found) or phases[at + 1] != phases[at] for at in range(len(found))]
    return Moments(
        layer=np.array([layer for layer, _, _ in found]),
        phase=np.array(phases),
        whole=np.array([whole for _, _, whole in found]),
        last=np.array(last),
        ends=np.array(ends),
    )


def rooms(w: Weights, budget: float) -> Floats:
    """Return what may be kept across each phase t = 0..L + 1 beside what B_t, or LOSS, itself needs; negative: none."""
    layers = len(w.forward) - 1
    room = np.full(layers + 2, budget - w.size[0])
    room[1:] -= w.need[1:]
    reads = np.arange(2, layers + 2) if w.kind != OUTPUT else np.array([layers + 1])
    room[reads[reads > 1]] -= w.size[reads[reads > 1] - 1]
    return room


def lower_bound(chain: Chain, budget: float, target: float | None = None) -> float:
    """Return a time below which no plan without offload can be; infinite if no plan at all fits into the budget.

    `target`, the time of a known plan, says how far to step, and where to stop.
    """
    w = weights(chain)
    room = rooms(w, min(budget, 2 * float(w.keep.sum() + w.need.max())))  # more changes nothing
    if (room[1:] < 0).any():
        return math.inf
    for every in range(1, chain.layers + 1):
        order = moments(w.kind, chain.layers, every)
        size = additions(order)
        if size * FEWEST <= MOST_WORK:
            break
    plain = float(chain.forward.sum())
    goal = 1.2 * plain if target is None else target - float(chain.backward.sum())
    steps = int(min(STEPS, max(FEWEST, WORK / size)))
    # Where memory is scarce at all it is so at B_L; a guess of how much time more of it would save there.
    first = 0.6 * max(0.0, goal - plain) / max(float(w.keep.sum()) - budget, 0.01 * float(w.keep.sum()) + 1e-300)
    found: float = compiled.call(climb, int(size) * steps, w, order, room, goal, first, steps)
    times = np.concatenate([chain.forward, chain.backward])
    if (times == np.rint(times)).all():  # so is the time of any plan
        return chain.plain_time + max(0.0, math.ceil(found - plain - 1e-9 * found))
    return chain.plain_time + max(0.0, found - plain - 1e-12 * found)


def additions(order: Moments) -> float:
    """Return about how many additions a step takes."""
    return float(((order.last + 1.0) ** 3).sum()) / 6


def climb(w: Weights, order: Moments, room: Any, goal: float, first: float, steps: int) -> Any:
    """Return the best bound on the time of forwards that some steps up find; each goes with an echo of those before."""
    n = len(w.size)
    prices, step = np.zeros(n + 1), np.zeros(n + 1)
    plain = 0.0
    for layer in range(1, n):
        plain += w.forward[layer]
    prices[n - 1] = first
    start = np.zeros(n + 1, np.int64)
    for j in range(n):
        start[j + 1] = start[j] + (order.last[j] + 1) ** 2
    table = np.full(start[n], np.inf)
    whole = np.full((n, len(order.layer) + 1), np.inf)
    best, length, stalled = plain, 1.0, 0
    tiny = 0.0
    for phase in range(1, n + 1):
        tiny = max(tiny, 1e-20 * room[phase] ** 2)
    for _ in range(steps):
        value = cheapest_tree(w, order, prices, start, table, whole)
        for phase in range(1, n + 1):
            value -= prices[phase] * room[phase] * (1 + 1e-13)  # high prices must not add what sums are rounded by
        stalled += 1
        if value > best:
            best, stalled = value, 0
        if stalled == 3:
            length, stalled = length / 2, 0
        kept = kept_by_tree(w, order, prices, start, table, whole)
        square = 0.0
        for phase in range(1, n + 1):
            step[phase] = kept[phase] - room[phase] + 0.3 * step[phase]
            if prices[phase] <= 0 and step[phase] < 0:
                step[phase] = 0.0
            square += step[phase] ** 2
        if square <= tiny + 1e-300 or value >= goal:
            break
        for phase in range(1, n + 1):
            prices[phase] = max(0.0, prices[phase] + length * (goal - value) / square * step[phase])
    return best


def weight(w: Weights, j: int, phase: int, whole: bool) -> Any:
    """Return what keeping a_j, or abar_j, across a phase's backward takes beside all that this reads anyway."""
    n = len(w.size)
    read = phase == j + 1 and (whole or w.kind == BOTH or phase == n)
    return (w.keep[j] if whole else w.size[j]) - (w.size[j] if read else 0.0)


def cumulated(w: Weights, order: Moments, prices: Any, j: int, whole: bool) -> Any:
    """Return the price of keeping a_j, or abar_j, from the first moment to each; a_0 is kept for nothing."""
    found = np.zeros(len(order.layer) + 1)
    for at in range(len(order.layer)):
        ends = order.ends[at] and j > 0
        phase = order.phase[at]
        found[at + 1] = found[at] + (prices[phase] * weight(w, j, phase, whole) if ends else 0.0)
    return found


def onward(w: Weights, order: Moments, start: Any, whole: Any, j: int, first: int) -> tuple[int, int, float, float]:
    """Return for `leave` where the costs from a_(j + 1) are, up to where, that from abar_(j + 1), and that of F."""
    if j + 1 == len(w.size):
        return 0, 0, np.inf, np.inf
    width = order.last[j + 1] + 1
    records = width < len(order.layer) and order.whole[width] and order.layer[width] == j + 1
    return start[j + 1] + first * width, width, whole[j + 1, first] if records else np.inf, w.forward[j + 1]


def leave(table: Any, up: int, width: int, recorded: float, forward: float, last: int) -> Any:
    """Return the cost of serving moments up to `last` by a tree that leaves a_j by F_(j + 1) at the first of them."""
    if last < width:
        return forward + table[up + last]
    return forward + recorded if last == width else np.inf


def cheapest_tree(w: Weights, order: Moments, prices: Any, start: Any, table: Any, whole: Any) -> Any:
    """Return the cost of the cheapest tree: forwards and prices.

    Of a_j at moment `first`, serving moments up to `last`, it is left in table[start of j + first * (width) + last];
    of abar_j, which serves up to B_j, in whole[j, first].
    """
    n = len(w.size)
    remade = 0.0
    for j in range(n):
        remade += w.forward[j]
    for j in range(n - 1, -1, -1):
        width = order.last[j] + 1
        price = cumulated(w, order, prices, j, False)
        for first in range(width - 1, -1, -1):
            row = start[j] + first * width
            up, width_up, recorded, forward = onward(w, order, start, whole, j, first)
            here = order.layer[first] == j and not order.whole[first]
            for at in range(first, width):
                table[row + at] = np.inf
            for at in range(first, width):
                cost = leave(table, up, width_up, recorded, forward, at)
                if at == first and here:
                    cost = 0.0
                if cost == np.inf:
                    continue
                table[row + at] = min(table[row + at], cost)
                # To keep a_j is never cheaper than all forwards up to it: such a price need not be looked at.
                kept = price[at + 1] - price[first]
                if at + 1 < width and (j == 0 or kept <= remade):
                    to = table[row + at + 1 : row + width]
                    rest = table[start[j] + (at + 1) * width + at + 1 : start[j] + (at + 2) * width]
                    shift = cost + kept
                    for last in range(len(to)):
                        value = shift + rest[last]
                        to[last] = value if value < to[last] else to[last]
        if w.kind == SAVED and j > 0:
            price = cumulated(w, order, prices, j, True)
            whole[j, width] = 0.0
            for first in range(width - 1, -1, -1):
                whole[j, first] = np.inf
                up, width_up, recorded, forward = onward(w, order, start, whole, j, first)
                here = order.layer[first] == j and not order.whole[first]
                for at in range(first, width):
                    cost = 0.0 if at == first and here else leave(table, up, width_up, recorded, forward, at)
                    whole[j, first] = min(whole[j, first], cost + price[at + 1] - price[first] + whole[j, at + 1])
        remade -= w.forward[j]
    return table[start[0] + order.last[0]]


def kept_by_tree(w: Weights, order: Moments, prices: Any, start: Any, table: Any, whole: Any) -> Any:
    """Return how much the cheapest tree keeps across each phase."""
    n = len(w.size)
    kept = np.zeros(n + 1)
    stack = [(0, 0, order.last[0], False)]
    while stack:
        j, first, last, is_whole = stack.pop()
        width = order.last[j] + 1
        if is_whole and first == width:  # B_j
            continue
        price = cumulated(w, order, prices, j, is_whole)
        best, until = np.inf, first
        up, width_up, recorded, forward = onward(w, order, start, whole, j, first)
        here = order.layer[first] == j and not order.whole[first]
        for at in range(first, last + 1):
            cost = 0.0 if at == first and here else leave(table, up, width_up, recorded, forward, at)
            if is_whole or at < last:
                cost += price[at + 1] - price[first]
                cost += whole[j, at + 1] if is_whole else table[start[j] + (at + 1) * width + last]
            if cost < best:
                best, until = cost, at
        if until > first or not here:
            stack.append((j + 1, first, until, until == width_up))
        if is_whole or until < last:
            stack.append((j, until + 1, last, is_whole))
            for at in range(first, until + 1):
                if order.ends[at] and j > 0:
                    kept[order.phase[at]] += weight(w, j, order.phase[at], is_whole)
    return kept
