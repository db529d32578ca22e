"""`distsim memory`: which activations to keep, recompute or offload; and the cases of slots and of the exam."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distsim.commands import options
from distsim.errors import ConfigError

if TYPE_CHECKING:
    from distsim.memory.chain import Chain
    from distsim.memory.plan import MemoryPlan
    from distsim.memory.policies import Named
    from distsim.memory.replay import Overlap, Replay

POLICIES = (
    "optimal (default), auto, optimal-recompute, optimal-offload, fast, mixed, persistent, store-all, periodic:K, "
    "sqrt, revolve:SLOTS"
)


def add(commands: Any) -> None:
    """Add the command."""
    summary = "plan which activations to keep, recompute or offload"
    parser = options.command(commands, "memory", run, summary)
    parser.add_argument("file", metavar="FILE", nargs="?", help="a chain, or a problem with slots, in JSON or YAML")
    parser.add_argument("--policy", metavar="POLICY", help=POLICIES)
    parser.add_argument("--budget", metavar="SIZE", help='memory, in the file\'s unit, such as 52, or "2 GiB"')
    overlaps = "engines of the offload: none, what computes waits; half, one for writes and reads; full, one for each"
    parser.add_argument("--overlap", choices=("none", "half", "full"), default="none", help=overlaps)
    parser.add_argument("--pareto", action="store_true", help="the whole front of time against budget")
    opens = "write the plan's timeline, which ui.perfetto.dev opens, to this file; NAME.gz is compressed"
    parser.add_argument("--trace", metavar="FILE", help=opens)
    parser.add_argument("--layers", type=int, metavar="L", help="equal layers, in place of a file")
    for flag, what in (("fwd", "a forward"), ("loadmem", "a load from memory"), ("loaddisk", "a load from disk")):
        parser.add_argument(f"--{flag}", metavar="TIME", help=f'with --layers: time of {what}, such as "20 ns"')
    conventions = "with --layers: what counts, such as cached,free-input (default exam; docs/memory.md has all)"
    parser.add_argument("--convention", metavar="WORDS", help=conventions)


def run(flags: argparse.Namespace) -> int:
    """Plan a chain or count a case; print it."""
    from distsim.commands import memory_cases
    from distsim.memory import chain
    from distsim.memory.plan import InfeasibleBudget

    case = memory_cases.find(flags)
    if case is not None:
        return case()
    if flags.file is None:
        raise ConfigError("expected a FILE, or --layers with --policy periodic:K or revolve:SLOTS")
    for flag in ("fwd", "loadmem", "loaddisk", "convention"):
        if getattr(flags, flag) is not None:
            raise ConfigError(f"--{flag} goes with --layers; a FILE has times of its own")
    found = chain.read(flags.file)
    if flags.overlap != "none" and not found.offloads:
        raise ConfigError(
            f'--overlap {flags.overlap} is of copies, and {flags.file} has no times to "write" and "read"'
        )
    try:
        return _front(flags, found) if flags.pareto else _one(flags, found)
    except InfeasibleBudget as error:
        if found.unit == "SI":
            raise InfeasibleBudget(error.budget, error.least, error.policy, _bytes) from None
        raise


def _one(flags: argparse.Namespace, chain: Chain) -> int:
    """Print one plan."""
    from distsim.memory import lower, policies
    from distsim.tables import table

    named = policies.parse("optimal" if flags.policy is None else flags.policy)
    budget = _budget(flags.budget, chain)
    plan, replay = policies.plan(chain, named, budget, flags.overlap)
    timed, waits = lower.operations(chain, plan, replay, flags.overlap)
    timeline = lower.simulate(timed, waits)
    assert math.isclose(timeline.makespan_s, replay.time, rel_tol=1e-9), "the engine and the checker agree"
    if flags.trace is not None:
        from distsim.memory import trace

        memory = replay.memory_at[replay.engine >= 0].tolist()
        trace.write(Path(flags.trace), timed, timeline, memory, 1.0 if chain.unit == "SI" else 1e6)
    values = _values(chain, named, budget, flags.overlap, plan, replay)
    if named.name == "fast":
        from distsim.memory import bound

        values["lower_bound"] = bound.lower_bound(chain, policies.enough(chain, budget), replay.time)
        values["gap"] = replay.time / values["lower_bound"] - 1 if values["lower_bound"] else 0.0
    if flags.json:
        print(json.dumps({key: _plain(value) for key, value in values.items()}, indent=1))
        return 0
    time, size = _units(chain)
    lines: list[tuple[str, object]] = [
        ("policy", named),
        ("layers", chain.layers),
        ("budget", size(budget) if budget < math.inf else "none"),
        ("peak memory", size(replay.peak_memory)),
        ("time", f"{time(replay.time)}, {_slower(chain, replay)} to keeping everything"),
        ("forwards", f"{replay.forwards}, {replay.forwards - chain.layers} of them again"),
    ]
    if replay.stores:
        lines += [("stores, loads", f"{replay.stores}, {replay.loads}"), ("overlap", flags.overlap)]
    if "gap" in values:
        lines.append(("proven", f"no plan is faster than {time(values['lower_bound'])}: gap {values['gap']:.2%}"))
    head, *rest = [(key, str(value)) for key, value in lines]
    print(table(head, rest) + "\n\n" + _folded(plan.schedule()))
    return 0


def _front(flags: argparse.Namespace, chain: Chain) -> int:
    """Print a front, a line for each point."""
    from tqdm import tqdm

    from distsim.memory import policies
    from distsim.memory.replay import replay
    from distsim.tables import table

    if flags.budget is not None or flags.trace is not None:
        raise ConfigError("--pareto has all budgets; leave out --budget and --trace")
    named = policies.parse("optimal" if flags.policy is None else flags.policy, number_wanted=False)
    points = policies.best(
        list(tqdm(policies.front(chain, named, flags.overlap), unit="point", file=sys.stderr, delay=1, leave=False))
    )
    replays = [replay(chain, point.plan, point.budget, flags.overlap) for point in points]
    if flags.json:
        listed = [
            {
                "budget": point.budget,
                **_counts(found),
                "schedule": point.plan.schedule(),
                "plan": point.plan.text(),
            }
            for point, found in zip(points, replays, strict=True)
        ]
        about = {"policy": str(named), "overlap": flags.overlap, "unit": chain.unit, "plain_time": chain.plain_time}
        frontier = [{key: _plain(value) for key, value in point.items()} for point in listed]
        print(json.dumps({**{key: _plain(value) for key, value in about.items()}, "frontier": frontier}, indent=1))
        return 0
    time, size = _units(chain)
    rows = []
    for point, found in zip(points, replays, strict=True):
        rows.append(
            (size(point.budget), time(found.time), _slower(chain, found), found.forwards, found.stores, found.loads)
        )
    print(table(("budget", "time", "to keeping all", "forwards", "stores", "loads"), rows))
    return 0


def _values(
    chain: Chain, named: Named, budget: float, overlap: Overlap, plan: MemoryPlan, replay: Replay
) -> dict[str, Any]:
    return {
        "policy": str(named),
        "layers": chain.layers,
        "unit": chain.unit,
        "budget": budget if budget < math.inf else None,
        "overlap": overlap,
        **_counts(replay),
        "plain_time": chain.plain_time,
        "schedule": plan.schedule(),
        "plan": plan.text(),
    }


def _counts(replay: Replay) -> dict[str, Any]:
    return {
        "time": replay.time,
        "peak_memory": replay.peak_memory,
        "forwards": replay.forwards,
        "loads": replay.loads,
        "stores": replay.stores,
    }


def _plain(value: Any) -> Any:
    """Return numbers as JSON is to have them."""
    from distsim.memory.chain import plain_number

    return plain_number(value) if isinstance(value, float) else value


def _slower(chain: Chain, replay: Replay) -> str:
    """Return by how much a plan takes longer than every operation once."""
    more = replay.time / chain.plain_time - 1 if chain.plain_time else 0.0
    return f"{max(more, 0.0):+.1%}"


def _bytes(size: float) -> str:
    """Return bytes to the last one, as a budget can be given."""
    from distsim.units import format_bytes

    return f"{math.ceil(size):,} B ({format_bytes(size)})"


def _budget(given: str | None, chain: Chain) -> float:
    """Read a budget: a number in the file's unit, or a size with its unit where the file has bytes."""
    from distsim.units import parse_bytes, shown

    if given is None:
        return math.inf
    try:
        number = float(given)
    except ValueError:
        if chain.unit == "SI":
            return parse_bytes(given)
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(f"--budget {shown(given)} is not a size; expected a number in the file's unit, such as 52")
    return number


def _units(chain: Chain) -> tuple[Callable[[float], str], Callable[[float], str]]:
    """Return how times and sizes are shown."""
    from distsim.units import format_bytes, format_time

    if chain.unit == "SI":
        return format_time, format_bytes
    return "{:,.10g}".format, "{:,.10g}".format


def _folded(text: str, width: int = 118, most: int = 12) -> str:
    """Return a schedule in lines; of a long one, the first."""
    import textwrap

    lines = textwrap.wrap(text, width)
    more = [f"... ({len(text.split())} operations; --json has all)"] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])
