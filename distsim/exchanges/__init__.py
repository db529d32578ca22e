"""The exchanges: every algorithm for every collective, by name and options, as in `build("ring:channels=2", 8, 10**6)`.

A new algorithm is a file and a line of the table below. The file has a function for each collective that the
algorithm can do; the function's keyword parameters are the options that users can give:

    def broadcast(workers: int, *, stride: int = 1) -> Recipe:
        def rows(src: Ints) -> Rows:
            ...what the ranks `src` send, as columns that broadcast against each other...
        return Recipe(chunks=1, rows=rows)

    "broadcast": {..., "mine": mine.broadcast},

`rows` takes any source ranks, so that parts of schedules that are too large to build can be looked at; what
is there before and must be there after is the collective's to say (`distsim.collectives`).
"""

from __future__ import annotations

import operator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from distsim.collectives import COLLECTIVES, PERSONALISED, bus_factor, find
from distsim.errors import ConfigError
from distsim.exchanges import (
    all_to_all,
    bruck,
    chain,
    direct,
    double_tree,
    halving_doubling,
    hierarchical,
    pairwise,
    parameter_server,
    recursive_doubling,
    ring,
    torus,
    tree,
)
from distsim.exchanges.recipe import Recipe, Symmetry
from distsim.exchanges.segments import repeated, segment
from distsim.exchanges.spec import Builder, Spec
from distsim.exchanges.spec import parse as _parse
from distsim.schedule import Exchange, Schedule, split

__all__ = [
    "ALGORITHMS",
    "COLLECTIVES",
    "MAX_PARAMS",
    "MAX_ROWS",
    "MAX_WORKERS",
    "STRATEGIES",
    "Spec",
    "Symmetry",
    "build",
    "bus_factor",
    "parse",
    "ranks_of",
    "rows_of",
    "segment",
    "symmetry_of",
]

ALGORITHMS: dict[str, dict[str, Builder]] = {
    "all-reduce": {
        "all-to-all": all_to_all.all_reduce,
        "direct": direct.all_reduce,
        "double-tree": double_tree.all_reduce,
        "halving-doubling": halving_doubling.all_reduce,
        "hierarchical": hierarchical.all_reduce,
        "parameter-server": parameter_server.all_reduce,
        "recursive-doubling": recursive_doubling.all_reduce,
        "ring": ring.all_reduce,
        "torus": torus.all_reduce,
        "tree": tree.all_reduce,
    },
    "reduce-scatter": {
        "direct": direct.reduce_scatter,
        "halving-doubling": halving_doubling.reduce_scatter,
        "hierarchical": hierarchical.reduce_scatter,
        "ring": ring.reduce_scatter,
        "torus": torus.reduce_scatter,
    },
    "all-gather": {
        "direct": direct.all_gather,
        "halving-doubling": halving_doubling.all_gather,
        "hierarchical": hierarchical.all_gather,
        "ring": ring.all_gather,
        "torus": torus.all_gather,
    },
    "broadcast": {"chain": chain.broadcast, "direct": direct.broadcast, "tree": tree.broadcast},
    "reduce": {"chain": chain.reduce, "direct": direct.reduce, "tree": tree.reduce},
    PERSONALISED: {
        "bruck": bruck.personalised_all_to_all,
        "direct": direct.personalised_all_to_all,
        "pairwise": pairwise.personalised_all_to_all,
    },
}
"""By collective: the strategies that can do it."""

STRATEGIES = ALGORITHMS["all-reduce"]
"""What can exchange gradients."""

MAX_WORKERS = 4096
"""Most workers: a ring of 4,096 has 33.5 million rows, which take gigabytes while they are built and checked;
tables for more do not fit in memory."""

MAX_ROWS = 2**26
"""Most rows of a table, for the same reason; options can multiply them."""

MAX_PARAMS = 2**47
"""Most parameters: up to here all that one rank of MAX_WORKERS receives, in bytes of float64, fits in 63 bits."""


def parse(strategy: str, collective: str = "all-reduce") -> Spec:
    """Read a strategy's spec; `str` of the result is its canonical form.

    Raises: ConfigError naming the collective, strategy, option or value that is unknown, and the nearest one.
    """
    find(collective)
    name = strategy.partition(":")[0]
    does = [other for other, algorithms in ALGORITHMS.items() if name in algorithms]
    if does and collective not in does:
        valid = ", ".join(ALGORITHMS[collective])
        raise ConfigError(f"{name} does {', '.join(does)}, not {collective}; valid for {collective}: {valid}")
    return _parse(strategy, ALGORITHMS[collective])


