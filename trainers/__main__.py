"""Command line: `torchrun --nproc-per-node 4 -m trainers ...`, or `python -m trainers ...` for dedicated servers."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distsim.cli import Parser
from distsim.errors import ConfigError, DistsimError
from distsim.exchanges import STRATEGIES
from trainers import runfile
from trainers.config import FIELDS, RunConfig, read

if TYPE_CHECKING:
    from trainers.report import Summary

WORKERS = 4
"""Of a parameter server, unless said otherwise."""


def parser() -> Parser:
    """Return the flags: RunConfig's fields, and what is no part of a run's description."""
    flags = Parser(prog="trainers", description=__doc__)
    flags.add_argument("file", metavar="RUN.yaml", nargs="?", help="a run's description; flags replace its values")
    for name, each in FIELDS.items():
        meaning = each.metadata["help"]
        if name == "workers":
            meaning = f"with dedicated parameter servers: how many (default {WORKERS}); torchrun's ranks otherwise"
        elif isinstance(each.default, str | int | float):
            meaning = f"{meaning} (default {str(each.default).lower() if each.type == 'bool' else each.default})"
        style: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if isinstance(each.default, bool) else {}
        flags.add_argument(f"--{name.replace('_', '-')}", help=meaning, **({"metavar": _metavar(name)} | style))
    flags.add_argument("--cluster", metavar="FILE", help="simulate the same exchange on this cluster beforehand")
    flags.add_argument("--out", metavar="DIR", type=Path, default=Path("runs"), help="run records (default runs)")
    flags.add_argument("--json", action="store_true", help="print the measured record, and nothing else, on stdout")
    flags.add_argument("--tensorboard", action="store_true", help="write metrics for TensorBoard, too")
    flags.add_argument("--ray-address", help="dedicated servers: join this Ray cluster, do not start one")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Train; return the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except DistsimError as error:
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if local_rank == "0" or not isinstance(error, ConfigError):  # all ranks see the same ConfigError
            print(f"trainers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    flags = parser().parse_args(argv)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    started = int(os.environ["WORLD_SIZE"]) if under_torchrun else None
    values = described(flags)
    workers = values.get("workers", WORKERS)
    config = RunConfig(**(values | {"workers": started or workers}))
    rest = f"-m trainers {shlex.join(_without_workers(argv))}"
    summary: Summary | None
    if config.servers:
        if under_torchrun:
            raise ConfigError(
                "the parameter server runs on Ray actors, not under torchrun; use\n"
                f"  python {rest} --workers {started}\n"
                "or let workers be servers: --strategy parameter-server:placement=colocated"
            )
        from trainers import ray_trainer

        summary = ray_trainer.run(config, flags.cluster, flags.out, flags.ray_address, tensorboard=flags.tensorboard)
    else:
        if not under_torchrun:
            raise ConfigError(
                f"{config.strategy} runs under torchrun, one process a rank; use\n"
                f"  torchrun --nproc-per-node {workers} {rest}"
            )
        for name in ("workers", "ray_address"):
            if getattr(flags, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for the parameter server; torchrun's --nproc-per-node and "
                    f"--nnodes set the ranks of {config.strategy}"
                )
        if values.get("workers", started) != started:
            raise ConfigError(
                f"{flags.file} is a run of {workers} workers, but torchrun has started {started}: its "
                "--nproc-per-node and --nnodes set them"
            )
        from trainers import torch_trainer

        summary = torch_trainer.run(config, flags.cluster, flags.out, tensorboard=flags.tensorboard)
    if summary is not None:
        print(summary.measured.model_dump_json(indent=1) if flags.json else summary.text())
    return 0


def described(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that file and flags give: flags replace the file's values, of options each by itself.

    Raises: ConfigError for what cannot be read, and if there is no strategy.
    """
    values = runfile.read(flags.file) if flags.file is not None else {}
    given = {name: read(name, getattr(flags, name)) for name in FIELDS if getattr(flags, name) is not None}
    if "options" in given:
        given["options"] = {**values.get("options", {}), **given["options"]}
    values |= given
    if "strategy" not in values:
        raise ConfigError(f"which strategy? Give --strategy, or `strategy:` in a file; valid: {', '.join(STRATEGIES)}")
    return values


def _without_workers(argv: list[str]) -> list[str]:
    """Return the same command line for whoever sets the number of workers otherwise."""
    kept = [part for part in argv if not part.startswith("--workers=")]
    if "--workers" in kept:
        at = kept.index("--workers")
        del kept[at : at + 2]
    return kept


def _metavar(name: str) -> str:
    return "KEY=VALUE,..." if name == "options" else name.rpartition("_")[2].upper()


if __name__ == "__main__":
    sys.exit(main())
