"""Precision of the forward pass: autocast, and for fp16 a scale that keeps small gradients from becoming zero."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from distsim.errors import ConfigError, nearest

DTYPES = {"full": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in; None: no autocast, all in the parameters' own dtype."""

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""As torch.amp.GradScaler has them; see https://docs.pytorch.org/docs/stable/amp.html."""
LEAST_SCALE, MOST_SCALE = 1.0, 2.0**127
"""Gradients that overflow unscaled overflow in the model itself: less than 1 could only make others vanish.
Above the most, a float32 ends."""


class Precision:
    """Autocast around forward pass and loss, and the scale of the loss in front of backward.

    Multiply the loss by `scale`, and divide the gradients by it when they are summed; if one of these is not
    finite, leave the optimizer's step out. `update` then adapts the scale.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        """Raises: ConfigError if the precision is unknown or the device does not have it."""
        if precision not in DTYPES:
            raise ConfigError(f"unknown precision {precision!r}{nearest(precision, DTYPES)}")
        self._dtype, self._device = DTYPES[precision], device
        self._scales = precision == "fp16"
        self.scale = FIRST_SCALE if self._scales else 1.0
        self._good_steps = 0
        try:
            with self.autocast():
                pass
        except RuntimeError as error:
            raise ConfigError(f"precision {precision} does not work on {device}: {error}") from None

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context for the forward pass and the loss (not for backward)."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step, in which all gradients were finite, or not.

        Half of it if not; twice as much after every 2000 finite steps in a row. Nothing but in fp16.
        """
        if not self._scales:
            return
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, LEAST_SCALE)
        elif self._good_steps == GROWTH_INTERVAL:
            self.scale = min(self.scale * 2, MOST_SCALE)
            self._good_steps = 0

    def state(self) -> dict[str, float]:
        """Return what `restore` needs to go on from here."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a saved state."""
        self.scale, self._good_steps = float(state["scale"]), int(state["good_steps"])
