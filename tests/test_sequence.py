"""Which layers of a workload memory plans apply to, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from trainers.profile import example_of
from trainers.workload import Workload, load, sequence


def test_an_example_is_what_reaches_the_layers() -> None:
    workload = load("language-model", {"layers": 2, "width": 32, "context": 16}, 0, "float64")
    tokens, targets = workload.collate([workload.data[index] for index in range(3)])
    given = example_of(workload, (tokens, targets))
    model: Any = workload.model
    wanted = model.embedding(tokens) + model.position.weight
    assert torch.equal(given, wanted) and given.requires_grad and given.is_leaf
    assert sequence(workload) is model.blocks
    assert all(each.grad is None for each in model.parameters())


def own(
    model: nn.Module, layers: str | None = None, loss: Callable[[Any, Any], Tensor] = lambda model, batch: model(batch)
) -> Workload:
    return Workload(model=model, data=torch.ones(3, 4), layers=layers, loss=loss)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.encoder = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(4, 4)), "empty": nn.Sequential()})

    def forward(self, given: Tensor) -> Tensor:
        made: Tensor = self.encoder["blocks"](self.norm(given))
        return made


def test_the_layers_of_a_workload() -> None:
    nested = Nested()
    assert sequence(own(nested, "encoder.blocks")) is nested.encoder["blocks"]
    alone = nn.Sequential(nn.Linear(4, 4))
    assert sequence(own(alone)) is sequence(own(alone, "")) is alone
    example_of(own(nested, "encoder.blocks"), torch.ones(3, 4))
    mean = nested.norm.running_mean
    assert mean is not None and torch.equal(mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (
            Nested(),
            None,
            "a memory plan needs an nn.Sequential, and the model is a Nested; give Workload layers=, the name of one "
            "in it; its nn.Sequential parts: encoder.blocks, encoder.empty",
        ),
        (
            nn.Linear(4, 4),
            None,
            "a memory plan needs an nn.Sequential, and the model is a Linear; give Workload layers=, the name of one "
            "in it; no part of it is one",
        ),
        (
            Nested(),
            "encoder.block",
            "the workload's layers='encoder.block' are no part of its model; did you mean 'encoder.blocks'?",
        ),
        (
            Nested(),
            "norm",
            "the workload's layers='norm' must be an nn.Sequential, not a BatchNorm1d; its nn.Sequential parts: "
            "encoder.blocks, encoder.empty",
        ),
        (
            Nested(),
            "encoder.empty",
            "the workload's layers='encoder.empty' must have layers; this nn.Sequential has none",
        ),
    ],
)
def test_layers_that_are_none(model: nn.Module, layers: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        sequence(own(model, layers))
    assert str(raised.value) == message


def test_a_loss_that_does_not_run_the_layers() -> None:
    skips = own(Nested(), "encoder.blocks", lambda model, batch: model.norm(batch).sum())
    with pytest.raises(ConfigError, match="the workload's loss does not run the layers that memory plans apply to"):
        example_of(skips, torch.ones(3, 4))
    names = own(Nested(), "encoder.blocks", lambda model, batch: model.encoder["blocks"](input=batch))
    with pytest.raises(ConfigError, match="are given one tensor, and this workload's are not"):
        example_of(names, torch.ones(3, 4))
