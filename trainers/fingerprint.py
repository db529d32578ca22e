"""Fingerprints: before the first tensor moves, ranks make sure that they are about to do the same thing.

Without it, a rank with another model or batch shape aborts its peers deep inside gloo, or trains on silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import nn

from distsim import record
from distsim.errors import ConfigError
from trainers.config import RunConfig
from trainers.plan import Plan
from trainers.workload import Workload, data_digest

Fingerprint = dict[str, str]


def fingerprint(config: RunConfig, workload: Workload, plan: Plan, device: str) -> Fingerprint:
    """Return what must be equal on all ranks, by name: schedules, model, data and every value of the run."""
    values = {f"configuration: {name}": str(value) for name, value in asdict(config).items()}
    return {
        **values,
        "device": device,
        "schedule (digest)": record.digest(plan.exchanges),
        "model (digest)": model_digest(workload.model),
        "data (digest)": data_digest(workload),
    }


def model_digest(model: nn.Module) -> str:
    """SHA-256 of names, shapes, types and values of all parameters, and of which are trained, in hexadecimal."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}".encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def agree(fingerprints: Sequence[Fingerprint]) -> None:
    """Compare the fingerprints of ranks 0, 1, 2, ...

    Raises: ConfigError naming each rank that differs from rank 0, and in what.
    """
    lines = []
    for rank, other in enumerate(fingerprints):
        names = list(dict.fromkeys((*fingerprints[0], *other)))
        for name in names:
            ours, theirs = fingerprints[0].get(name, "absent"), other.get(name, "absent")
            if ours != theirs:
                lines.append(f"  rank {rank}: {name} is {_short(theirs)}, on rank 0 it is {_short(ours)}")
    if lines:
        raise ConfigError("\n".join(["ranks disagree; nothing has been exchanged:", *lines[:10]]))


def _short(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:12]}..."
