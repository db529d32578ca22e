"""Plans of a front run on the module that they are for: times and peaks of memory, beside the predicted ones.

    distsim memory chain.json --policy mixed --overlap full --pareto --json > front.json
    python -m trainers.measure_memory front.json --chain chain.json --workload resnet --batch-size 8 --out measured.json

The chain is what `python -m trainers.profile` has written of the same workload. All plans and the plain layers take
turns, round by round. Loss and gradients must be the plain ones to the bit, and counts of forwards and copies the
plan's; otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from distsim.cli import Parser
from distsim.errors import ConfigError, DistsimError
from distsim.files import make_writable, write_whole
from distsim.memory.chain import Chain
from distsim.memory.chain import read as read_chain
from distsim.memory.plan import parse
from distsim.memory.replay import Overlap, replay
from distsim.tables import table
from distsim.units import format_bytes, format_time
from trainers.config import FIELDS, RunConfig, read
from trainers.memory_trials import Measured, Trial, freed_memory_returns, measure, trial
from trainers.precision import Precision
from trainers.profile import LAYERS_DEPEND_ON
from trainers.workload import load, to_device

ROUNDS = 7


def main(argv: list[str] | None = None) -> int:
    """Run the plans of a front and write what they took; return the exit code."""
    freed_memory_returns()
    try:
        return _run(_parser().parse_args(argv))
    except DistsimError as error:
        print(f"trainers.measure_memory: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    flags = Parser(prog="trainers.measure_memory", description="Run plans of a front on the module they are for.")
    flags.add_argument("front", metavar="FRONT", type=Path, help="JSON of distsim memory --pareto --json")
    flags.add_argument("--chain", metavar="FILE", required=True, help="the chain that the front is of")
    for name in LAYERS_DEPEND_ON:
        each = FIELDS[name]
        default = "" if name == "options" else f" (default {each.default})"
        metavar = "KEY=VALUE,..." if name == "options" else name.rpartition("_")[2].upper()
        flags.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=each.metadata["help"] + default)
    flags.add_argument("--folder", metavar="DIR", type=Path, help="on the disk to offload to (default: host memory)")
    flags.add_argument("--points", metavar="K", type=int, help="points to run, evenly chosen (default: all)")
    flags.add_argument("--rounds", metavar="N", type=int, default=ROUNDS, help=f"timed runs of each (default {ROUNDS})")
    flags.add_argument("--title", metavar="TEXT", default="measured", help="of these points in a figure")
    flags.add_argument("--out", metavar="FILE", type=Path, required=True, help="measured front to write, NAME.json")
    flags.add_argument("--json", action="store_true", help="print the measured front, not a table of it, on stdout")
    return flags


def _run(flags: argparse.Namespace) -> int:
    for name in ("rounds", "points"):
        if (number := getattr(flags, name)) is not None and number < 1:
            raise ConfigError(f"--{name} must be at least 1, not {number}")
    given = {name: read(name, getattr(flags, name)) for name in LAYERS_DEPEND_ON if getattr(flags, name) is not None}
    config = RunConfig(strategy="ring", workers=1, **given)  # checks the values, and knows those that are not given
    make_writable(flags.out.parent)
    chain = read_chain(flags.chain)
    if chain.unit != "SI":
        raise ConfigError(f"{flags.chain}: times and sizes without units; expected what trainers.profile has written")
    front, trials = _read_front(flags.front, chain, flags.points)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = load(config.workload, config.options, config.seed, config.dtype)
    if len(workload.data) < config.batch_size:
        raise ConfigError(f"--batch-size {config.batch_size}: the workload has {len(workload.data)} samples")
    batch = to_device(workload.collate([workload.data[index] for index in range(config.batch_size)]), device)
    workload.model.to(device).train()
    precision = Precision(config.precision, device)
    plain, found = measure(
        workload, batch, trials, rounds=flags.rounds, folder=flags.folder, precision=precision, progress=True
    )
    for point, each in zip(front["frontier"], found, strict=True):
        point |= {f"measured_{name}": getattr(each, name) for name in ("time", *each._fields[1:])}
    front |= {
        "origin": "measured",
        "title": flags.title,
        "measured_plain_time": plain.time,
        "measured_plain_peak_memory": plain.peak_memory,
    }
    text = json.dumps(front, indent=1) + "\n"
    write_whole(flags.out, text)
    print(
        text if flags.json else f"{_text(trials, plain, found)}\n\nWrote {flags.out}.", end="" if flags.json else "\n"
    )
    failed = [number for number, each in enumerate(found) if not each.as_planned(trials[number])]
    for number in failed:
        what = "counts are not those of the plan" if found[number].exact else "gradients are not the plain ones"
        print(f"trainers.measure_memory: point {number + 1}: {what}", file=sys.stderr)
    return 1 if failed else 0


def _read_front(path: Path, chain: Chain, points: int | None) -> tuple[dict[str, Any], list[Trial]]:
    """Read a front, and of its points as many as are wanted."""
    try:
        front = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from error
    try:
        overlap, listed = front["overlap"], front["frontier"]
        if overlap not in get_args(Overlap):
            raise ValueError(f"overlap {overlap}")
        chosen = np.linspace(0, len(listed) - 1, min(points or len(listed), len(listed))).round().astype(int)
        front["frontier"] = [dict(listed[place]) for place in chosen]
        plans = [(each["plan"], float(each["budget"]), float(each["time"])) for each in front["frontier"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a front: {error!r}; expected what distsim memory --pareto --json prints"
        ) from error
    trials = []
    for text, budget, time in plans:
        plan = parse(text, chain.layers)
        if not math.isclose(replay(chain, plan, budget, overlap).time, time, rel_tol=1e-6):
            raise ConfigError(f"{path}: a plan does not take the time that the front says; it is of another chain")
        trials.append(trial(chain, plan, budget, overlap))
    if not trials:
        raise ConfigError(f"{path}: a front without points")
    return front, trials


def _text(trials: Sequence[Trial], plain: Measured, found: Sequence[Measured]) -> str:
    """Return predicted and measured numbers for a terminal."""

    def off(measured: float, predicted: float) -> str:
        return f"{measured / predicted - 1:+.1%}"

    rows = [
        (
            format_bytes(expected.replay.peak_memory),
            None if each.peak_memory is None else format_bytes(each.peak_memory),
            None if each.peak_memory is None else off(each.peak_memory, expected.replay.peak_memory),
            format_time(expected.replay.time),
            format_time(each.time),
            off(each.time, expected.replay.time),
            each.forwards,
            each.stores,
            each.loads,
        )
        for expected, each in zip(trials, found, strict=True)
    ]
    headers = ("peak predicted", "measured", "off", "time predicted", "measured", "off", "forwards", "stores", "loads")
    memory = "" if plain.peak_memory is None else f", {format_bytes(plain.peak_memory)}"
    return f"{table(headers, rows)}\n\nwithout a plan {format_time(plain.time)}{memory}"


if __name__ == "__main__":
    sys.exit(main())
