"""The strategies: each builds the `Exchange` of one training step. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from distsim.errors import ConfigError, nearest
from distsim.exchanges import all_to_all, parameter_server, ring
from distsim.schedule import Exchange

STRATEGIES: dict[str, Callable[[int, int], Exchange]] = {
    "all-to-all": all_to_all.build,
    "parameter-server": parameter_server.build,
    "ring": ring.build,
}


def build(strategy: str, workers: int, params: int) -> Exchange:
    """Build the exchange of `params` parameters among `workers` workers.

    Raises: ConfigError for an unknown strategy, fewer than 1 worker or a negative parameter count.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}{nearest(strategy, STRATEGIES)}")
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    if params < 0:
        raise ConfigError(f"the parameter count cannot be negative, but is {params}")
    return STRATEGIES[strategy](workers, params)
