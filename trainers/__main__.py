"""Command line: `torchrun --nproc-per-node 4 -m trainers ...` or `python -m trainers ...` for the server."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distsim.cli import Parser
from distsim.errors import ConfigError, DistsimError
from distsim.exchanges import STRATEGIES, parse
from trainers.config import DTYPES, RunConfig

if TYPE_CHECKING:
    from trainers.report import Summary


def strategy(spec: str) -> str:
    """Accept a strategy and its options; return them in their canonical form."""
    try:
        return str(parse(spec))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> Parser:
    """Return the command line's flags; each means one thing, and RunConfig says what."""
    flags = Parser(prog="trainers", description=__doc__, allow_abbrev=False)
    flags.add_argument(
        "--strategy", required=True, type=strategy, help=f"{', '.join(STRATEGIES)}; with options NAME:KEY=VALUE,..."
    )
    flags.add_argument("--workers", type=int, help="parameter-server: how many (torchrun's ranks otherwise)")
    flags.add_argument("--steps", type=int, default=50, help="optimizer steps (default 50)")
    flags.add_argument("--batch-size", type=int, default=4, help="sequences per worker and step (default 4)")
    flags.add_argument("--learning-rate", type=float, default=0.1, help="of SGD with momentum (default 0.1)")
    flags.add_argument("--dtype", choices=DTYPES, default="float32")
    flags.add_argument("--layers", type=int, default=4, help="transformer blocks (default 4)")
    flags.add_argument("--width", type=int, default=128, help="features, a multiple of 32 (default 128)")
    flags.add_argument("--context", type=int, default=128, help="bytes of a sequence (default 128)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--text", metavar="FILE", help="train on this file, not on the standard library's sources")
    flags.add_argument(
        "--transport",
        choices=("schedule", "library"),
        default="schedule",
        help="ring: run the schedule's own messages, or the library's all-reduce",
    )
    flags.add_argument("--cluster", metavar="FILE", help="simulate the same exchange on this cluster beforehand")
    flags.add_argument("--out", metavar="DIR", type=Path, default=Path("runs"), help="run records (default runs)")
    flags.add_argument("--json", action="store_true", help="print the measured record, and nothing else, on stdout")
    flags.add_argument("--ray-address", help="parameter-server: join this Ray cluster, do not start one")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Train; return the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        return _run(parser().parse_args(argv))
    except DistsimError as error:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if local_rank == "0" or not isinstance(error, ConfigError):  # all ranks see the same ConfigError
            print(f"trainers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(flags: argparse.Namespace) -> int:
    summary: Summary | None
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    rest = f"--strategy {flags.strategy} --steps {flags.steps}"
    values = {name: getattr(flags, name) for name in RunConfig.__dataclass_fields__ if hasattr(flags, name)}
    if parse(flags.strategy).name == "parameter-server":
        workers = flags.workers if flags.workers is not None else 4
        if under_torchrun:
            raise ConfigError(
                "the parameter server runs on Ray actors, not under torchrun; use\n"
                f"  python -m trainers {rest} --workers {os.environ['WORLD_SIZE']}"
            )
        from trainers import ray_trainer

        config = RunConfig(**(values | {"workers": workers}))
        summary = ray_trainer.run(config, flags.cluster, flags.out, flags.ray_address)
    else:
        if not under_torchrun:
            raise ConfigError(
                f"{flags.strategy} runs under torchrun, one process a rank; use\n"
                f"  torchrun --nproc-per-node {flags.workers or 4} -m trainers {rest}"
            )
        for name in ("workers", "ray_address"):
            if getattr(flags, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for the parameter server; torchrun's --nproc-per-node and "
                    f"--nnodes set the ranks of {flags.strategy}"
                )
        from trainers import torch_trainer

        config = RunConfig(**(values | {"workers": int(os.environ["WORLD_SIZE"])}))
        summary = torch_trainer.run(config, flags.cluster, flags.out)
    if summary is not None:
        print(summary.measured.model_dump_json(indent=1) if flags.json else summary.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
