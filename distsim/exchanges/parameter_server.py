"""Parameter server: workers push gradients to servers, these update, and the workers pull the new weights.

2nk messages of p/k elements with k servers, each of which keeps its share of the parameters: 2(a + n p/k/B) or,
if that is more, 2(a + p/B), the links of the servers or of the workers (Li et al., "Scaling Distributed Machine
Learning with the Parameter Server", OSDI 2014). Dedicated servers are ranks beyond the workers; colocated ones
are workers, evenly spread, which exchange nothing with themselves: 2(n - 1)k messages.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from distsim.errors import ConfigError
from distsim.exchanges.recipe import Recipe, Rows, chosen
from distsim.schedule import Ints, Op, Source


def all_reduce(workers: int, *, servers: int = 1, placement: Literal["dedicated", "colocated"] = "dedicated") -> Recipe:
    """Push (contributions: the workers' gradients), then pull (contributions: the servers' weights)."""
    dedicated = placement == "dedicated"
    if not dedicated and servers > workers:
        raise ConfigError(f"servers={servers}: colocated servers are among the workers, so {workers} at most")
    shard = np.arange(servers, dtype=np.int32)
    server = workers + shard if dedicated else shard * np.int32(workers) // np.int32(servers)
    beyond = servers if dedicated else 0
    rank = np.arange(workers + beyond)[:, None]
    is_worker, serves = rank < workers, rank == server  # (ranks, 1) and (ranks, chunks)

    def push(src: Ints) -> Rows:
        worker = src[src < workers]
        to = (worker + shard[:, None]) % servers  # everybody begins with another shard
        return chosen(Rows(0, worker, server[to], to, Op.REDUCE, Source.INPUT), server[to] != worker)

    def pull(src: Ints) -> Rows:
        at = np.flatnonzero(np.isin(src, server))
        own = np.searchsorted(server, src[at]).astype(np.int32)
        to = (np.arange(workers, dtype=np.int32)[:, None] + own) % workers
        return chosen(Rows(0, src[at], to, own, Op.COPY, Source.INPUT), to != src[at])

    return Recipe(
        chunks=servers,
        rows=push,
        servers=beyond,
        contributes=is_worker,
        must_hold=serves,
        parameters=Recipe(chunks=servers, rows=pull, servers=beyond, contributes=serves, must_hold=is_worker | serves),
    )
