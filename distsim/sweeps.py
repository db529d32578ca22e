"""Sweeps: a grid of clusters, strategies, rank counts and sizes, simulated on all cores, resumed if interrupted."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from distsim import api, exchanges, tables
from distsim.cluster import PACKAGE, Cluster, parse, shipped, summary
from distsim.errors import ConfigError, DistsimError
from distsim.executors import Executor, InProcess, cores, processes
from distsim.journal import Journal
from distsim.units import parse_sizes
from distsim.version import __version__

Row = dict[str, Any]

TYPES: Mapping[str, type] = {
    **{"cluster": str, "strategy": str, "ranks": int, "size_bytes": int},  # the point of the grid
    **{"algorithm": str},  # what "auto" has chosen, or the strategy
    **{name: kind for name, kind in api.TYPES.items() if name not in ("cluster", "strategy", "ranks", "size_bytes")},
    **{"error": str},  # why this point cannot be simulated
}
"""The columns of the table, and the type of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One simulation of a sweep, with all that it needs on another machine."""

    cluster: str
    """As the user wrote it."""
    cluster_yaml: str
    """The cluster's file; empty for the ideal one."""
    strategy: str
    ranks: int
    size_bytes: int
    dtype: str
    collective: str
    sharing: str | None
    posting: str

    def key(self) -> str:
        """Return what the journal knows the point by: a digest of all of it, and of distsim itself."""
        return hashlib.sha256(json.dumps([__version__, _code(), asdict(self)]).encode()).hexdigest()


@cache
def _code() -> str:
    """Return a digest of distsim's source: who changes the simulator must not be given what it said before."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A sweep that is finished."""

    rows: Sequence[Row]
    """One for each point, in the order of the grid."""
    reused: int
    """How many of them were in the journal."""

    def columns(self) -> dict[str, list[Any]]:
        """Return the table."""
        return api.columns(self.rows, TYPES)

    def errors(self) -> list[str]:
        """Return why points could not be simulated."""
        return [row["error"] for row in self.rows if row["error"] is not None]


def grid(
    *,
    clusters: Sequence[str],
    strategies: Sequence[str],
    ranks: Sequence[int],
    sizes_bytes: Sequence[int],
    dtype: str = "float32",
    collective: str = "all-reduce",
    sharing: str | None = None,
    posting: str = "eager",
) -> list[Point]:
    """Return the points of a grid: the last of clusters, strategies, ranks and sizes varies fastest.

    Raises: ConfigError for what is wrong at every point of the grid, such as an unknown cluster or strategy.
    """
    for name, values in (("clusters", clusters), ("strategies", strategies), ("ranks", ranks), ("sizes", sizes_bytes)):
        if not values:
            raise ConfigError(f"a sweep without {name}; expected at least one")
    for strategy in strategies:
        if strategy != api.AUTO:
            exchanges.parse(strategy, collective)
    for count in ranks:
        if count < 1:
            raise ConfigError(f"ranks must be at least 1, not {count}")
    api.elements(0, None, dtype)
    api.known_posting(posting)
    texts = {name: _yaml(name) for name in clusters}
    for name, text in texts.items():
        api.with_sharing(_parsed(name, text) if text else api.find_cluster(None, 1), sharing)
    return [
        Point(
            cluster=cluster,
            cluster_yaml=texts[cluster],
            strategy=strategy,
            ranks=count,
            size_bytes=size,
            dtype=dtype,
            collective=collective,
            sharing=sharing,
            posting=posting,
        )
        for cluster, strategy, count, size in product(clusters, strategies, ranks, sizes_bytes)
    ]


def _yaml(cluster: str) -> str:
    """Return the text of a cluster's file. `summary` has the errors for what is wrong with it."""
    if cluster == api.IDEAL:
        return ""
    summary(cluster)
    file = importlib.resources.files(PACKAGE) / f"{cluster}.yaml" if cluster in shipped() else Path(cluster)
    return file.read_text("utf-8")


@lru_cache(maxsize=8)
def _parsed(name: str, text: str) -> Cluster:
    return parse(text, name, name)


def simulate_point(point: Point) -> Row:
    """Simulate one point; what does not fit gives a row with an `error`."""
    asked = {name: value for name, value in asdict(point).items() if name in TYPES and value is not None}
    try:
        result = api.simulate(
            point.strategy,
            ranks=point.ranks,
            size=point.size_bytes,
            cluster=_parsed(point.cluster, point.cluster_yaml) if point.cluster_yaml else None,
            dtype=point.dtype,
            collective=point.collective,
            sharing=point.sharing,
            posting=point.posting,
        )
    except ConfigError as error:
        found: Row = {"error": str(error)}
    except MemoryError:
        raise DistsimError(
            f"not enough memory for {point.strategy} on {point.ranks} ranks; use fewer ranks, or fewer --jobs"
        ) from None
    else:
        found = result.row()
        found["algorithm"] = found["strategy"]
    return {name: {**found, **asked}.get(name) for name in TYPES}


