"""`distsim memory` for layers that are all alike: the exam's periodic case, and checkpoints in slots."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distsim.errors import ConfigError
from distsim.units import format_time, shown
from distsim.yamlfile import Document, did_you_mean

EXAM = ("L", "k", "fwd_ns", "loadmem_ns", "loaddisk_ns")
SLOTS = ("n", "s")
DISK_SLOTS = ("n", "cm", "cdisk", "uf", "ub", "wd", "rd")
"""Keys of a problem in a file, other than a chain; those that name answers are not read."""
FOR = {
    **{"budget": "chains", "pareto": "chains", "trace": "chains and periodic:K", "convention": "periodic:K"},
    **dict.fromkeys(("fwd", "loadmem", "loaddisk"), "--layers with periodic:K"),
}
ANSWERS = (
    *("nocache", "cache", "hybrid", "r", "advance", "total", "extra", "lib_", "multistage", "brute"),
    *("revolve_", "hrevolve_", "disk_", "model", "id"),
)


def find(flags: argparse.Namespace) -> Callable[[], int] | None:
    """Return what prints the case that the flags or the file describe; None if it is a chain.

    Raises: ConfigError for flags that do not go together.
    """
    from distsim.yamlfile import read

    if flags.file is None:
        return None if flags.layers is None else _of_flags(flags)
    if flags.layers is not None:
        raise ConfigError("--layers is in place of a FILE; give one of them")
    document = read(flags.file)
    data = document.data
    if not isinstance(data, dict) or "size" in data or "fwd" in data:
        return None
    for keys, make, known in (
        (EXAM, _exam_of_file, ("convention", "trace")),
        (DISK_SLOTS, _disk_slots, ()),
        (SLOTS, _slots_of_file, ()),
    ):
        if all(key in data for key in keys[:2]):
            for key in data:
                if key not in keys and not key.startswith(ANSWERS):
                    raise document.error(
                        (key,), f"unknown key{did_you_mean(key, list(keys))}; valid: {', '.join(keys)}"
                    )
            _only(flags, known, flags.file)
            return lambda: make(flags, document)
    return None


def _only(flags: argparse.Namespace, known: tuple[str, ...], what: str) -> None:
    """Refuse flags that this case would not look at."""
    for flag in ("budget", "pareto", "trace", "fwd", "loadmem", "loaddisk", "convention"):
        if flag not in known and getattr(flags, flag):
            raise ConfigError(f"--{flag} is not for {what}: it is for {FOR[flag]}")
    if flags.overlap != "none":
        raise ConfigError(f"--overlap is not for {what}: it is for chains with offload")


def _of_flags(flags: argparse.Namespace) -> Callable[[], int]:
    name, _, number = (flags.policy or "").partition(":")
    if name not in ("periodic", "revolve") or not re.fullmatch("[0-9]{1,9}", number):
        given = f", not {shown(flags.policy)}{did_you_mean(name, ['periodic', 'revolve'])}" if flags.policy else ""
        raise ConfigError(
            f"--layers {flags.layers} is for --policy periodic:K or revolve:SLOTS{given}; others need a FILE"
        )
    if name == "revolve":
        _only(flags, (), "revolve, which counts steps")
        return lambda: _slots(flags, flags.layers, int(number))
    _only(flags, ("trace", "fwd", "loadmem", "loaddisk", "convention"), "equal layers")
    from distsim.units import parse_time_s

    times = {}
    for flag in ("fwd", "loadmem"):
        if getattr(flags, flag) is None:
            raise ConfigError(f'--policy periodic:K needs --{flag}, a time such as "20 ns"')
        times[flag] = parse_time_s(getattr(flags, flag))
    disk_s = None if flags.loaddisk is None else parse_time_s(flags.loaddisk)
    return lambda: _exam(flags, flags.layers, int(number), times["fwd"], times["loadmem"], disk_s)


def _exam(
    flags: argparse.Namespace, layers: int, every: int, forward_s: float, load_s: float, disk_s: float | None
) -> int:
    """Print the exam's counts, times and break-even."""
    from distsim.memory import exam
    from distsim.tables import table

    convention = exam.Convention.parse(flags.convention or "")
    found = exam.periodic(layers, every, forward_s, load_s, convention, disk_s)
    if flags.trace is not None:
        from distsim.memory import lower, trace

        timed, waits = exam.operations(layers, every, forward_s, load_s, convention)
        trace.write(Path(flags.trace), timed, lower.simulate(timed, waits), (), 1.0)
    if flags.json:
        values = {
            "policy": f"periodic:{every}",
            "layers": layers,
            "convention": convention.text(),
            "forwards": found.forwards,
            "loads": found.loads,
            "time_s": found.time_s,
            "breakeven_loaddisk_s": found.breakeven_loaddisk_s,
            "loaddisk_s": found.loaddisk_s,
            "disk_time_s": found.disk_time_s,
            "mixed_time_s": found.mixed_time_s,
            "mixed_loaddisks": found.mixed_loaddisks,
        }
        print(json.dumps(values, indent=1))
        return 0
    mixed = f"{format_time(found.mixed_time_s)}, {found.mixed_loaddisks:,} layers from disk"
    rows = [
        ("layers", f"{layers:,}"),
        ("convention", convention.text()),
        ("forwards again", f"{found.forwards:,}"),
        ("loads from memory", f"{found.loads:,}"),
        ("time", format_time(found.time_s)),
        ("break-even of a load from disk", format_time(found.breakeven_loaddisk_s)),
        (f"all from disk, at {format_time(found.loaddisk_s)} each", format_time(found.disk_time_s)),
        ("per layer whichever is cheaper", mixed),
    ]
    print(table(("policy", f"periodic:{every}"), rows))
    return 0


