"""Layers of all kinds, and what training them comes to, for tests of executed memory plans."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from distsim.memory.chain import Chain
from distsim.memory.plan import DROPS, MemoryPlan, with_drops
from distsim.memory.replay import replay
from trainers.workloads.language_model import Block

KEEP = "Fall_1 Fall_2 Fall_3 LOSS B_3 B_2 B_1"
RECOMPUTE = "F_1 F_2 D_1 F_3 D_2 LOSS D_3 F_1 F_2 D_1 Fall_3 B_3 D_2 F_1 Fall_2 B_2 D_1 Fall_1 B_1"
OFFLOAD = "Fall_1 Wall_1 Fall_2 D_1 Wall_2 Fall_3 D_2 LOSS Rall_2 B_3 Rall_1 B_2 B_1"


class Transposed(nn.Module):
    """Its output is not contiguous, and it saves parts of one tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * width)

    def forward(self, inputs: Tensor) -> Tensor:
        one, other = self.both(inputs).chunk(2, -1)
        out: Tensor = (one * torch.tanh(other)).t().contiguous().t()
        return out


class Skipped(nn.Module):
    """Is left out or made noisy at random, by the random numbers of Python and NumPy; saves parts of its input."""

    def forward(self, inputs: Tensor) -> Tensor:
        factor = np.random.rand() + (random.random() < 0.5)
        return inputs[:, 1:].exp().sum(1, keepdim=True).sin() * factor + inputs[:, :1] * inputs


class Squared(Function):
    """Asks for what it has saved twice."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, factor)
        return inputs.square() * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        inputs = ctx.saved_tensors[0]
        factor = ctx.saved_tensors[1]
        return gradient * 2 * inputs * factor, gradient * inputs.square()


class Own(nn.Module):
    """Uses an autograd function of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = Squared.apply(inputs.sin(), inputs.exp())  # type: ignore[no-untyped-call]
        return out


class Checkpointed(nn.Module):
    """Recomputes itself."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, inputs, use_reentrant=self.reentrant)
        return out


class Running(nn.Module):
    """Its output depends on statistics that it changes; one buffer is changed in place, the other one replaced."""

    mean: Tensor
    calls: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(inputs.detach().mean(0), alpha=0.1)
            self.calls = self.calls + 1
        return (inputs - self.mean.clone()) * self.calls.cos()


class Residual(nn.Module):
    """Convolution and batch normalisation beside a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(True))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.inner(inputs) + inputs
        return out


class Model(nn.Module):
    """Layers within a model, whose first part makes their input from the data and may have no parameters."""

    def __init__(self, before: nn.Module, *layers: nn.Module) -> None:
        super().__init__()
        self.before, self.layers, self.after = before, nn.Sequential(*layers), nn.LazyLinear(3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.after(self.layers(self.before(inputs)).flatten(1))
        return out


def perceptron() -> tuple[nn.Module, Tensor]:
    layers = (
        nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Dropout(0.2)),
        nn.Tanh(),
        nn.Sequential(nn.Linear(10, 4), nn.Dropout(0.5), nn.LayerNorm(4)),
        nn.Linear(4, 7),
    )
    return Model(nn.Linear(5, 6), *layers), torch.randn(3, 5)


def transformer() -> tuple[nn.Module, Tensor]:
    return Model(nn.Linear(5, 32), *(Block(32, 0.1) for _ in range(3)), nn.Dropout(0.1)), torch.randn(2, 7, 5)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), Residual(4), nn.Sequential(nn.AvgPool2d(2), nn.Dropout2d(0.3)))
    return Model(nn.Identity(), *layers), torch.randn(3, 1, 8, 8)


def oddities() -> tuple[nn.Module, Tensor]:
    normed, shared = spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 6)
    frozen = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).requires_grad_(False)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
    layers = (
        Transposed(6),
        Skipped(),
        nn.Identity(),
        nn.Sequential(normed, shared),
        Running(6),
        frozen,
        nn.Sequential(shared),
    )
    odd = (
        Own(),
        Checkpointed(inner, False),
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten()),
        Checkpointed(inner, True),
    )
    return Model(nn.Identity(), *layers, *odd), torch.randn(4, 6)


