"""Small models and losses, each with something planted in it that makes a sample's gradient depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from substitution import CLASSES, FEATURES, Case, cross_entropy, vectors
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS = 8, 5


def stack(*middle: nn.Module) -> nn.Sequential:
    """Modules between two linear layers; the first of them is `1`."""
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), *middle, nn.Linear(WIDTH, CLASSES))


class Center(nn.Module):
    """Subtracts the mean over the batch, before and after a child."""

    def __init__(self, child: nn.Module | None = None, *, before: bool = False, after: bool = True) -> None:
        super().__init__()
        self.child, self.before, self.after = child or nn.Identity(), before, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(x - x.mean(0) if self.before else x)
        return y - y.mean(0) if self.after else y


class Leaf(nn.Module):
    """A function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def centered(dim: int = 0) -> Leaf:
    return Leaf(lambda x: x - x.mean(dim, keepdim=True))


class MeanChild(nn.Module):
    """Its child's mean is right, as means of losses are; what it does with it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = Leaf(lambda x: x.mean(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x - self.mean(x)
        return y


class Checkpointed(nn.Module):
    """Runs its child again in backward."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.child, x, use_reentrant=False)


class Dropping(nn.Module):
    """Dropout in its own code, not in its children's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(functional.dropout(self.one(x), 0.2)) + x
        return y


class Attention(nn.Module):
    """Self-attention over tokens, (B, T, C), with a map (B, heads, T, T) that a child sees."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 18), nn.Linear(6, FEATURES)
        self.map, self.head, self.dropout = nn.Identity(), nn.Linear(FEATURES, CLASSES), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 3)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))
        plain = self.map((q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)) @ v
        fast = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        y: Tensor = self.head((x + self.out((plain + fast).transpose(1, 2).flatten(2))).mean(1))
        return y


class TimeFirst(nn.Module):
    """(T, B, C), as older recurrent and transformer modules have it; positions are a constant (T, C)."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.inner, self.position = nn.Linear(FEATURES, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0)
        self.middle, self.head = middle, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) + self.position(torch.arange(x.shape[1]))
        y: Tensor = self.head(self.middle(self.layer(x.transpose(0, 1))).mean(0))
        return y


class Flat(nn.Module):
    """Tokens of all samples in one dimension: (B*T, C), or (T*B, C)."""

    def __init__(self, middle: nn.Module, *, time_first: bool) -> None:
        super().__init__()
        self.inner, self.middle, self.head = nn.Linear(FEATURES, WIDTH), middle, nn.Linear(WIDTH, CLASSES)
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        x = x.transpose(0, 1) if self.time_first else x
        y: Tensor = self.head(self.middle(x.reshape(-1, WIDTH)).view(x.shape).mean(0 if self.time_first else 1))
        return y


class Experts(nn.Module):
    """A token goes to one of two experts, which sees those that come to it, or the first of them up to a capacity."""

    def __init__(self, middle: nn.Module, capacity: float | None = None) -> None:
        super().__init__()
        self.gate, self.capacity = nn.Linear(WIDTH, 2), capacity
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), each, nn.Linear(WIDTH, WIDTH)) for each in (nn.Tanh(), middle)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            index = (choice == number).nonzero()[:, 0]
            if self.capacity is not None:
                index = index[: int(self.capacity * len(x) / 2)]
            if len(index):
                y = y.index_add(0, index, expert(x[index]) * weight[index, None])
        return y


class Balanced(nn.Module):
    """Returns an output and how unevenly it has used its gates, over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.gate(x).softmax(-1)
        return self.up(x) * gates.amax(-1, keepdim=True), gates.mean(0).square().sum()


class WithBalance(nn.Module):
    """A model that passes its child's balance on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.balanced, self.head = nn.Linear(FEATURES, WIDTH), Balanced(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, balance = self.balanced(self.inner(x))
        return self.head(y), balance


class OwnLoss(nn.Module):
    """A model that computes its loss: the mean over the batch, or the sum."""

    def __init__(self, middle: nn.Module, reduction: str = "mean") -> None:
        super().__init__()
        self.model, self.reduction = stack(middle), reduction

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.model(x)
        return {"loss": functional.cross_entropy(logits, y, reduction=self.reduction), "logits": logits}


class Normalised(torch.autograd.Function):
    """Leaves values alone, and divides the gradient by its norm over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / gradient.norm()


