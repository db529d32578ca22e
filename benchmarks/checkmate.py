"""The integer programme that planners of rematerialization are measured against, solved by SciPy's HiGHS.

In the style of Jain, Jain, Nrusimha, Gholami, Abbeel, Keutzer, Stoica and Gonzalez, "Checkmate: breaking the memory
wall with optimal tensor rematerialization" (2020): there is a stage for LOSS and for each backward; in a stage each
layer may run forward once more, in ascending order, before the backward does. Checkmate frees tensors by variables
of their own; here there is one for each activation and slot that says whether it is resident, which is the same.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

from distsim.memory.chain import Chain


def checkmate(chain: Chain, budget: float, passes: int = 1, time_limit_s: float = np.inf) -> float | None:
    """Return the least time of a chain without saved intermediates within `budget`, None if there is none.

    `passes`: how often the layers may be run through in one stage. 1 is Checkmate; the least time over all
    schedules is reached with as many as an optimal one has, and no more of them can make it less.
    """
    assert chain.saved is None, "a chain of plain activations"
    layers, size = chain.layers, chain.size
    # Slots in order: (stage, layer of a forward), and at the end of each stage (stage, 0) for LOSS or the backward.
    slots = [(s, i) for s in range(layers + 1) for i in [*list(range(1, layers + 1)) * passes, 0]]
    runs, resident = 0, len(slots)  # variables: slot runs; then a_i is resident in a slot

    def held(slot: int, layer: int) -> int:
        return resident + slot * layers + layer - 1

    variables = resident + len(slots) * layers
    rows: list[tuple[dict[int, float], float]] = []  # sum of coefficients * variables <= limit
    least = np.zeros(variables)
    costs = np.zeros(variables)
    for slot, (stage, layer) in enumerate(slots):
        backward = layers + 1 - stage  # the one at the end of this stage; L + 1 for LOSS
        gradients = float(size[backward]) if stage else 0.0
        reads = [layer - 1] if layer else []
        if layer:
            costs[runs + slot] = chain.forward[layer - 1]
        else:
            least[runs + slot] = 1
            if stage:
                reads = [backward - 1] * (chain.needs != "output") + [backward] * (chain.needs != "input")
            else:
                reads = [layers]
            gradients += float(size[backward - 1])
        for each in range(1, layers + 1):
            before = {held(slot - 1, each): -1.0} if slot else {}
            made = {runs + slot: -1.0} if each == layer else {}
            rows.append(({held(slot, each): 1.0, **before, **made}, 0.0))
        if layer:
            rows.append(({runs + slot: 1.0, held(slot, layer): -1.0}, 0.0))
        rows += [({runs + slot: 1.0, held(slot, each): -1.0}, 0.0) for each in reads if each]
        tmp = chain.tmp(True)[layer - 1] if layer else chain.tmp(False)[backward - 1] if stage else 0.0
        memory = {held(slot, each): float(size[each]) for each in range(1, layers + 1)}
        rows.append(({**memory, runs + slot: float(tmp)}, budget - float(size[0]) - gradients))

    entries = [(row, column, value) for row, (terms, _) in enumerate(rows) for column, value in terms.items()]
    places, columns, values = zip(*entries, strict=True)
    matrix = csr_matrix((values, (places, columns)), (len(rows), variables))
    result = milp(
        costs,
        integrality=np.ones(variables),
        bounds=Bounds(least, np.ones(variables)),
        constraints=LinearConstraint(matrix, ub=np.array([limit for _, limit in rows])),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    return None if result.x is None else float(result.fun) + float(chain.backward.sum())
