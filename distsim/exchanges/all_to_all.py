"""All-to-all: every worker sends its full gradient to every other one, and each averages for itself.

n(n - 1) messages of p parameters in a single round: the least latency, the most bytes.
"""

from __future__ import annotations

import numpy as np

from distsim.schedule import Exchange, Op, Schedule, Source, split


def build(workers: int, params: int) -> Exchange:
    """Build the exchange; rows go in shifts, so that no two neighbouring rows meet at a sender or receiver."""
    shift, src = np.divmod(np.arange((workers - 1) * workers), workers)
    schedule = Schedule.of(
        ranks=workers,
        chunk_elements=split(params, 1),
        step=0,
        src=src,
        dst=(src + shift + 1) % workers,
        chunk=0,
        op=Op.REDUCE,
        source=Source.INPUT,
    )
    return Exchange(strategy="all-to-all", workers=workers, gradients=schedule)
