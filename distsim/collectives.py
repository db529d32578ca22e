"""The collectives: each is its precondition, who contributes what, and its postcondition, who holds which sum.

Sizes and bus bandwidth follow nccl-tests (its doc/PERFORMANCE.md): the size of a collective is that of the
larger one of a rank's send and receive buffers. Of an array in n parts, part c belongs to rank c: there it
lies before an all-gather and after a reduce-scatter. Chunks may come in several blocks of n parts each (one
for each channel or segment), so it is chunk c mod n that belongs to rank c. Roots are rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distsim.errors import ConfigError, nearest

Bools = npt.NDArray[np.bool_]
Flags = Callable[[int, int], Bools]
"""Number of ranks and of chunks -> flags, shape (ranks, chunks); a view that takes little memory itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """What an exchange is to do, whichever way it does so."""

    contributes: Flags
    must_hold: Flags
    bus_factor: Callable[[int], float]
    """Bus bandwidth over algorithm bandwidth for n ranks, as nccl-tests defines it."""
    arrays: Callable[[int], int] = lambda ranks: 1
    """Number of arrays of `Exchange.params` elements that the chunks make up together."""
    max_workers: int | None = None
    """Most ranks for which the flags, shape (ranks, chunks), fit into memory while they are checked."""


def _everybody(ranks: int, chunks: int) -> Bools:
    return np.broadcast_to(np.True_, (ranks, chunks))


def _root(ranks: int, chunks: int) -> Bools:
    return np.broadcast_to(np.arange(ranks)[:, None] == 0, (ranks, chunks))


def _owner(ranks: int, chunks: int) -> Bools:
    """Rank r and chunk c where r = c mod ranks: a window that moves along one row of flags."""
    row = np.arange(1 - ranks, chunks) % ranks == 0
    return np.lib.stride_tricks.sliding_window_view(row, chunks)[::-1]


def _sender(ranks: int, chunks: int) -> Bools:
    """Rank r and chunk c where r = c div ranks (mod ranks): chunk s * ranks + d goes from s to d."""
    row = np.arange(ranks - ranks * ranks, chunks) // ranks % ranks == 0
    return np.lib.stride_tricks.sliding_window_view(row, chunks)[::-ranks]


PERSONALISED = "personalised-all-to-all"

COLLECTIVES: dict[str, Collective] = {
    "all-reduce": Collective(contributes=_everybody, must_hold=_everybody, bus_factor=lambda n: 2 * (n - 1) / n),
    "reduce-scatter": Collective(contributes=_everybody, must_hold=_owner, bus_factor=lambda n: (n - 1) / n),
    "all-gather": Collective(contributes=_owner, must_hold=_everybody, bus_factor=lambda n: (n - 1) / n),
    "broadcast": Collective(contributes=_root, must_hold=_everybody, bus_factor=lambda n: 1.0),
    "reduce": Collective(contributes=_everybody, must_hold=_root, bus_factor=lambda n: 1.0),
    PERSONALISED: Collective(
        contributes=_sender,
        must_hold=_owner,
        bus_factor=lambda n: (n - 1) / n,
        arrays=lambda n: n,
        max_workers=256,
    ),
}
"""By name. `personalised-all-to-all`, in which every rank has a part for every other one, is the `alltoall` of
nccl-tests; the strategy `all-to-all` is something else: an all-reduce that sends everything to everybody."""


def find(name: str) -> Collective:
    """Return a collective by its name.

    Raises: ConfigError with the nearest name.
    """
    if name not in COLLECTIVES:
        raise ConfigError(f"unknown collective {name!r}{nearest(name, COLLECTIVES)}")
    return COLLECTIVES[name]


def bus_factor(collective: str, ranks: int) -> float:
    """Return what turns algorithm bandwidth (size over time) into bus bandwidth (nccl-tests, PERFORMANCE.md).

    Raises: ConfigError for an unknown collective.
    """
    return find(collective).bus_factor(ranks)