def frozen_first() -> tuple[nn.Module, Tensor]:
    frozen = [nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)).requires_grad_(False) for _ in range(2)]
    return Model(nn.Identity(), *frozen, nn.Sequential(nn.Linear(5, 4), nn.GELU()), nn.Linear(4, 4)), torch.randn(3, 5)


def embedding() -> tuple[nn.Module, Tensor]:
    layers = (nn.Sequential(nn.Embedding(9, 8), nn.Dropout(0.1)), nn.Linear(8, 4), nn.Sigmoid())
    return Model(nn.Identity(), *layers), torch.randint(9, (3, 2))


MODELS = (perceptron, transformer, convolutions, oddities, frozen_first, embedding)


def made(kind: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[Any, Tensor]:
    """A model and a batch, the same ones every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = kind()
        model.eval()(inputs)  # the lazy layer's width
        return model.train(), inputs


PRECISIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "full": nullcontext,
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "bf16, no cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
}


def seen(
    model: Any, inputs: Tensor, *, precision: str = "full", order: str = "in turn", steps: int = 2
) -> list[Tensor]:
    """Train a little; return all that there is to see: losses, gradients, buffers, and random numbers drawn after."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        batches = [inputs, inputs.flip(0)]
        if inputs.is_floating_point():
            batches[0] = batches[0].clone().requires_grad_(step > 0)
        losses = []
        whole = order == "within autocast"
        with PRECISIONS[precision]() if whole else nullcontext():
            for each in batches:
                with nullcontext() if whole else PRECISIONS[precision]():
                    losses.append(model(each).float().square().sum())
                if order == "in turn" or whole:
                    torch.autograd.backward(losses[-1])
        if order == "alive at once":
            for loss in reversed(losses):
                torch.autograd.backward(loss)
        found += losses + [each.grad for each in (*batches, *model.parameters()) if each.grad is not None]
        found += [each.clone() for each in model.buffers()]
        optimizer.step()
    return [*found, torch.rand(3), torch.tensor(random.random()), torch.from_numpy(np.random.rand(3))]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def chain_of(layers: int, size: list[float] | None = None, saved: list[float] | None = None) -> Chain:
    """A chain for `replay`; copies take about as long as layers, so that they overlap in all ways."""
    return Chain(
        forward=np.arange(1.0, layers + 1),
        backward=np.full(layers, 2.0),
        size=np.array(size or [1.0] * (layers + 1)),
        saved=np.array(saved or [2.0] * layers),
        write=np.full(layers, 1.5),
        read=np.full(layers, 2.5),
        write_saved=np.full(layers, 4.0),
        read_saved=np.full(layers, 3.0),
    )


def tidied(plan: MemoryPlan, chain: Chain) -> MemoryPlan:
    """The same with every drop as early as it can be."""
    return with_drops(chain, [row for row in plan.rows() if row[0] not in DROPS])


def waits_of(plan: MemoryPlan, layers: int, overlap: Any, tight: bool) -> Any:
    """What the rows wait for, if tight with no more memory than they need one after the other."""
    chain = chain_of(layers)
    least = replay(chain, plan).peak_memory if tight else None
    return replay(chain, plan, least, overlap).waits if overlap else None


class Ran:
    """Counts the calls of layers, apart from what the executor counts."""

    def __init__(self, layers: nn.Sequential) -> None:
        self.calls = [0] * len(layers)
        for place, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, place=place: self.count(place))

    def count(self, place: int) -> None:
        self.calls[place] += 1


def three(inner: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), inner(), nn.Linear(4, 4))


def loss_of(layers: nn.Module, inputs: Tensor | None = None) -> Tensor:
    torch.manual_seed(1)
    given = torch.randn(3, 4) if inputs is None else inputs
    loss: Tensor = layers(given).square().sum()
    return loss


def gradients(layers: nn.Module, inputs: Tensor | None = None) -> list[Tensor]:
    layers.zero_grad()
    torch.autograd.backward(loss_of(layers, inputs))
    return [each.grad for each in layers.parameters() if each.grad is not None]
