"""Test whether accumulating micro-batches gives the large batch's gradient; exit code 1 where it does not.

python -m trainers.accumulation --factory mypackage.model:build
torchrun --nproc-per-node 4 -m trainers.accumulation --workload language-model --options lines=true
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from typing import Any, cast

from distsim.cli import Parser
from distsim.errors import ConfigError, DistsimError, nearest
from distsim.files import make_writable, write_whole
from trainers.config import FIELDS, RunConfig, read

EFFECTIVE = 32
FORMATS = ("float64", "float32")
READ = ("workload", "options", "seed", "batch_norm")
"""What is given as for a training."""


def main(argv: list[str] | None = None) -> int:
    """Test; return the exit code: 0 equivalent, 1 not, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        return _run(_parser().parse_args(argv))
    except DistsimError as error:
        print(f"trainers.accumulation: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    flags = Parser(prog="trainers.accumulation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in READ:
        each = FIELDS[name]
        default = "" if name == "options" else f" (default {each.default})"
        flags.add_argument(
            *(("--factory",) if name == "workload" else ()),
            f"--{name.replace('_', '-')}",
            dest=name,
            metavar={"workload": "MODULE:FUNCTION", "options": "KEY=VALUE,..."}.get(name, name.upper()),
            help=each.metadata["help"] + default,
        )
    flags.add_argument(
        "--effective-batch", metavar="N", type=int, default=EFFECTIVE, help=f"samples of a step (default {EFFECTIVE})"
    )
    flags.add_argument(
        "--micro-batches", metavar="B,...", help="their sizes (default: all that divide it, and one more)"
    )
    flags.add_argument("--formats", metavar="F,...", default=",".join(FORMATS), help="default float64,float32")
    flags.add_argument(
        "--normalise",
        metavar="HOW",
        default="count",
        help="count: divide by what counts in all micro-batches, as the trainers do (the default);\n"
        "micro-batch: average the micro-batches' means, as many loops do",
    )
    flags.add_argument("--without-dropout", action="store_true", help="test the rest with all dropout switched off")
    flags.add_argument("--out", metavar="FILE.json", type=Path, help="write what --json prints, too")
    flags.add_argument("--figure", metavar="FILE.png", type=Path, help="draw each layer's difference")
    flags.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else, on stdout")
    return flags


def _run(flags: argparse.Namespace) -> int:
    given = {name: read(name, getattr(flags, name)) for name in READ if getattr(flags, name) is not None}
    config = RunConfig(strategy="ring", workers=1, **given)  # checks the values, and knows those that are not given
    formats = _list("--formats", flags.formats, FORMATS)
    micro_batches = None
    if flags.micro_batches is not None:
        micro_batches = [_whole("--micro-batches", text) for text in flags.micro_batches.split(",")]
    if flags.effective_batch < 1:
        raise ConfigError(f"--effective-batch must be at least 1, not {flags.effective_batch}")
    (normalise,) = _list("--normalise", flags.normalise, ("count", "micro-batch"), most=1)
    for name, endings in (("out", (".json",)), ("figure", (".png", ".pdf", ".svg"))):
        file: Path | None = getattr(flags, name)
        if file is not None:
            if file.suffix not in endings or file.is_dir():
                raise ConfigError(f"--{name} must be a file that ends in {' or '.join(endings)}, not {file}")
            make_writable(file.parent)
    draw = _drawing() if flags.figure is not None else None

    from trainers.accumulation.equivalence import examine  # torch takes seconds, which --help need not
    from trainers.accumulation.ranks import started
    from trainers.fingerprint import model_digest
    from trainers.workload import data_digest, load

    with redirect_stdout(sys.stderr):  # what the workload's own code prints is no part of the report
        workload = load(config.workload, config.options, config.seed, "float32")
    same = {f"configuration: {name}": str(value) for name, value in vars(flags).items()}
    same |= {"model (digest)": model_digest(workload.model), "data (digest)": data_digest(workload)}
    with redirect_stdout(sys.stderr), started(same) as ranks:
        report = examine(
            workload,
            effective_batch=flags.effective_batch,
            micro_batches=micro_batches,
            formats=formats,
            normalise=cast(Any, normalise),
            batch_norm=cast(Any, config.batch_norm),
            without_dropout=flags.without_dropout,
            seed=config.seed,
            ranks=ranks,
            name=config.workload,
            options=config.options,
            progress=True,
        )
        first = ranks.rank == 0
    if first:
        made = report.to_json()
        text = json.dumps(made, indent=1) + "\n"
        if flags.out is not None:
            write_whole(flags.out, text)
        print(text if flags.json else report.text(), end="" if flags.json else "\n")
        if draw is not None:
            draw([made], flags.figure)
            print(f"figure: {flags.figure}", file=sys.stderr)
    return 0 if report.equivalent else 1


def _drawing() -> Callable[[list[Any], Path], None]:
    """Return what draws; found by its entry point, since trainers do not know what reads their records."""
    # Not `entry_points()`: it sees one installation of each name, and an old build in the current folder hides ours.
    offers = (each.entry_points.select(group="distsim.figures", name="accumulation") for each in distributions())
    for found in chain.from_iterable(offers):
        try:
            draw: Callable[[list[Any], Path], None] = found.load()
        except ImportError as error:
            raise ConfigError(
                f"--figure: {error.name or error} is not installed; install it with `pip install 'distsim[plot]'`"
            ) from None
        return draw
    raise ConfigError("--figure: no installed package offers this; install distsim anew, with its entry points")


def _list(flag: str, text: str, valid: tuple[str, ...], most: int = 9) -> list[str]:
    words = list(dict.fromkeys(text.split(",")))
    for word in words:
        if word not in valid:
            raise ConfigError(f"{flag} must be {' or '.join(valid)}, not {word[:40]!r}{nearest(word[:40], valid)}")
    if len(words) > most:
        raise ConfigError(f"{flag} must be one of {' or '.join(valid)}, not {text[:40]!r}")
    return words


def _whole(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ConfigError(f"{flag} must be whole numbers with commas between them, as in 1,4,8, not {text[:40]!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
