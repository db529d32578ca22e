"""An executed memory plan: what it refuses, and what is left when something fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_models import KEEP, OFFLOAD, RECOMPUTE, assert_same, gradients, loss_of, three
from torch import Tensor, nn

from distsim.errors import ConfigError, DistsimError
from distsim.memory.plan import PlanError, parse
from trainers.memory import apply
from trainers.offload import host_store


class Wrong(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.does = forward

    def forward(self, inputs: Tensor) -> Any:
        return self.does(inputs)


@pytest.mark.parametrize(
    "layer, message",
    [
        (nn.ReLU(inplace=True), r"layer 2 \(ReLU\) changes its input in place, which the memory plan may keep; use"),
        (
            Wrong(lambda inputs: (inputs, inputs)),
            r"layer 2 \(Wrong\) returns a tuple; under a memory plan layers return",
        ),
        (Wrong(lambda inputs: inputs.mul_(2).sin()), r"layer 2 \(Wrong\) changes its input in place"),
    ],
)
def test_layers_that_no_plan_fits_are_named(layer: nn.Module, message: str) -> None:
    layers = three(lambda: layer)
    apply(layers, parse(RECOMPUTE, 3))
    with pytest.raises(ConfigError, match=message):
        loss_of(layers)


def test_mistakes_are_named() -> None:
    layers = three()
    keep = parse(KEEP, 3)
    with pytest.raises(ConfigError, match="the memory plan is for 3 layers; the sequence has 2"):
        apply(nn.Sequential(*list(layers)[:2]), keep)
    with pytest.raises(ConfigError, match=r"has no recording forwards \(Fall_i\)"):
        apply(layers, parse("F_1 F_2 F_3 LOSS B_3 B_2 B_1", 3))
    with pytest.raises(ConfigError, match="LOSS once, and B_i of every layer once"):
        apply(layers, parse("Fall_1 Fall_2 Fall_3 LOSS B_3 B_1", 3))
    with pytest.raises(ConfigError, match="offloads; give it a store"):
        apply(layers, parse(OFFLOAD, 3))
    with pytest.raises(ConfigError, match=r"applies to a torch\.nn\.Sequential, not to Linear"):
        apply(layers[0], keep)  # type: ignore[arg-type]
    apply(layers, keep)
    with pytest.raises(ConfigError, match="already run by a memory plan"):
        apply(layers, keep)
    with pytest.raises(ConfigError, match="take one tensor, not tuple"):
        layers((torch.ones(3, 4),))
    bad = three()
    apply(bad, parse("F_1 F_2 F_3 LOSS Fall_3 B_3 Fall_2 B_2 D_1 Fall_2 Fall_1 B_1", 3))
    loss = loss_of(bad)
    with pytest.raises(PlanError, match="operation 10 of the memory plan, Fall_2: it reads a_1, which is not resident"):
        torch.autograd.backward(loss)
    bad = three()
    apply(bad, parse("Fall_1 Fall_2 Fall_3 Dall_3 LOSS B_3 B_2 B_1", 3))
    loss = loss_of(bad)
    for expected in (
        "operation 6 of the memory plan, B_3: it reads abar_3, which is not resident",
        "a second backward",
    ):
        with pytest.raises(DistsimError, match=expected):
            torch.autograd.backward(loss, retain_graph=True)


def test_a_second_backward_is_refused() -> None:
    for create_graph in (False, True):
        layers = three()
        apply(layers, parse(KEEP, 3))
        loss = loss_of(layers)
        first = torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True, create_graph=create_graph)
        with pytest.raises(ConfigError, match="a second backward through layers under a memory plan"):
            (sum(each.sum() for each in first) if create_graph else loss).backward()  # type: ignore[union-attr]


def test_what_was_changed_in_place_is_refused() -> None:
    for text in (KEEP, RECOMPUTE):
        layers = three()
        apply(layers, parse(text, 3))
        loss = loss_of(layers)
        with torch.no_grad():
            list(layers.parameters())[-2].add_(1)
        with pytest.raises(ConfigError, match=r"was changed (between forward and backward|in place after its forward)"):
            torch.autograd.backward(loss)

    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    apply(layers, parse("Fall_1 Fall_2 LOSS B_2 B_1", 2))
    loss = layers(torch.ones(1, 4)).mul_(2).sum()
    with pytest.raises(ConfigError, match=r"backward of layer 2 \(Tanh\) needs was changed in place"):
        torch.autograd.backward(loss)

    with host_store() as store:
        layers = three()
        apply(layers, parse("Fall_1 Fall_2 Fall_3 Wall_3 LOSS D_3 Rall_3 B_3 B_2 B_1", 3), store=store)
        loss = layers(torch.ones(1, 4)).mul_(2).sum()
        with pytest.raises(ConfigError, match="the output of the layers was changed in place"):
            torch.autograd.backward(loss)


def test_a_layer_that_does_something_else_the_second_time_is_named() -> None:
    calls: list[int] = []

    def more_each_time(inputs: Tensor) -> Tensor:
        calls.append(1)
        for _ in calls:
            inputs = inputs.sin()
        return inputs

    def wider_each_time(inputs: Tensor) -> Tensor:
        calls.append(1)
        return (inputs.repeat(len(calls), 1).exp() ** 2).sum() * inputs

    for does, message in (
        (more_each_time, "it saves 1 tensors first, then 2"),
        (wider_each_time, r"it saves \(\d+, 4\)"),
    ):
        calls.clear()
        layers = three(lambda does=does: Wrong(does))  # type: ignore[misc]
        apply(layers, parse("Fall_1 F_2 F_3 LOSS D_2 D_3 Fall_2 Fall_3 B_3 B_2 B_1", 3))
        loss = loss_of(layers)
        with pytest.raises(
            ConfigError, match=rf"layer 2 \(Wrong\) does not do the same when it is run again: {message}"
        ):
            torch.autograd.backward(loss)


def test_a_layer_that_fails_leaves_everything_as_it_was() -> None:
    """When it is run again: random numbers, statistics and modes are those of after the forward pass."""
    fails: list[bool] = []

    def failing(inputs: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("broken")
        return inputs * 1

    def norm() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), Wrong(failing))

    layers = three(norm)
    apply(layers, parse(RECOMPUTE, 3))
    loss = loss_of(layers)
    before = [torch.get_rng_state(), *(each.clone() for each in layers.buffers())]
    layers.eval()
    fails.append(True)
    with pytest.raises(RuntimeError, match="broken"):
        torch.autograd.backward(loss)
    assert_same([torch.get_rng_state(), *layers.buffers()], before)
    assert not any(module.training for module in layers.modules())
    fails.clear()
    plain = three(norm)
    plain.load_state_dict(layers.state_dict())
    layers.train()
    assert_same(
        [each for each in gradients(layers) if each is not None],
        [each for each in gradients(plain) if each is not None],
    )


def test_a_store_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ConfigError("/scratch: cannot write 48 bytes: No space left on device")

    with host_store() as store:
        monkeypatch.setattr(store.medium, "put", broken)
        layers = three()
        apply(layers, parse(OFFLOAD, 3), store=store)
        for _ in range(2):
            with pytest.raises(ConfigError, match="/scratch: cannot write 48 bytes: No space left on device"):
                gradients(layers)