def run(
    points: Sequence[Point],
    executor: Executor,
    journal: Journal | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> Outcome:
    """Simulate points on any executor with `submit`; those that the journal has are not simulated again.

    Every finished point goes into the journal at once, so an exception, Ctrl-C for example, loses nothing but
    what was running. `done` is told how many more points are finished, as they are.

    Raises: DistsimError if a process of the executor dies.
    """
    keys = [point.key() for point in points]
    rows: dict[str, Row] = dict(journal.rows) if journal is not None else {}
    missing = {key: point for key, point in zip(keys, points, strict=True) if key not in rows}
    times = Counter(keys)
    reused = sum(key not in missing for key in keys)
    done(reused)
    finished: SimpleQueue[Future[Row]] = SimpleQueue()
    waiting: dict[Future[Row], str] = {}

    def collect(block: bool) -> None:
        future = finished.get(block)
        key = waiting.pop(future)
        rows[key] = future.result()
        if journal is not None:
            journal.add(key, rows[key])
        done(times[key])

    try:
        for key, point in missing.items():
            future = executor.submit(simulate_point, point)
            waiting[future] = key
            future.add_done_callback(finished.put)
            while not finished.empty():
                collect(block=False)
        while waiting:
            collect(block=True)
    except BrokenProcessPool:
        raise DistsimError(
            "a process of the sweep has died, perhaps for lack of memory; use fewer jobs "
            '(in a script of your own, call distsim.sweep under `if __name__ == "__main__":`)'
        ) from None
    finally:
        for future in waiting:
            future.cancel()
    return Outcome(rows=[rows[key] for key in keys], reused=reused)


def journal_of(out: Path) -> Path:
    """Return where the finished points of a sweep are kept that will be written to `out`."""
    return out.with_name(f"{out.name}.journal")


def complete(
    points: Sequence[Point], out: Path | None, start: Callable[[int], AbstractContextManager[Executor]]
) -> Outcome:
    """Simulate what is missing of a sweep and write its table: the same bytes, however often it was interrupted.

    `start` opens an executor for a number of points; it is not asked where none is missing. Without `out`
    nothing is kept. A bar on stderr shows how far it is, once that takes a second.

    Raises: ConfigError for a file that cannot be written.
    """
    from tqdm import tqdm

    if out is not None:
        tables.check_writable(out)
    with Journal(journal_of(out)) if out is not None else nullcontext() as journal:
        missing = sum(point.key() not in journal.rows for point in points) if journal is not None else len(points)
        slow_s = 0.1 if sys.stderr.isatty() else 10
        with (
            tqdm(total=len(points), unit="point", file=sys.stderr, delay=1, mininterval=slow_s) as bar,
            start(missing) if missing else nullcontext(InProcess()) as executor,
        ):
            outcome = run(points, executor, journal, bar.update)
        if out is not None:
            tables.write(out, outcome.columns(), TYPES)
    return outcome


def names(text: str | Sequence[str]) -> list[str]:
    """Split names at commas, but not those between the options of a strategy: "ring,ring:channels=2,x=1,tree"."""
    found: list[str] = []
    for part in text.split(",") if isinstance(text, str) else text:
        head, option, _ = part.partition("=")
        if option and ":" not in head and found:
            found[-1] += f",{part.strip()}"
        else:
            found.append(part.strip())
    return found


def sweep(
    *,
    clusters: str | Sequence[str] = api.IDEAL,
    strategies: str | Sequence[str],
    ranks: int | Sequence[int],
    sizes: str | Sequence[int],
    dtype: str = "float32",
    collective: str = "all-reduce",
    sharing: str | None = None,
    posting: str = "eager",
    out: str | Path | None = None,
    jobs: int | None = None,
    executor: Executor | None = None,
) -> dict[str, list[Any]]:
    """Simulate a grid, as `distsim sweep` does; return columns with a row for each point.

    `clusters` and `strategies` are names, also as one text with commas; `sizes` is a text such as
    `"1MiB:1GiB:x4"`, or bytes. With `out`, a .csv or .parquet file, finished points are kept and a second call
    simulates only what is missing. It runs in `jobs` processes (default: one for each core; 1 is this one), or on
    `executor`: anything with `submit(function, *arguments)` that returns a future.

    Raises: ConfigError for mistakes; a point that does not fit is a row with an `error` instead.
    """
    points = grid(
        clusters=names(clusters),
        strategies=names(strategies),
        ranks=[ranks] if isinstance(ranks, int) else ranks,
        sizes_bytes=parse_sizes(sizes) if isinstance(sizes, str) else sizes,
        dtype=dtype,
        collective=collective,
        sharing=sharing,
        posting=posting,
    )

    def start(missing: int) -> AbstractContextManager[Executor]:
        return processes(min(missing, cores() if jobs is None else jobs)) if executor is None else nullcontext(executor)

    return complete(points, None if out is None else Path(out), start).columns()
