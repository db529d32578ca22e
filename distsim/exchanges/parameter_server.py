"""Parameter server: workers push gradients to a server, it updates, and they pull the new weights.

2n messages of p parameters. The server is one rank more than the workers: the last one (Li et al., "Scaling
Distributed Machine Learning with the Parameter Server", OSDI 2014).
"""

from __future__ import annotations

import numpy as np

from distsim.schedule import Exchange, Op, Schedule, Source, split


def build(workers: int, params: int) -> Exchange:
    """Build push (contributions: the workers' gradients) and pull (contribution: the server's weights)."""
    worker = np.arange(workers)
    is_server = (np.arange(workers + 1) == workers)[:, None]
    push = Schedule.of(
        ranks=workers + 1,
        chunk_elements=split(params, 1),
        step=0,
        src=worker,
        dst=workers,
        chunk=0,
        op=Op.REDUCE,
        source=Source.INPUT,
        contributes=~is_server,
        must_hold=is_server,
    )
    pull = Schedule.of(
        ranks=workers + 1,
        chunk_elements=split(params, 1),
        step=0,
        src=workers,
        dst=worker,
        chunk=0,
        op=Op.COPY,
        source=Source.INPUT,
        contributes=is_server,
        must_hold=True,
    )
    return Exchange(strategy="parameter-server", workers=workers, gradients=push, parameters=pull)
