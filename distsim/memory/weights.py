"""A chain as compiled loops read it: arrays from the input to LOSS."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distsim.memory.chain import Chain, Floats

INPUT, SAVED, OUTPUT, BOTH = range(4)
Rows = list[tuple[int, int]]
"""(operation, layer), without drops."""


class Weights(NamedTuple):
    """A chain as loops read it. Index i is layer i, 0 the input, L + 1 LOSS; sizes in any unit."""

    kind: int
    """What a backward reads: INPUT, SAVED, OUTPUT or BOTH."""
    size: npt.NDArray[Any]
    """Of a_0, ..., a_L."""
    keep: npt.NDArray[Any]
    """What storing a layer takes: abar_i with SAVED, else a_i."""
    grad: npt.NDArray[Any]
    """Of g_0, ..., g_L, and 0 for LOSS."""
    forward_tmp: npt.NDArray[Any]
    """Of F_1, ..., F_L; 0 for the input."""
    need: npt.NDArray[Any]
    """What is resident during B_i, or LOSS, beside a_(i-1): gradients, temporaries, and abar_i or a_i if read."""
    forward: Floats
    """Time of F_1, ..., F_L; 0 for the input."""


def weights(chain: Chain) -> Weights:
    """Return a chain's columns, in its own units."""
    kind = SAVED if chain.saved is not None else {"input": INPUT, "output": OUTPUT, "both": BOTH}[chain.needs]
    keep = chain.size if chain.saved is None else np.append(chain.size[:1], chain.saved)
    need = chain.size[1:] + chain.size[:-1] + chain.tmp(False) + (keep[1:] if kind != INPUT else 0.0)
    return Weights(
        kind=kind,
        size=chain.size,
        keep=keep,
        grad=np.append(chain.size, 0.0),
        forward_tmp=np.append(0.0, chain.tmp(True)),
        need=np.concatenate([[0.0], need, chain.size[-1:]]),
        forward=np.append(0.0, chain.forward),
    )


def nudged(w: Weights, memory: float, sign: int) -> float:
    """Return an amount of memory moved by what sums of sizes that are not whole numbers may be rounded by."""
    fractions = any((column != np.rint(column)).any() for column in w[1:-1])
    return memory * (1 + sign * 1e-12) if fractions else memory


def peak(w: Weights, rows: Any) -> Any:
    """Return the peak of operations, shape (rows, 2), if each thing goes once it is not read before it is made anew.

    Walks backwards: of each layer it is known how much is still read.
    """
    n = len(w.size)
    wanted = [0.0 * w.size[0]] * n
    resident = w.size[0]
    gradient = 0
    found = 0.0
    for at in range(len(rows) - 1, -1, -1):
        op, layer = rows[at][0], rows[at][1]
        if op == 3 or op == 2:
            now = w.need[layer + (op == 2)] + resident
            reads = layer if op == 2 else layer - 1
            # `need` has abar_i, or a_i where it is read; a_(i-1) is read by all but OUTPUT.
            if op == 3 and w.kind != INPUT:
                now -= wanted[layer]
                resident += w.keep[layer] - wanted[layer]
                wanted[layer] = w.keep[layer]
            gradient = layer if op == 3 else n
            if op == 3 and w.kind == OUTPUT:
                reads = 0
            if reads and wanted[reads] < w.size[reads]:
                now += w.size[reads] - wanted[reads]
                resident += w.size[reads] - wanted[reads]
                wanted[reads] = w.size[reads]
        else:
            made = w.size[layer] if op == 0 else w.keep[layer]
            now = resident - wanted[layer] + made + w.forward_tmp[layer] + w.grad[gradient]
            resident -= wanted[layer]
            wanted[layer] = 0
            if layer > 1 and wanted[layer - 1] < w.size[layer - 1]:
                now += w.size[layer - 1] - wanted[layer - 1]
                resident += w.size[layer - 1] - wanted[layer - 1]
                wanted[layer - 1] = w.size[layer - 1]
        found = max(found, now)
    return found
