"""Models of many kinds with a batch each, and how far they are from their tolerances: what rounding is tried on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Record, Watch, watched
from trainers.accumulation.rounding import Scales, rounding, tolerance
from trainers.workload import Workload
from trainers.workloads import digits, language_model, resnet

Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the summed cross-entropy over the last dimension."""
    logits = model(batch[0])
    return functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten(), reduction="sum")


@dataclass
class Case:
    """A model, a batch, and what is measured of them."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: Loss = entropy
    outputs_of: str = ""

    def step(self, dtype: torch.dtype, size: int | None = None, watch: Watch | None = None, power: int = 1) -> Outcome:
        """Run plain accumulation over micro-batches of `size` samples, by default one; a mean over targets.

        `power` 0 leaves out the weight of a micro-batch in the mean: an error.
        """
        self.model.to(dtype).zero_grad()
        torch.manual_seed(1)
        given, wanted = (each.to(dtype) if each.is_floating_point() else each for each in self.batch)
        outputs: list[Tensor] = []
        hook = self.model.get_submodule(self.outputs_of).register_forward_hook(
            lambda module, args, output: outputs.append(output.detach().clone())
        )
        size, total = size or len(given), 0.0
        for part in zip(torch.split(given, size), torch.split(wanted, size), strict=True):
            if watch is not None:
                watch.begin()
            share = part[1].numel() if power else wanted.numel() / math.ceil(len(given) / size)
            loss = self.loss(self.model, part) / part[1].numel() * share / wanted.numel()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        hook.remove()
        gradients = {name: each.grad for name, each in self.model.named_parameters() if each.grad is not None}
        return Outcome(
            outputs=(torch.cat(outputs),),
            loss=total,
            gradients={name: each.clone() for name, each in gradients.items()},
        )

    def record(self) -> Record:
        """Return what modules give in float64."""
        kept = Record()
        with watched(self.model, kept) as watch:
            self.step(torch.float64, watch=watch)
        return kept

    def scales(self, samples: int = 3, seed: int = 0) -> Scales:
        """Return what rounding does."""
        return rounding(
            self.model,
            lambda watch: self.step(torch.float64, watch=watch),
            self.record(),
            self.step(torch.float64),
            self.batch[1].numel(),
            samples=samples,
            seed=seed,
        )


def ratios(found: Outcome, right: Outcome, scales: Scales, dtype: torch.dtype) -> dict[str, float]:
    """Return differences over tolerances: of outputs, loss and each gradient."""
    dtype = scales.format(dtype)
    pairs = {"loss": (abs(found.loss - right.loss), scales.loss)}
    for which, (one, other) in enumerate(zip(found.outputs, right.outputs, strict=True)):
        pairs[f"output {which}"] = float((one.double() - other.double()).norm()), scales.outputs[which]
    for name, gradient in right.gradients.items():
        pairs[name] = float((found.gradients[name].double() - gradient.double()).norm()), scales.gradients[name]
    return {name: off / tolerance(scale, dtype) if off else 0.0 for name, (off, scale) in pairs.items()}


def classes(*shape: int, kinds: int = 5) -> Tensor:
    """Return drawn targets."""
    return torch.randint(0, kinds, shape)


def of_workload(made: Workload, samples: int) -> Case:
    """Return a case of one of the project's own workloads."""
    batch = made.collate([made.data[index * 37 % len(made.data)] for index in range(samples)])
    return Case(made.model, (batch[0], batch[1]), made.loss)


class Tokens(nn.Module):
    """Ten tokens that repeat, and scalars among the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.out = nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.table(tokens) * self.scale)) / self.temperature
        return out


class Encoder(nn.Module):
    """A library's transformer, with a table of positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
        self.position = nn.Parameter(torch.randn(1, 12, 16) / 10)
        self.into = nn.Linear(8, 16)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 5)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.out(self.layers(self.into(given) + self.position).mean(1))
        return out


class Recurrent(nn.Module):
    """The same weights at each of 30 times."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(8, 16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = self.out(self.memory(given)[0][:, -1])
        return out


class Raw(nn.Module):
    """Weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300, 5) / 17)

    def forward(self, given: Tensor) -> Tensor:
        return given @ self.weight


class Cast(nn.Module):
    """A root mean square norm that computes in float32 whatever its input is, as libraries of language models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, given: Tensor) -> Tensor:
        exact = given.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * exact.to(given.dtype)


def convolutions(norm: Callable[[int], nn.Module]) -> Case:
    """Return a smooth network for images; what its biases in front of an instance norm do is nothing."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=before // 3 % 2 + 1, padding=1), norm(after), nn.SiLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
    return Case(nn.Sequential(*layers), (torch.randn(16, 3, 16, 16), classes(16)))


def layers(norm: Callable[[int], nn.Module], width: int = 32) -> Case:
    """Return six layers with norms, on sequences of 8."""
    made = [each for _ in range(6) for each in (nn.Linear(width, width), norm(width), nn.GELU())]
    return Case(nn.Sequential(*made, nn.Linear(width, 5)), (torch.randn(32, 8, width), classes(32, 8)))


CASES: dict[str, Callable[[], Case]] = {
    "perceptron": lambda: Case(
        nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)),
        (torch.randn(32, 20), classes(32)),
    ),
    "language model": lambda: of_workload(language_model.build(layers=2, width=64, context=32), 4),
    "layer norm": lambda: layers(nn.LayerNorm),
    "group norm": lambda: convolutions(lambda channels: nn.GroupNorm(4, channels)),
    "instance norm": lambda: convolutions(nn.InstanceNorm2d),
    "digits": lambda: of_workload(digits.build(), 32),
    "residual": lambda: of_workload(resnet.build(depth=18, width=4, norm="group", samples=64), 16),
    "tokens": lambda: Case(Tokens(), ((torch.rand(32, 40) ** 4 * 10).long(), classes(32, 40))),
    "encoder": lambda: Case(Encoder(), (torch.randn(32, 12, 8), classes(32))),
    "recurrent": lambda: Case(Recurrent(), (torch.randn(32, 30, 8), classes(32))),
    "raw": lambda: Case(Raw(), (torch.randn(32, 300), classes(32))),
    "float32 within": lambda: layers(Cast),
    "weight norm": lambda: Case(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)), nn.Tanh(), nn.Linear(40, 5)),
        (torch.randn(32, 40), classes(32)),
    ),
}


def made(name: str) -> Case:
    """Return a case with weights and data of its own seed."""
    torch.manual_seed(0)
    return CASES[name]()
