"""What the commands do, from Python: simulate one exchange, or all strategies side by side.

import distsim
result = distsim.simulate("ring", ranks=8, size="1 GiB", cluster="dgx_h100")
result                                  # a table in a notebook or at the prompt
distsim.compare(ranks=8, size="1 GiB")  # columns, for pandas.DataFrame for example
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from distsim import collectives, critical, exchanges, record, step
from distsim.cluster import Cluster, ideal, load
from distsim.errors import ConfigError, nearest
from distsim.lower import Posting
from distsim.schedule import ITEMSIZE
from distsim.step import Simulation
from distsim.tables import table
from distsim.units import format_bandwidth, format_bytes, format_time, parse_size

AUTO = "auto"
"""In place of a strategy: the fastest of all that fit."""
IDEAL = "ideal"
"""In place of a cluster: one ideal switch with as many devices as are needed."""

TYPES: Mapping[str, type] = {
    **{"strategy": str, "ranks": int, "params": int, "size_bytes": int, "dtype": str, "collective": str},
    **{"cluster": str, "sharing": str, "posting": str, "messages": int, "bytes": int, "time_s": float},
    **{"latency_bound_s": float, "bandwidth_bound_s": float, "any_algorithm_bound_s": float},
    **{"algbw_Bps": float, "busbw_Bps": float, "peak_staging_bytes": int},
}
"""The columns of every table of results, in SI units, and the type of each."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Result:
    """One simulated exchange. At a prompt and in a notebook it shows itself as a table."""

    simulation: Simulation
    """Everything: exchange, cluster, time of every task, traffic, bounds."""
    candidates: Mapping[str, float | str] = field(default_factory=dict)
    """With "auto": the time of each strategy in seconds, or why it does not fit."""

    @property
    def time_s(self) -> float:
        """When the last rank is done, in seconds."""
        return self.simulation.time_s

    @property
    def size_bytes(self) -> int:
        """Bytes of the array; as in nccl-tests the larger of what a rank has before and afterwards."""
        return self.simulation.exchange.params * ITEMSIZE[self.simulation.dtype]

    def values(self) -> dict[str, Any]:
        """Return the numbers that the command line prints with --json, in SI units."""
        simulation = self.simulation
        traffic, exchange, cluster = simulation.traffic, simulation.exchange, simulation.cluster
        return {
            "strategy": exchange.strategy,
            "ranks": exchange.workers,
            "params": exchange.params,
            "size_bytes": self.size_bytes,
            "dtype": simulation.dtype,
            "collective": exchange.collective,
            "cluster": cluster.name,
            "cluster_title": cluster.title,
            "sharing": cluster.sharing,
            "posting": simulation.posting,
            "messages": traffic.messages,
            "message_sizes": traffic.message_sizes,
            "bytes": traffic.bytes,
            "time_s": simulation.time_s,
            "latency_bound_s": simulation.latency_bound_s,
            "bandwidth_bound_s": simulation.bandwidth_bound_s,
            "any_algorithm_bound_s": simulation.any_algorithm_bound_s,
            "algbw_Bps": simulation.algbw_Bps,
            "busbw_Bps": simulation.busbw_Bps,
            "peak_staging_bytes": simulation.peak_staging_bytes,
            **({"candidates": dict(self.candidates)} if self.candidates else {}),
        }

    def row(self) -> dict[str, Any]:
        """Return the values that are columns of tables: those of `TYPES`."""
        values = self.values()
        return {name: values[name] for name in TYPES}

    def transfers(self) -> dict[str, list[Any]]:
        """Return columns with a row for each message: step, src, dst, chunk, bytes, start_s, finish_s, ...

        `schedule` numbers the parts of the exchange (1 is what follows the update, for servers).
        """
        spans = record.from_simulation(self.simulation).spans
        assert spans is not None, "simulations have spans"
        return dict(spans)

    def links(self) -> dict[str, list[Any]]:
        """Return columns with a row for each link of the cluster that is used: bytes, messages, busy_s, utilization.

        `busy_s` is how long its bytes take at its bandwidth, with its messages' overheads; `utilization` is
        that over the time of the exchange.
        """
        traffic, cluster = self.simulation.traffic, self.simulation.cluster
        ptr, links = cluster.routes(traffic.link_src, traffic.link_dst)
        hops, count = np.diff(ptr), len(cluster.bandwidth_Bps)
        link_bytes, messages = np.zeros(count, np.int64), np.zeros(count, np.int64)
        np.add.at(link_bytes, links, np.repeat(traffic.link_bytes, hops))
        np.add.at(messages, links, np.repeat(traffic.link_messages, hops))
        used = np.flatnonzero(messages)
        busy_s = (link_bytes / cluster.bandwidth_Bps + messages * cluster.overhead_s)[used]
        return {
            "link": [cluster.link_name(link) for link in used.tolist()],
            "bandwidth_Bps": cluster.bandwidth_Bps[used].tolist(),
            "bytes": link_bytes[used].tolist(),
            "messages": messages[used].tolist(),
            "busy_s": busy_s.tolist(),
            "utilization": (busy_s / self.time_s).tolist() if self.time_s > 0 else [],
        }

    def critical_path(self) -> dict[str, list[Any]]:
        """Return columns with a row for each cause and resource that the time went to, the longest first."""
        return columns(
            [asdict(each) for each in critical.critical_path(self.simulation)], critical.Segment.__annotations__
        )

    def busiest(self) -> dict[str, list[Any]]:
        """Return columns with a row for each of the busiest links, processors and hosts."""
        return columns([asdict(each) for each in critical.busiest(self.simulation)], critical.Usage.__annotations__)

    def setting(self) -> str:
        """Say in one line what was simulated, without the strategy."""
        exchange, cluster = self.simulation.exchange, self.simulation.cluster
        what = f"{exchange.workers} ranks, {exchange.params:,} parameters ({self.simulation.dtype})"
        return f"{what} on {cluster.name}: {cluster.title}"

    def title(self) -> str:
        """Say in one line what was simulated."""
        exchange = self.simulation.exchange
        collective = "" if exchange.collective == "all-reduce" else f" {exchange.collective}"
        return f"{exchange.strategy}{collective}: {self.setting()}"

    def summary(self) -> list[tuple[str, str]]:
        """Return names and values for humans."""
        simulation, traffic = self.simulation, self.simulation.traffic
        sizes = [f"{count:,} x {size:,} B" for size, count in traffic.message_sizes.items()]
        shown = ", ".join(sizes[:4]) + (f" and {len(sizes) - 4} more" if len(sizes) > 4 else "")
        rows = [
            ("messages", f"{traffic.messages:,}"),
            ("message sizes", shown or "none"),
            ("bytes", f"{traffic.bytes:,} ({format_bytes(traffic.bytes)})"),
            ("time", format_time(simulation.time_s)),
            ("  bound: chain of latencies", format_time(simulation.latency_bound_s)),
            ("  bound: busiest link", format_time(simulation.bandwidth_bound_s)),
            ("  bound: any algorithm", format_time(simulation.any_algorithm_bound_s)),
            ("algbw", bandwidth(simulation.algbw_Bps)),
            ("busbw", bandwidth(simulation.busbw_Bps)),
            ("peak staging of a rank", format_bytes(simulation.peak_staging_bytes)),
        ]
        if simulation.copies > 1:
            rows.append(("simulated, by symmetry", f"1 of {simulation.copies:,} messages that are alike"))
        for name, outcome in self.candidates.items():
            shown_time = format_time(outcome) if isinstance(outcome, float) else "does not fit"
            rows.append((f"  candidate: {name}", shown_time))
        return rows

    def __repr__(self) -> str:
        where = critical.explain(self.simulation)
        return f"{self.title()}\n\n{table(('one exchange', ''), self.summary())}\n\n{where}"

    def _repr_html_(self) -> str:
        from html import escape

        shown = table(("one exchange", ""), self.summary(), "html")
        return f"<p>{escape(self.title())}</p>{shown}<pre>{escape(critical.explain(self.simulation))}</pre>"


