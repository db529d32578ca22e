"""Running a layer again exactly as it ran first: the same random numbers, buffers, modes and precision.

What runs again leaves no trace: buffers such as BatchNorm's statistics and all random states are then as they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distsim.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """Where random numbers come from: its state, how to set it, and whether two states are the same."""

    get: Callable[[], Any]
    put: Callable[[Any], object]
    same: Callable[[Any, Any], bool]


def _same_numpy(one: Any, other: Any) -> bool:
    return bool(one[2:] == other[2:] and np.array_equal(one[1], other[1]))


TORCH = Source(torch.get_rng_state, torch.set_rng_state, torch.equal)
PYTHON = Source(random.getstate, random.setstate, lambda one, other: bool(one == other))
NUMPY = Source(np.random.get_state, np.random.set_state, _same_numpy)


def sources(device: torch.device) -> tuple[Source, ...]:
    """Return the random numbers that a layer on `device` may draw: all but those of generators of its own."""
    if device.type != "cuda":
        return TORCH, PYTHON, NUMPY
    put: Callable[[Any], object] = partial(torch.cuda.set_rng_state, device=device)
    return TORCH, PYTHON, NUMPY, Source(partial(torch.cuda.get_rng_state, device), put, torch.equal)


class FirstRun:
    """What a layer's first run has depended on beside its input.

    Make one before the run, call `ended` after it: only what the run has changed is kept, so that a layer without
    random numbers and statistics costs nothing. A buffer that it has left alone is taken to stay as it is.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        modules = list(layer.modules())
        self.modes = [(module, module.training) for module in modules]
        self.parameters = [(parameter, parameter._version) for parameter in layer.parameters()]
        self.drawn = [(source, source.get()) for source in sources(device)]
        held = [(module, name, each) for module in modules for name, each in module._buffers.items()]
        self.buffers = [(module, name, each, each.clone()) for module, name, each in held if each is not None]
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", device.type})
        ]
        self.caches = torch.is_autocast_cache_enabled()

    def ended(self) -> None:
        """Forget what the run has not changed."""
        self.drawn = [(source, state) for source, state in self.drawn if not source.same(state, source.get())]
        self.buffers = [
            (module, name, each, before)
            for module, name, each, before in self.buffers
            if module._buffers.get(name) is not each or not torch.equal(each, before)
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Put everything as it was before the first run, and at the end as it is now.

        Raises: ConfigError if a parameter has been changed since, which plain autograd would refuse as well.
        """
        for parameter, version in self.parameters:
            if parameter._version != version:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} was changed between forward and backward, and its "
                    "layer is to be run again; update parameters after the backward pass"
                )
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.caches))
            stack.enter_context(torch.enable_grad())
            for module, training in self.modes:
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            for module, name, _, before in self.buffers:
                stack.callback(_put_buffer, module, name, module._buffers.get(name))
                _put_buffer(module, name, before.clone())  # which the run may change in turn
            for source, state in self.drawn:
                stack.callback(source.put, source.get())
                source.put(state)
            yield


def _put_buffer(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    module._buffers[name] = buffer
