"""The training loop in one process: a single rank needs no other, and what it does is seen directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from trainers.config import RunConfig
from trainers.exchanger import Exchanger
from trainers.fingerprint import model_digest
from trainers.loop import RankResult, check, train
from trainers.plan import plan, trainable
from trainers.transport import LocalTransport
from trainers.workload import Workload

CPU = torch.device("cpu")


class Model(nn.Module):
    """Dropout, batch normalisation in evaluation mode, a scalar parameter and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8).eval()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.norm(self.frozen(self.first(inputs))))) * self.scale
        return out


def squares(model: nn.Module, batch: Any) -> Tensor:
    total: Tensor = (model(batch[0]) - batch[1]).square().sum()
    return total


def workload(loss: Any = squares) -> Workload:
    torch.manual_seed(0)
    inputs = torch.randn(40, 4)
    samples = list(zip(inputs, inputs.sum(1, keepdim=True), strict=True))
    return Workload(model=Model(), data=samples[:32], loss=loss, evaluation=samples[32:])


def trained(work: Workload, **options: Any) -> tuple[RankResult, list[dict[str, Any]]]:
    """Train as the only rank; return its result and what was told of evaluations."""
    config = RunConfig(strategy="ring", workers=1, steps=4, optimizer="SGD:lr=0.01", **options)
    made = plan(trainable(work.model), "ring", 1, 25)
    exchanger, told = Exchanger(made, 0, [LocalTransport()], CPU), list[dict[str, Any]]()
    try:
        result = train(
            config, work, made, 0, exchanger, lambda step, **seen: None, lambda step, **seen: told.append(seen)
        )
    finally:
        exchanger.close()
    return result, told


def test_dropout_follows_from_the_seed_alone() -> None:
    losses = []
    for seed in (1, 1, 2):
        torch.rand(seed * 7)  # whatever was drawn before
        losses.append(trained(workload(), seed=seed)[0].losses)
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_changes_nothing_of_the_training() -> None:
    plain, evaluated = workload(), workload()
    without, _ = trained(plain)
    result, told = trained(evaluated, evaluate_every=1)
    assert result.losses == without.losses and model_digest(plain.model) == model_digest(evaluated.model)
    assert len(told) == 4 and all(each["count"] == 8 for each in told)
    modes = {name: module.training for name, module in evaluated.model.named_modules()}
    assert modes == {name: name != "norm" for name in modes}


def test_what_is_frozen_stays_as_it_is_and_the_scalar_is_trained() -> None:
    work, before = workload(), workload()
    trained(work)
    after = dict(work.model.named_parameters())
    same = {name for name, parameter in before.model.named_parameters() if torch.equal(parameter, after[name])}
    assert same == {"frozen.weight", "frozen.bias"}


@pytest.mark.parametrize("loss", [lambda model, batch: model(batch[0]), lambda model, batch: 1.0])
def test_a_loss_that_is_no_sum_is_refused(loss: Any) -> None:
    with pytest.raises(ConfigError, match="the workload's loss must return a sum"):
        trained(workload(loss))


def test_several_servers_take_only_optimizers_that_they_can_share() -> None:
    def config(strategy: str, optimizer: str) -> RunConfig:
        return RunConfig(strategy=strategy, workers=2, optimizer=optimizer)

    check(config("parameter-server:servers=2", "AdamW:lr=0.1"), workload())
    check(config("parameter-server", "Adafactor:lr=0.1"), workload())
    check(config("ring", "Adafactor:lr=0.1"), workload())
    with pytest.raises(ConfigError, match="--optimizer Adafactor with parameter-server:servers=2: each of several"):
        check(config("parameter-server:servers=2", "Adafactor:lr=0.1"), workload())
