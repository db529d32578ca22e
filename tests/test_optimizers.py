"""Optimizers and learning rates from specs, against torch's own classes and schedulers and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from distsim.errors import ConfigError
from trainers.optimizers import build, learning_rates, names

NOT_HERE = {"LBFGS": "closure", "SparseAdam": "does not support dense gradients", "Muon": "only supports 2D parameters"}


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def trained(of: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """Return the parameters after three steps on fixed data."""
    inputs = torch.linspace(-1, 1, 15).reshape(5, 3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(of(inputs).square().sum())
        optimizer.step()
    return [parameter.detach().flatten().tolist() for parameter in of.parameters()]


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """Return the learning rate of each step."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def sgd(learning_rate: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=learning_rate)


def test_all_of_torch_are_there() -> None:
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adafactor", "LBFGS"} <= names().keys()
    assert all(getattr(torch.optim, name) is kind for name, kind in names().items())
    assert "Optimizer" not in names() and "lr_scheduler" not in names()


@pytest.mark.parametrize("name", sorted(set(names()) - NOT_HERE.keys()))
def test_each_trains_as_the_class_itself(name: str) -> None:
    ours, theirs = model(), model()
    before = [parameter.detach().flatten().tolist() for parameter in ours.parameters()]
    expected = trained(theirs, getattr(torch.optim, name)(theirs.parameters(), lr=0.01))
    assert trained(ours, build(f"{name}:lr=1e-2", ours.parameters())) == expected != before


@pytest.mark.parametrize(
    ("spec", "kind", "options"),
    [
        ("SGD", torch.optim.SGD, {}),
        ("SGD:lr=.5,momentum=0.9,nesterov=true", torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "nesterov": True}),
        (
            "AdamW:lr=3e-4,weight_decay=0.1,betas=0.9;0.95",
            torch.optim.AdamW,
            {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)},
        ),
        ("Adam:amsgrad=false,foreach=none,fused=true", torch.optim.Adam, {"fused": True}),
        ("Adafactor:eps=none;1e-4,d=2", torch.optim.Adafactor, {"eps": (None, 1e-4), "d": 2}),
        ("ASGD:t0=100", torch.optim.ASGD, {"t0": 100}),
    ],
)
def test_options_reach_the_class(spec: str, kind: Any, options: dict[str, Any]) -> None:
    parameters = list(model().parameters())
    optimizer = build(spec, iter(parameters))
    assert type(optimizer) is kind
    assert optimizer.defaults == kind(parameters, **options).defaults
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == [id(each) for each in parameters]
    assert not optimizer.state  # the trial step was made elsewhere


def test_whole_numbers_stay_whole() -> None:
    optimizer = build("Muon:ns_steps=3,ns_coefficients=3;-4;2,adjust_lr_fn=original", [nn.Parameter(torch.ones(2, 2))])
    assert optimizer.defaults["ns_steps"] == 3 and type(optimizer.defaults["ns_steps"]) is int
    assert optimizer.defaults["ns_coefficients"] == (3.0, -4.0, 2.0)
    assert optimizer.defaults["adjust_lr_fn"] == "original"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *((name, why) for name, why in NOT_HERE.items()),
        ("sgd:lr=1", r"unknown optimizer 'sgd'; did you mean 'SGD'\?"),
        ("Adamw", r"unknown optimizer 'Adamw'; did you mean 'AdamW'\?"),
        ("RMSProb", r"unknown optimizer 'RMSProb'; did you mean 'RMSprop'\?"),
        ("Optimizer", "unknown optimizer 'Optimizer'"),
        ("", "unknown optimizer ''; valid: ASGD, "),
        ("Adam:", "expected KEY=VALUE, not ''"),
        ("Adam:lr", "expected KEY=VALUE, not 'lr', as in Adam:"),
        ("Adam:lr=1,lr=2", "lr is given twice"),
        ("Adam:bets=0.9;0.9", r"optimizer Adam has no option 'bets'; did you mean 'betas'\?"),
        ("Adam:params=3", "no option 'params'"),
        ("Adam:lr=fast", "lr cannot be 'fast'; expected a number"),
        ("Adam:lr=nan", "lr cannot be 'nan'; expected a number"),
        ("Adam:lr=1e999", "lr cannot be '1e999'; expected a number"),
        ("Adam:betas=0.9", "betas cannot be '0.9'; expected 2 values with ';' between them"),
        ("Adam:betas=0.9;x", "betas cannot be '0.9;x'; expected a number"),
        ("Adam:amsgrad=True", "amsgrad cannot be 'True'; expected true or false"),
        ("Adam:foreach=1", "foreach cannot be '1'; expected none or true or false"),
        ("Muon:ns_steps=1.5", "ns_steps cannot be '1.5'; expected a whole number"),
        ("Adam:lr=-1", "optimizer 'Adam:lr=-1': Invalid learning rate: -1"),
        ("Adam:betas=0.9;1.5", "Invalid beta parameter"),
        ("SGD:nesterov=true", "Nesterov momentum requires a momentum"),
        ("Adam:fused=true,foreach=true", "cannot be `True` together"),
        ("Adam:capturable=true", "cannot make the steps of this training"),  # on CPU, and not before step()
        ("SGD:differentiable=true", "cannot make the steps of this training"),
    ],
)
def test_mistakes_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(spec, model().parameters())


