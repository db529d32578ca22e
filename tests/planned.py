"""Memory plans for tests: random walks over all that is legal, and a workload whose blocks run by a plan.

Runs under test name the workload `planned:build`; see `copy_to`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from distsim.memory.plan import MemoryPlan, Op, Row, parse
from trainers import memory
from trainers.offload import host_store
from trainers.workload import Workload
from trainers.workloads import language_model


def walk(layers: int, chosen: Callable[[int], int], most: int = 6, transfers: bool = True) -> MemoryPlan:
    """Return a plan that is legal in a chain with `saved`: up to `most` random operations before each that must be.

    `chosen(n)` returns a number below n.
    """
    rows: list[Row] = []
    held: dict[int, bool] = {0: False}  # of what is resident: whether all of abar_i
    stored: set[tuple[int, bool]] = set()

    def legal() -> list[Row]:
        found = [(op, i) for i in range(1, layers + 1) if i not in held and i - 1 in held for op in (F, A)]
        found += [(Op.DROP, i) for i in held if i]
        found += [(Op.DROP_SAVED, i) for i in held if held[i]]
        if transfers:
            found += [(Op.WRITE, i) for i in held if i]
            found += [(Op.WRITE_SAVED, i) for i in held if held[i]]
            found += [(Op.READ_SAVED if whole else Op.READ, i) for i, whole in sorted(stored) if i not in held]
        return found

    def take(op: Op, layer: int) -> None:
        rows.append((op, layer))
        if op in (F, A, Op.READ, Op.READ_SAVED):
            held[layer] = op in (A, Op.READ_SAVED)
        elif op in (Op.WRITE, Op.WRITE_SAVED):
            stored.add((layer, op == Op.WRITE_SAVED))
        elif op == Op.DROP_SAVED:
            held[layer] = False
        else:
            del held[layer]

    def reach(layer: int) -> None:
        """Have a_i resident."""
        for each in range(max(i for i in held if i <= layer) + 1, layer + 1):
            take(A if chosen(2) else F, each)

    def wander() -> None:
        for _ in range(chosen(most + 1)):
            possible = legal()
            take(*possible[chosen(len(possible))])

    wander()
    reach(layers)
    rows.append((Op.LOSS, layers))
    for layer in range(layers, 0, -1):
        wander()
        reach(layer - 1)
        if not held.get(layer):
            if layer in held:
                take(Op.DROP, layer)
            take(A, layer)
        take(Op.BACKWARD, layer)
    return MemoryPlan.of(rows)


F, A = Op.FORWARD, Op.RECORD


def build(*, plan: str = "", copies: bool = False) -> Workload:
    """The language model with dropout, its three blocks by a plan or, without one, as they are."""
    work = language_model.build(layers=3, width=32, context=16, dropout=0.1)
    if plan:
        blocks = work.model.get_submodule("blocks")
        memory.apply(blocks, parse(plan.replace("-", " "), 3), store=host_store() if copies else None)  # type: ignore[arg-type]
    return work


def copy_to(folder: Path) -> None:
    """Put this module where runs in `folder` find it: among the modules of the current directory."""
    folder.mkdir(exist_ok=True)
    shutil.copy(__file__, folder / "planned.py")