def simulate(
    strategy: str = AUTO,
    *,
    ranks: int,
    size: str | int | None = None,
    params: int | None = None,
    cluster: str | Cluster | None = None,
    dtype: str = "float32",
    collective: str = "all-reduce",
    sharing: str | None = None,
    posting: str = "eager",
    whole: bool = False,
) -> Result:
    """Simulate one exchange, as `distsim exchange` does.

    The array is `params` elements, or `size`: `"1 GiB"` or bytes, whose incomplete last element is left out,
    as nccl-tests does it. `cluster` is a shipped name, a YAML file, a `Cluster`, or None for one ideal switch;
    `sharing` ("fair" or "fifo") takes the place of the cluster's; `posting` is "eager", or "rounds" where a rank
    hands over a step's messages only once those of its step before are over; `whole` simulates every transfer
    also where symmetry would do. For the parameter server `ranks` are workers.

    Raises: ConfigError for everything that cannot be simulated.
    """
    if strategy == AUTO:
        results, misfits = simulate_all(
            ranks=ranks,
            size=size,
            params=params,
            cluster=cluster,
            dtype=dtype,
            collective=collective,
            sharing=sharing,
            posting=posting,
            whole=whole,
        )
        times = {name: result.time_s for name, result in results.items()}
        fastest = results[min(times, key=times.__getitem__)]
        return Result(simulation=fastest.simulation, candidates={**times, **misfits})
    count = elements(size, params, dtype)
    where = with_sharing(find_cluster(cluster, exchanges.ranks_of(strategy, ranks, collective)), sharing)
    simulation = step.simulate_strategy(
        strategy,
        ranks,
        count,
        where,
        dtype,
        collective=collective,
        posting=known_posting(posting),
        whole=whole,
        tell=lambda text: print(f"distsim: {strategy}: {text}", file=sys.stderr),
    )
    return Result(simulation=simulation)