def build(strategy: str, workers: int, params: int, collective: str = "all-reduce") -> Exchange:
    """Build the exchange of `params` elements among `workers` workers.

    `strategy` is a spec such as `ring` or `tree:radix=4,segments=8`. `params` is the number of elements of the
    larger one of a worker's send and receive buffers, the size of nccl-tests.

    Raises: ConfigError for what is unknown or does not fit, and for counts outside 1..MAX_WORKERS and
    0..MAX_PARAMS.
    """
    spec, recipe, workers, params = _prepare(strategy, workers, params, collective)
    limit = COLLECTIVES[collective].max_workers or MAX_WORKERS
    if workers > limit:
        what = "workers" if limit == MAX_WORKERS else f"workers for {collective}"
        raise ConfigError(f"at most {limit} {what}, not {workers}: tables for more do not fit in memory")
    rows = sum(_estimate(part, workers) for part in (recipe, recipe.parameters) if part) * spec.segments
    if rows > MAX_ROWS:
        raise ConfigError(f"{spec} among {workers} workers has about {rows:,} transfers; {MAX_ROWS:,} fit in memory")
    schedules = [
        _schedule(spec, part, np.arange(workers + part.servers, dtype=np.int32), workers, params, collective)
        for part in (recipe, recipe.parameters)
        if part is not None
    ]
    return Exchange(
        strategy=str(spec),
        collective=collective,
        workers=workers,
        gradients=schedules[0],
        parameters=schedules[1] if len(schedules) > 1 else None,
    )


def rows_of(
    strategy: str, workers: int, params: int, sources: npt.ArrayLike, collective: str = "all-reduce"
) -> Schedule:
    """Return the part of a schedule that the ranks `sources` send, for any number of workers.

    It holds the same rows, in the same order, as those with these senders in the whole schedule.

    Raises: ConfigError as `build` does, and for a strategy that has two schedules.
    """
    spec, recipe, workers, params = _prepare(strategy, workers, params, collective)
    if recipe.parameters is not None:
        raise ConfigError(f"{spec} has a schedule for gradients and one for parameters: build it whole")
    src = np.unique(np.asarray(sources, dtype=np.int32))
    if src.size and not 0 <= src[0] <= src[-1] < workers:
        raise ConfigError(f"sources must be ranks from 0 to {workers - 1}, not {src[0]}..{src[-1]}")
    return _schedule(spec, recipe, src, workers, params, collective)


def ranks_of(strategy: str, workers: int, collective: str = "all-reduce") -> int:
    """Return how many ranks an exchange has: its workers and its servers; raises as `build` does."""
    return workers + _prepare(strategy, workers, 0, collective)[1].servers


def symmetry_of(strategy: str, workers: int, collective: str = "all-reduce") -> Symmetry | None:
    """Return the symmetry that a strategy proposes for its rows, None where it proposes none.

    Raises: ConfigError as `build` does.
    """
    return _prepare(strategy, workers, 0, collective)[1].symmetry


def _prepare(strategy: str, workers: int, params: int, collective: str) -> tuple[Spec, Recipe, int, int]:
    """Read a request and refuse a wrong one."""
    try:
        workers, params = operator.index(workers), operator.index(params)  # NumPy's integers are welcome, too
    except TypeError:
        raise ConfigError(f"workers and params must be whole numbers, not {workers!r} and {params!r}") from None
    spec = parse(strategy, collective)
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, not {workers}")
    if workers >= 2**31:
        raise ConfigError(f"at most {2**31 - 1} workers, not {workers}: ranks are 32-bit numbers")
    if params > MAX_PARAMS:
        raise ConfigError(f"at most {MAX_PARAMS} parameters (2^47), not {params}")
    if params < 0:
        raise ConfigError(f"the parameter count cannot be negative, but is {params}")
    return spec, ALGORITHMS[collective][spec.name](workers, **spec.options), workers, params


def _schedule(
    spec: Spec, recipe: Recipe, src: npt.NDArray[np.int32], workers: int, params: int, collective: str
) -> Schedule:
    """Put together the rows of the ranks `src`, the sizes of the chunks, and who has and needs what."""
    what = COLLECTIVES[collective]
    ranks, arrays = workers + recipe.servers, what.arrays(workers)
    sizes = np.tile(split(params, recipe.chunks // arrays), arrays)
    rows = recipe.rows(src)._asdict()
    schedule = Schedule.of(ranks=ranks, chunk_elements=sizes, coalesced=recipe.coalesced, **rows)
    if spec.segments > 1:
        schedule = segment(schedule, spec.segments)
    if recipe.contributes is None and what.must_hold is what.contributes:  # everybody everything, as it is
        return schedule
    # Flags are set last, and as views: for large rank counts they would fill the memory many times.
    contributes, must_hold = (
        defined(ranks, schedule.chunks)
        if own is None
        else repeated(np.broadcast_to(own, (ranks, recipe.chunks)), spec.segments)
        for own, defined in ((recipe.contributes, what.contributes), (recipe.must_hold, what.must_hold))
    )
    return replace(schedule, contributes=contributes, must_hold=must_hold)


def _estimate(recipe: Recipe, workers: int) -> int:
    """Number of rows, estimated from a few of the senders."""
    some = np.unique(np.linspace(0, workers + recipe.servers - 1, 3, dtype=np.int32))
    rows = np.broadcast(*recipe.rows(some)).size
    return rows * (workers + recipe.servers) // len(some)
