"""What a step of training has given, before the optimizer: outputs, loss, gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcome:
    """Of the full batch, or of its micro-batches together."""

    outputs: tuple[Tensor, ...]
    """Floating-point tensors that the model itself returned, detached, samples in order; none if it was not called."""
    loss: float
    """Mean over all that counts."""
    gradients: dict[str, Tensor]
    """Of that mean, by the name of the parameter, those that are trained; zeros where there is none."""