def simulate_all(
    strategies: Sequence[str] | None = None, *, cluster: str | Cluster | None = None, **settings: Any
) -> tuple[dict[str, Result], dict[str, str]]:
    """Simulate strategies, by default all for the collective; `settings` are those of `simulate`.

    Return the results by strategy, and for those that do not fit the reason.

    Raises: ConfigError if none fits.
    """
    results, misfits = {}, {}
    if cluster is not None and cluster != IDEAL:
        cluster = find_cluster(cluster, 1)  # once for all; what is wrong with the file is no misfit
    for strategy in strategies if strategies is not None else known(settings.get("collective", "all-reduce")):
        try:
            results[strategy] = simulate(strategy, cluster=cluster, **settings)
        except ConfigError as error:
            misfits[strategy] = str(error)
    if not results:
        raise ConfigError(next(iter(misfits.values())))
    return results, misfits


def compare(strategies: Sequence[str] | None = None, **settings: Any) -> dict[str, list[Any]]:
    """Simulate strategies side by side, as `distsim compare` does; `settings` are those of `simulate`.

    Return columns with a row for each strategy; what does not fit has its reason in the column `error`.
    """
    results, misfits = simulate_all(strategies, **settings)
    return columns(
        [
            *({**result.row(), "error": None} for result in results.values()),
            *({"strategy": name, "ranks": settings["ranks"], "error": why} for name, why in misfits.items()),
        ],
        {**TYPES, "error": str},
    )


def known(collective: str) -> list[str]:
    """Return the strategies that can do a collective.

    Raises: ConfigError for an unknown collective.
    """
    collectives.find(collective)
    return list(exchanges.ALGORITHMS[collective])


def columns(rows: Sequence[Mapping[str, Any]], names: Mapping[str, type]) -> dict[str, list[Any]]:
    """Turn rows into columns; what a row lacks is None."""
    return {name: [row.get(name) for row in rows] for name in names}


def elements(size: str | int | None, params: int | None, dtype: str) -> int:
    """Return how many elements an array has that is given by its size or by their number.

    Raises: ConfigError unless exactly one is given.
    """
    if dtype not in ITEMSIZE:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, ITEMSIZE)}")
    if (size is None) == (params is None):
        raise ConfigError('expected either size, such as "1 GiB", or params, the number of elements')
    if params is not None:
        return params
    return (size if isinstance(size, int) else parse_size(size)) // ITEMSIZE[dtype]


def find_cluster(cluster: str | Cluster | None, devices: int) -> Cluster:
    """Return a cluster by name or file; the ideal one, which is the default, has `devices` devices.

    Raises: ConfigError if there is no such cluster.
    """
    if isinstance(cluster, Cluster):
        return cluster
    return ideal(devices) if cluster is None or cluster == IDEAL else load(cluster)


def with_sharing(cluster: Cluster, sharing: str | None) -> Cluster:
    """Return the cluster with its links shared in this way; None leaves the way that its file says.

    Raises: ConfigError for an unknown way.
    """
    if sharing is None:
        return cluster
    if sharing not in ("fair", "fifo"):
        raise ConfigError(f"unknown sharing {sharing!r}{nearest(sharing, ('fair', 'fifo'))}")
    return replace(cluster, sharing="fair" if sharing == "fair" else "fifo")


def known_posting(posting: str) -> Posting:
    """Return when ranks hand over their messages, as `lower` takes it.

    Raises: ConfigError for an unknown way.
    """
    if posting not in ("eager", "rounds"):
        raise ConfigError(f"unknown posting {posting!r}{nearest(posting, ('eager', 'rounds'))}")
    return "rounds" if posting == "rounds" else "eager"


def bandwidth(Bps: float | None) -> str:
    """Return a bandwidth for humans; None is that of an exchange that sends nothing."""
    return "none: nothing is sent" if Bps is None else format_bandwidth(Bps)
