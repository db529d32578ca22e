"""Ring all-reduce: reduce-scatter, then all-gather, around a ring of ranks.

n * 2(n - 1) messages of p/n parameters. Each rank sends 2(n - 1)/n * p, the least that any all-reduce can
send per rank (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
J. Parallel Distrib. Comput. 69, 2009).
"""

from __future__ import annotations

import numpy as np

from distsim.schedule import Exchange, Op, Schedule, Source, split


def build(workers: int, params: int) -> Exchange:
    """Build the ring's exchange: at step s, rank r passes chunk r - s (mod n) on to rank r + 1."""
    step, src = np.divmod(np.arange(2 * (workers - 1) * workers), workers)
    schedule = Schedule.of(
        ranks=workers,
        chunk_elements=split(params, workers),
        step=step,
        src=src,
        dst=(src + 1) % workers,
        chunk=(src - step) % workers,
        op=np.where(step < workers - 1, Op.REDUCE, Op.COPY),
        source=Source.WORK,
    )
    return Exchange(strategy="ring", workers=workers, gradients=schedule)
