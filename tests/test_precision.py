"""Autocast and loss scaling; the scale against torch.amp.GradScaler, step by step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distsim.errors import ConfigError
from trainers.precision import Precision

CPU = torch.device("cpu")


def scales_of_torch(finite: list[bool], first: float = 65536.0, good_steps: int = 0) -> Iterator[float]:
    """Yield GradScaler's scale after each step, its gradients being finite or not."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(scaler.state_dict() | {"scale": first, "_growth_tracker": good_steps})
    scaler.scale(torch.zeros(1))  # makes its tensors
    for each in finite:
        parameter.grad = torch.ones(1) if each else torch.full((1,), float("inf"))
        scaler.step(optimizer)
        scaler.update()
        yield scaler.get_scale()


def scales_of_ours(precision: Precision, finite: list[bool]) -> Iterator[float]:
    for each in finite:
        precision.update(each)
        yield precision.scale


@pytest.mark.parametrize(
    ("precision", "dtype"), [("full", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_what_products_are_computed_in(precision: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 2)
    with Precision(precision, CPU).autocast():
        out = layer(torch.ones(1, 2))
    assert out.dtype == dtype
    torch.autograd.backward(out.float().sum())
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert layer(torch.ones(1, 2)).dtype == torch.float32  # outside of it


def test_autocast_can_be_entered_again() -> None:
    precision = Precision("bf16", CPU)
    for _ in range(2):
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_autocast_leaves_float64_alone() -> None:
    with Precision("bf16", CPU).autocast():
        assert nn.Linear(2, 2).double()(torch.ones(1, 2).double()).dtype == torch.float64


def test_a_long_training_scales_as_torch_does() -> None:
    finite = [step not in (0, 1, 6500, 8499, 10500) for step in range(12600)]
    ours = list(scales_of_ours(Precision("fp16", CPU), finite))
    assert ours == list(scales_of_torch(finite))
    assert (ours[0], ours[1], ours[2000], ours[2001]) == (32768.0, 16384.0, 16384.0, 32768.0)
    assert ours[4001] == 65536.0  # the second 2000 in a row


@settings(max_examples=40)
@given(
    finite=st.lists(st.booleans(), max_size=14),
    exponent=st.integers(15, 125),
    good_steps=st.sampled_from([0, 1990, 1998, 1999]),
)
def test_from_any_state_the_scale_goes_as_torchs(finite: list[bool], exponent: int, good_steps: int) -> None:
    precision = Precision("fp16", CPU)
    precision.restore({"scale": 2.0**exponent, "good_steps": good_steps})
    theirs = list(scales_of_torch(finite, 2.0**exponent, good_steps))
    assert list(scales_of_ours(precision, finite)) == theirs


def test_the_scale_stays_a_float32() -> None:
    precision = Precision("fp16", CPU)
    precision.restore({"scale": 2.0**127, "good_steps": 1999})
    assert list(scales_of_ours(precision, [True])) == [2.0**127] == list(scales_of_torch([True], 2.0**127, 1999))
    assert torch.isfinite(torch.ones(1) * precision.scale)


def test_the_scale_never_makes_gradients_smaller() -> None:
    """Here torch goes on, 1/2, 1/4, ..., until all gradients are zero: what overflows unscaled is not helped so."""
    precision = Precision("fp16", CPU)
    seen = list(scales_of_ours(precision, [False] * 20))
    assert seen == [2.0**power for power in range(15, 0, -1)] + [1.0] * 5
    assert list(scales_of_torch([False] * 17))[-1] == 0.5
    assert list(scales_of_ours(precision, [True] * 2000))[-2:] == [1.0, 2.0]  # and it recovers


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_only_fp16_scales(precision: str) -> None:
    other = Precision(precision, CPU)
    assert set(scales_of_ours(other, [False, *[True] * 2500])) == {1.0}


def test_scaling_saves_gradients_that_fp16_loses() -> None:
    """A gradient of 2^-26 is zero in fp16, and right when the loss is scaled."""
    found = []
    for scale in (1.0, Precision("fp16", CPU).scale):
        weight = nn.Parameter(torch.ones(1))
        out = weight.half() * torch.tensor([2.0**-13]).half()
        torch.autograd.backward(out.float().sum() * 2.0**-13 * scale)
        assert weight.grad is not None
        found.append(weight.grad.item() / scale)
    assert found == [0.0, 2.0**-26]


@given(before=st.lists(st.booleans(), max_size=30), after=st.lists(st.booleans(), max_size=30))
def test_a_restored_one_goes_on_alike(before: list[bool], after: list[bool]) -> None:
    one, other = Precision("fp16", CPU), Precision("fp16", CPU)
    one.restore({"scale": 1024, "good_steps": 1985})
    list(scales_of_ours(one, before))
    other.restore(one.state())
    assert list(scales_of_ours(one, after)) == list(scales_of_ours(other, after))
    assert one.state() == other.state()


def test_an_unknown_precision() -> None:
    with pytest.raises(ConfigError, match=r"unknown precision 'bf61'; did you mean 'bf16'\?"):
        Precision("bf61", CPU)
