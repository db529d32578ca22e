"""A model run as it is, and with a sight looking on: for tests of probes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainers.accumulation.probes import Sight, watched


def run(model: nn.Module, given: Tensor) -> dict[str, Tensor]:
    """Return loss, gradients and buffers of a step from the same random numbers."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(given).square().sum()
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **gradients, "random": torch.get_rng_state(), **dict(model.named_buffers())}


def kept(model: nn.Module, given: Tensor, sight: Sight) -> dict[str, Tensor]:
    """Return the same of a watched step."""
    with watched(model, sight):
        return run(model, given)
