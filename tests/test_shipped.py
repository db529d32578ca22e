"""Every shipped cluster with every algorithm: on all of its devices where that is quick, on 16 of them elsewhere."""

from __future__ import annotations

from functools import cache

import pytest

from distsim import exchanges
from distsim.cluster import Cluster, load, shipped
from distsim.errors import ConfigError
from distsim.step import simulate, simulate_strategy

MOST = 16
CASES = [(collective, strategy) for collective, table in exchanges.ALGORITHMS.items() for strategy in table]


@cache
def cluster(name: str) -> Cluster:
    return load(name)


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize(("collective", "strategy"), CASES)
def test_every_algorithm_runs_on_every_cluster(name: str, collective: str, strategy: str) -> None:
    """`simulate` itself holds every result against its lower bounds."""
    place = cluster(name)
    workers = min(len(place.devices), MOST)
    params = 64 * 1000
    exchange = exchanges.build(strategy, workers, params, collective)
    if exchange.ranks > len(place.devices):  # a server takes a device of its own
        exchange = exchanges.build(strategy, workers - (exchange.ranks - workers), params, collective)
    fair, in_order = simulate(exchange, place), simulate(exchange, place, sharing="fifo")
    assert 0 < fair.time_s < 1
    assert fair.traffic.messages == in_order.traffic.messages > 0
    assert fair.latency_bound_s == in_order.latency_bound_s >= 0
    assert fair.bandwidth_bound_s == in_order.bandwidth_bound_s > 0


@pytest.mark.parametrize("name", shipped())
def test_all_devices_together(name: str) -> None:
    """A ring through the whole cluster, in full up to 1,024 devices and by symmetry, where there is one, beyond."""
    place = cluster(name)
    workers = len(place.devices)
    try:
        result = simulate_strategy("ring", workers, workers * 1000, place)
    except ConfigError as error:  # hashed routes are not symmetric, and so many rows do not fit
        assert place.routing == "ecmp" and workers > exchanges.MAX_WORKERS, error
        return
    assert result.traffic.messages == workers * 2 * (workers - 1)
    assert result.time_s >= result.any_algorithm_bound_s