def _slots(flags: argparse.Namespace, steps: int, count: int) -> int:
    """Print the binomial optimum."""
    from distsim.memory import revolve

    plan = revolve.slots(steps, count)
    return _print_slots(flags, f"revolve:{count}", plan, {})


def _print_slots(flags: argparse.Namespace, policy: str, plan: Any, more: Mapping[str, float]) -> int:
    from distsim.tables import table

    values = {
        "policy": policy,
        "layers": plan.steps,
        **more,
        "advances": plan.advances,
        "forwards": plan.forwards,
        "repetitions": plan.repetitions,
        "stores": plan.stores,
        "loads": plan.loads,
        "writes": plan.writes,
        "reads": plan.reads,
        "schedule": plan.text(),
    }
    if flags.json:
        print(json.dumps(values, indent=1))
        return 0
    *shown_values, (_, schedule) = list(values.items())[1:]
    print(table(("policy", policy), [(key, f"{value:,}") for key, value in shown_values]))
    parts = schedule.split(", ")
    print("\n" + ", ".join(parts[:40]) + (f", ... ({len(parts)} actions; --json has all)" if len(parts) > 40 else ""))
    return 0


def _exam_of_file(flags: argparse.Namespace, document: Document) -> int:
    layers, every = (int(_number(document, key, whole=True)) for key in ("L", "k"))
    if flags.policy not in (None, f"periodic:{every}"):
        raise ConfigError(f"--policy {flags.policy} is not for this file, which says periodic:{every}; leave it out")
    missing = [key for key in ("fwd_ns", "loadmem_ns") if key not in document.data]
    if missing:
        raise document.error((), f'no "{missing[0]}"; expected {", ".join(EXAM[:4])}')
    forward_s, load_s = (float(f"{_number(document, key)!r}e-9") for key in ("fwd_ns", "loadmem_ns"))
    disk_s = float(f"{_number(document, 'loaddisk_ns')!r}e-9") if "loaddisk_ns" in document.data else None
    return _exam(flags, layers, every, forward_s, load_s, disk_s)


def _slots_of_file(flags: argparse.Namespace, document: Document) -> int:
    if flags.policy not in (None, "optimal"):
        raise ConfigError(f"--policy {flags.policy} is not for a file with slots; leave it out, or say optimal")
    return _slots(flags, int(_number(document, "n", whole=True)), int(_number(document, "s", whole=True)))


def _disk_slots(flags: argparse.Namespace, document: Document) -> int:
    from distsim.memory import disk_revolve

    once = _is_once(flags)
    for key in DISK_SLOTS:
        if key not in document.data and key != "cdisk":
            raise document.error((), f'no "{key}"; expected {", ".join(DISK_SLOTS)}')
    steps, memory_slots = (int(_number(document, key, whole=True)) for key in ("n", "cm"))
    unlimited = document.data.get("cdisk", "null") == "null"
    disk_slots = None if unlimited else int(_number(document, "cdisk", whole=True))
    forward, reverse, write, read = (_number(document, key) for key in DISK_SLOTS[3:])
    plan = disk_revolve.disk_slots(
        steps, memory_slots, disk_slots, forward, reverse, write, read, "once" if once else "any"
    )
    time = plan.cost(forward, reverse, write, read)
    return _print_slots(flags, flags.policy or "optimal", plan, {"time": int(time) if time.is_integer() else time})


def _is_once(flags: argparse.Namespace) -> bool:
    """Return whether each copy on disk may be read once only."""
    if flags.policy not in (None, "optimal", "read-once"):
        raise ConfigError(
            f"--policy {flags.policy} is not for a file with slots; expected optimal (default) or read-once"
        )
    return bool(flags.policy == "read-once")


def _number(document: Document, key: str, *, whole: bool = False) -> float:
    text = document.data[key]
    try:
        value = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (whole and not value.is_integer()):
        expected = "a whole number" if whole else "a number of at least 0"
        raise document.error((key,), f"{shown(text)} is not {expected}")
    return value