def test_no_parameters() -> None:
    with pytest.raises(ConfigError, match="empty parameter list"):
        build("SGD", [])


def test_learning_rates_by_hand() -> None:
    assert rates(learning_rates("constant", sgd(), 3), 3) == [0.5, 0.5, 0.5]
    assert rates(learning_rates("constant:warmup=4", sgd(1.0), 6), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(learning_rates("linear", sgd(1.0), 5), 5) == [1, 0.75, 0.5, 0.25, 0]
    assert rates(learning_rates("linear:final=0.5", sgd(1.0), 5), 5) == [1, 0.875, 0.75, 0.625, 0.5]
    assert rates(learning_rates("linear:warmup=2", sgd(1.0), 6), 6) == [0.5, 1, 0.75, 0.5, 0.25, 0]
    half = math.sqrt(0.5)
    cosine = [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0]
    assert rates(learning_rates("cosine", sgd(1.0), 5), 5) == pytest.approx(cosine, abs=1e-15)
    assert rates(learning_rates("cosine:warmup=2", sgd(1.0), 6), 6) == pytest.approx([0.5, *cosine], abs=1e-15)


@given(steps=st.integers(2, 60), final=st.sampled_from(["0", "0.1", "0.75", "1"]))
def test_without_warmup_they_are_torchs_own(steps: int, final: str) -> None:
    own = sgd()
    theirs = CosineAnnealingLR(own, T_max=steps - 1, eta_min=0.5 * float(final))
    expected = rates(theirs, steps)
    assert rates(learning_rates(f"cosine:final={final}", sgd(), steps), steps) == pytest.approx(expected, abs=1e-12)

    own = sgd()
    expected = rates(LinearLR(own, start_factor=1.0, end_factor=float(final), total_iters=steps - 1), steps)
    assert rates(learning_rates(f"linear:final={final}", sgd(), steps), steps) == pytest.approx(expected, abs=1e-12)


@given(steps=st.integers(1, 60), data=st.data(), shape=st.sampled_from(["linear", "cosine"]))
def test_up_to_the_peak_once_and_down_to_the_end(steps: int, data: st.DataObject, shape: str) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    seen = rates(learning_rates(f"{shape}:warmup={warmup},final=0.2", sgd(1.0), steps), steps + 3)
    peak = max(warmup - 1, 0)
    assert seen[:peak] == pytest.approx([(step + 1) / warmup for step in range(peak)])
    assert seen[peak] == 1
    if steps > 1:
        assert seen[steps - 1 :] == pytest.approx([0.2] * 4)  # also for whoever goes on
    assert all(before > after for before, after in zip(seen[peak : steps - 1], seen[peak + 1 : steps], strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosin", r"unknown schedule 'cosin'; did you mean 'cosine'\?"),
        ("cosine:warmup=10", "warmup must be from 0 to 9, less than the 10 steps"),
        ("cosine:warmup=-1", "warmup must be from 0 to 9"),
        ("cosine:warmup=1.5", "warmup cannot be '1.5'; expected a whole number"),
        ("linear:final=1.5", "final is a fraction of the learning rate, from 0 to 1"),
        ("linear:end=0.5", "schedule linear has no option 'end'"),
        ("constant:final=0.5", "schedule constant has no option 'final'"),
        ("linear:warmup", "expected KEY=VALUE"),
    ],
)
def test_mistakes_in_schedules_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rates(spec, sgd(), 10)