normalised: Callable[[Tensor], Tensor] = Normalised.apply


class Backward(nn.Module):
    """Normalises the gradient over the batch, on its child's input side and on its output side."""

    def __init__(self, child: nn.Module, *, before: bool = False, after: bool = False) -> None:
        super().__init__()
        self.child, self.before, self.after = child, before, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(normalised(x) if self.before else x)
        return normalised(y) if self.after else y


class Weighted(torch.autograd.Function):
    """x @ w, with a gradient for w of norm 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w = ctx.saved_tensors
        each = x.T @ gradient
        return gradient @ w.T, each / each.norm()


weighted: Callable[[Tensor, Tensor], Tensor] = Weighted.apply


class UnitGradient(nn.Module):
    """Its weight's gradient has always norm 1; the weight is its own, or in a list that nobody calls."""

    def __init__(self, *, listed: bool = False) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.weight = None if listed else weight
        self.weights = nn.ParameterList([weight] if listed else [])

    def forward(self, x: Tensor) -> Tensor:
        return weighted(x, self.weights[0] if self.weight is None else self.weight)


class Drifting(nn.Module):
    """Adds how often it has been called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class RunningMean(nn.Module):
    """Subtracts a mean that the batch changes first."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Picked(nn.Module):
    """Hands the positive numbers of all samples to its child, in one dimension, and puts them back."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child, self.head = child, nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.masked_scatter(x > 0, self.child(x[x > 0])))
        return y


class OneByOne(nn.Module):
    """Calls its child sample by sample."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.child(each) for each in x])


class Similarities(nn.Module):
    """All pairs of samples: (B, B)."""

    def forward(self, x: Tensor) -> Tensor:
        unit: Tensor = functional.normalize(x, dim=-1)
        return 5 * unit @ unit.T


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    """InfoNCE: each sample against all others."""
    scores = Similarities()(model(batch[0]))
    return functional.cross_entropy(scores, torch.arange(len(scores)), reduction="sum")


def scored(model: nn.Module, batch: Any) -> Tensor:
    """InfoNCE of a model that returns all pairs."""
    scores = model(batch[0])
    return functional.cross_entropy(scores, torch.arange(len(scores)), reduction="sum")


def balancing(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy, and how unevenly classes are predicted over the batch."""
    logits: Tensor = model(batch[0])
    balance = logits.softmax(-1).mean(0).square().sum()
    return functional.cross_entropy(logits, batch[1], reduction="sum") + balance * len(logits)


def by_itself(items: list[Any]) -> Any:
    """A batch normalised by its own mean."""
    numbers, classes = zip(*items, strict=True)
    stacked = torch.stack(numbers)
    return stacked - stacked.mean(0), torch.stack(classes)


def own_sum(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(*batch)["loss"]
    return loss


def own_mean(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(*batch)["loss"]
    return loss * len(batch[0])


def with_balance(model: nn.Module, batch: Any) -> Tensor:
    logits, balance = model(batch[0])
    loss: Tensor = cross_entropy(lambda _: logits, batch) + balance * len(logits)
    return loss


def penalised(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + torch.stack([each.square().sum() for each in model.parameters()]).sum()


def mean_of_batch(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) / len(batch[0])


def in_parts(model: nn.Module, batch: Any) -> Tensor:
    assert isinstance(model, nn.ModuleDict)
    return cross_entropy(lambda x: model["head"](model["body"](x)), batch)


def convolutions(norm: Callable[[int], nn.Module]) -> Case:
    """Norms `1` and `3.1`, with modules that work in place between them."""
    inner = nn.Sequential(nn.Conv2d(4, 4, 3), norm(4))
    head = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(True), inner, nn.ReLU(True), *head)
    return Case(model, vectors(8, 2, 6, 6))


def tokens(model: nn.Module) -> Case:
    """Samples of (T, C)."""
    return Case(model, vectors(7, TOKENS, FEATURES))


def picked() -> list[Any]:
    """How many numbers are positive, so that only the second micro-batch's look as if they had a batch dimension."""
    data = vectors(7)
    for (numbers, _), positive in zip(data, (1, 2, 2, 2, 2, 2, 3), strict=True):
        numbers.abs_().mul_(torch.where(torch.arange(FEATURES) < positive, 1, -1))
    return data
