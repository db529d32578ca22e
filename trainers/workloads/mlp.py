"""Digits, read by a chain of linear layers of unequal widths: the plainest sequence that memory plans apply to."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional

from distsim.errors import ConfigError
from distsim.units import shown
from trainers.workload import Workload
from trainers.workloads.digits import HELD_OUT, SIZE, Images


def build(*, widths: str = "512-64-1024-128-512-64", dropout: float = 0.0, samples: int = 4096) -> Workload:
    """Build a layer of each of `widths`, one of 10 logits behind them, and draw `samples` images.

    Raises: ConfigError for widths that are no whole numbers with hyphens between them, for a dropout that is no
    share, and for no samples.
    """
    if not re.fullmatch("[1-9][0-9]{0,5}(-[1-9][0-9]{0,5})*", widths):
        raise ConfigError(f"widths must be numbers from 1 to 999999, as in 512-64-1024, not {shown(widths)}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and less than 1, not {dropout}")
    if not 1 <= samples <= 10**6:
        raise ConfigError(f"samples must be from 1 to 1,000,000, not {samples}")
    return Workload(
        model=chain([int(width) for width in widths.split("-")], dropout),
        data=Images(samples, stream=0),
        loss=loss,
        evaluation=Images(HELD_OUT, stream=1),
        data_name=f"{samples:,} drawn digits",
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the summed cross-entropy, in nats; images are (batch, 1, 16, 16), digits (batch,)."""
    images, digits = batch
    kind = next(model.parameters()).dtype
    logits = model(images.flatten(1).to(kind) / 255)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision cannot sum hundreds
    return functional.cross_entropy(exact, digits, reduction="sum")


def chain(widths: list[int], dropout: float = 0.0) -> nn.Sequential:
    """Return the model: pixels in, (batch, 256), logits of ten digits out, (batch, 10)."""
    taken = [SIZE * SIZE, *widths]
    hidden = [
        nn.Sequential(nn.Linear(before, width), nn.GELU(), *([nn.Dropout(dropout)] if dropout else []))
        for before, width in zip(taken, widths, strict=False)
    ]
    return nn.Sequential(*hidden, nn.Linear(taken[-1], 10))
