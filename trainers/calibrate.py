"""Calibration: this machine as a `Cluster`, from timed neighbour exchanges and additions.

torchrun --nproc-per-node 4 -m trainers.calibrate --out loopback.yaml     TCP or NCCL between 4 processes
python -m trainers.calibrate --workers 4 --out ray.yaml                   Ray actors: 4 workers and a server
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from distsim.cli import Parser
from distsim.cluster import bandwidth_quantity, time_quantity, to_yaml
from distsim.errors import ConfigError, DistsimError
from distsim.files import make_writable, write_whole
from distsim.units import format_bandwidth, format_time
from trainers import workload
from trainers.neighbours import Sample
from trainers.timing import together_s

SMALL_ELEMENTS = 100
"""Of the smallest messages that are timed, about those of the numbers that every training step exchanges."""
ROUNDS = 25
"""Exchanges of each kind; medians of them are fitted. All together take a few seconds."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One bus that all messages share, and each rank's addition.

    A bus without latency: within one host a message costs work, which delays all others, and no waiting.
    """

    overhead_s: float
    bandwidth_Bps: float
    reduce_bandwidth_Bps: float
    worst_error: float
    """The largest relative error of the fitted times."""


def fit(ranks: int, results: Sequence[Sequence[Sample]]) -> Fit:
    """Fit t = steps * ranks * (overhead + bytes / bandwidth) to the median times, what the simulator says of them.

    All chains weigh the same (relative least squares); the overhead is not negative.

    Raises: DistsimError if larger messages took no longer than smaller ones, from which no bandwidth can be told.
    """
    times = []
    for parts in zip(*results, strict=True):
        spans = np.array([part.exchanges for part in parts])  # (ranks, rounds, [start, end])
        times.append(np.median(together_s(spans, [part.machine for part in parts])))
    measured = np.array(times)
    messages = np.array([part.steps * ranks for part in results[0]], dtype=float)
    message_bytes = np.array([part.message_bytes for part in results[0]], dtype=float)
    design = np.stack([messages, messages * message_bytes], axis=1) / measured[:, None]
    terms, *_ = np.linalg.lstsq(design, np.ones(len(times)))
    if terms[0] < 0:
        terms = np.array([0.0, design[:, 1].sum() / (design[:, 1] ** 2).sum()])
    if terms[1] <= 0:
        raise DistsimError(
            f"messages of {message_bytes.max():.0f} bytes took no longer than those of {message_bytes.min():.0f}, so "
            "no bandwidth can be told; use more --params, or stop what else runs on this machine"
        )
    largest = max(part.message_bytes for part in results[0])
    additions = [s for parts in results for part in parts if part.message_bytes == largest for s in part.additions_s]
    return Fit(
        overhead_s=float(terms[0]),
        bandwidth_Bps=1 / float(terms[1]),
        reduce_bandwidth_Bps=largest / statistics.median(additions),
        worst_error=float(np.abs(design @ terms - 1).max()),
    )


def cluster_file(ranks: int, transport: str, found: Fit) -> str:
    """Return the YAML of the bus that was found, with the way in which each number was measured."""
    today = datetime.now(UTC).date().isoformat()
    source = (
        f"measured {today}: neighbour exchanges of {ranks} ranks over {transport}, medians of {ROUNDS}; "
        f"torch {torch.__version__}, {os.cpu_count()} CPUs, {platform.machine()}"
    )
    data = {
        "title": f"this machine, {ranks} processes over {transport}",
        "source": source,
        "topology": {"kind": "bus", "devices": ranks, "link": "loopback"},
        "links": {
            "loopback": {
                "bandwidth": bandwidth_quantity(found.bandwidth_Bps, source),
                "latency": time_quantity(0.0, "a bus within one host: all that a message costs is work, see overhead"),
                "overhead": time_quantity(found.overhead_s, source),
            }
        },
        "reduce": {"bandwidth": bandwidth_quantity(found.reduce_bandwidth_Bps, f"{source}; add_ on all ranks at once")},
    }
    return to_yaml(data, f"Fitted times are within {found.worst_error:.0%} of the measured ones.")


def main(argv: list[str] | None = None) -> int:
    """Calibrate and write the cluster file; return the exit code."""
    flags = Parser(prog="trainers.calibrate", description=__doc__, allow_abbrev=False)
    flags.add_argument("--out", required=True, metavar="FILE", type=Path, help="cluster file to write")
    flags.add_argument("--params", type=int, help="elements of the gradient to be exchanged (default: the model's)")
    flags.add_argument("--workers", type=int, help="on Ray: workers of the parameter server")
    try:
        _calibrate(flags.parse_args(argv))
    except DistsimError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"trainers.calibrate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _calibrate(flags: argparse.Namespace) -> None:
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun == (flags.workers is not None):
        raise ConfigError(
            "run it under torchrun, or with --workers for Ray:\n"
            "  torchrun --nproc-per-node 4 -m trainers.calibrate --out loopback.yaml\n"
            "  python -m trainers.calibrate --workers 4 --out ray.yaml"
        )
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun else flags.workers + 1
    params = flags.params if flags.params is not None else model_params()
    if params < ranks or ranks < 2:
        raise ConfigError(f"calibration needs at least 2 ranks and a parameter for each, not {ranks} and {params}")
    if flags.out.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--out {flags.out}: a cluster file is called NAME.yaml; other names are those of shipped ones"
        )
    sizes = (SMALL_ELEMENTS, params // ranks, params)
    if os.environ.get("RANK", "0") == "0":
        make_writable(flags.out.parent)
        print(f"calibrating with {ranks} ranks: some 10 s ...", file=sys.stderr)
    if under_torchrun:
        from trainers import torch_trainer

        transport, results = torch_trainer.calibrate(sizes, ROUNDS)
    else:
        from trainers import ray_trainer

        transport, results = "Ray", ray_trainer.calibrate(ranks, sizes, ROUNDS)
    if results is None:
        return
    found = fit(ranks, results)
    write_whole(flags.out, cluster_file(ranks, transport, found))
    print(
        f"{transport}, {ranks} ranks: {format_bandwidth(found.bandwidth_Bps)} shared, "
        f"{format_time(found.overhead_s)} a message, "
        f"additions {format_bandwidth(found.reduce_bandwidth_Bps)} a rank; "
        f"fit within {found.worst_error:.0%}; wrote {flags.out}",
    )


def model_params() -> int:
    """Count the parameters of the language model that is trained by default."""
    model = workload.load("language-model", {}, seed=0, dtype="float32").model
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
