"""The strategies: each builds the `Exchange` of one training step. A new one is a file and a line here."""

from __future__ import annotations

import operator
from collections.abc import Callable

from distsim.errors import ConfigError, nearest
from distsim.exchanges import all_to_all, parameter_server, ring
from distsim.schedule import Exchange

STRATEGIES: dict[str, Callable[[int, int], Exchange]] = {
    "all-to-all": all_to_all.build,
    "parameter-server": parameter_server.build,
    "ring": ring.build,
}


MAX_WORKERS = 4096
"""Most workers: a ring of 4,096 has 33.5 million rows, which take gigabytes while they are built and checked;
tables for more do not fit in memory."""

MAX_PARAMS = 2**47
"""Most parameters: up to here all that one rank of MAX_WORKERS receives, in bytes of float64, fits in 63 bits."""


def build(strategy: str, workers: int, params: int) -> Exchange:
    """Build the exchange of `params` parameters among `workers` workers.

    Raises: ConfigError for an unknown strategy, and for counts outside 1..MAX_WORKERS and 0..MAX_PARAMS.
    """
    try:
        workers, params = operator.index(workers), operator.index(params)  # NumPy's integers are welcome, too
    except TypeError:
        raise ConfigError(f"workers and params must be whole numbers, not {workers!r} and {params!r}") from None
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}{nearest(strategy, STRATEGIES)}")
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    if workers > MAX_WORKERS:
        raise ConfigError(f"at most {MAX_WORKERS} workers, not {workers}: tables for more do not fit in memory")
    if params > MAX_PARAMS:
        raise ConfigError(f"at most {MAX_PARAMS} parameters (2^47), not {params}")
    if params < 0:
        raise ConfigError(f"the parameter count cannot be negative, but is {params}")
    return STRATEGIES[strategy](workers, params)
