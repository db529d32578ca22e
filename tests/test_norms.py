"""Batch normalisation over several ranks is that over all their samples; and group normalisation in its place.

The ranks are threads here, which show each other their numbers; over processes: `test_norms_training.py`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from threads import together
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

from distsim.errors import ConfigError
from trainers import norms
from trainers.norms import to_group_norm, to_synchronised

CHANNELS = 5
KINDS: list[tuple[type[_BatchNorm], tuple[int, ...]]] = [
    (nn.BatchNorm1d, ()),
    (nn.BatchNorm1d, (7,)),
    (nn.BatchNorm2d, (4, 3)),
    (nn.BatchNorm3d, (2, 3, 2)),
    (nn.SyncBatchNorm, (4, 3)),
]
COUNTS = ((3, 3), (1, 4), (0, 5), (2, 2, 2), (4, 0, 1), (1, 2, 3, 4), (2, 2, 2, 2))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Ranks:
    """Threads that hand their numbers to all the others."""

    def __init__(self, count: int) -> None:
        self.calls = [0] * count
        self._barrier, self._shown = threading.Barrier(count), [torch.empty(0)] * count

    def gather(self, rank: int) -> norms.Gather:
        def gather(numbers: Tensor) -> Tensor:
            self.calls[rank] += 1
            self._shown[rank] = numbers.to("cpu", torch.float64)
            self._barrier.wait(30)
            everybodys = torch.stack(self._shown)
            self._barrier.wait(30)
            return everybodys

        return gather


def nobody(numbers: Tensor) -> Tensor:
    raise AssertionError("this is to be done without the other ranks")


def synchronised(model: nn.Module, count: int) -> tuple[list[Any], Ranks]:
    """Copies of a model, one for each rank."""
    ranks, copies = Ranks(count), [to_synchronised(copy.deepcopy(model)) for _ in range(count)]
    for rank, each in enumerate(copies):
        for norm in norms.batch_norms(each).values():
            norm.gather = ranks.gather(rank)  # type: ignore[assignment]
    return copies, ranks


def made(kind: type[_BatchNorm], dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A batch normalisation, with weights and running statistics that are none of the usual ones."""
    norm: Any = kind(CHANNELS, **more).to(dtype)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor)
    if norm.running_var is not None:
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def plain(norm: Any) -> Any:
    """torch's own, for the CPU."""
    if type(norm) is not nn.SyncBatchNorm:
        return copy.deepcopy(norm)
    same = nn.BatchNorm2d(CHANNELS, norm.eps, norm.momentum, norm.affine, norm.track_running_stats).double()
    same.load_state_dict(norm.state_dict())
    return same


def run(model: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward; return output and the input's gradient."""
    leaf = inputs.detach().clone().requires_grad_()
    output = model(leaf)
    output.backward(gradient)
    assert leaf.grad is not None
    return output.detach(), leaf.grad


def run_ranks(copies: list[Any], inputs: Tensor, gradient: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same, each rank with its part of the samples."""
    parts = zip(copies, *(torch.split(each, list(counts)) for each in (inputs, gradient)), strict=True)
    outputs, gradients = zip(*together(*(partial(run, *part) for part in parts)), strict=True)
    return torch.cat(outputs), torch.cat(gradients)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert torch.linalg.vector_norm(found - wanted) <= tolerance * torch.linalg.vector_norm(wanted)


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 0.0) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("affine", (True, False), ids=("affine", "bare"))
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), KINDS, ids=lambda part: part.__name__ if isinstance(part, type) else "")
def test_ranks_together_are_one_large_batch(
    kind: type[_BatchNorm], shape: tuple[int, ...], counts: tuple[int, ...], affine: bool
) -> None:
    """Outputs, gradients of inputs, summed gradients of weights, running statistics; two batches, one after another."""
    norm = made(kind, affine=affine)
    one, (copies, ranks) = plain(norm), synchronised(norm, len(counts))
    for _ in range(2):
        inputs, gradient = 3 * torch.randn(2, sum(counts), CHANNELS, *shape, dtype=torch.float64) + 10
        assert_same(run_ranks(copies, inputs, gradient, counts), run(one, inputs, gradient), 1e-12)
    if affine:
        for name in ("weight", "bias"):
            assert_close(torch.stack([getattr(each, name).grad for each in copies]).sum(0), getattr(one, name).grad)
    for each in copies:
        assert_close(each.running_mean, one.running_mean)
        assert_close(each.running_var, one.running_var)
        assert torch.equal(each.running_var, copies[0].running_var)  # the same bits
        assert each.num_batches_tracked == 2
    assert ranks.calls == [4] * len(counts)  # twice forward, twice backward


@pytest.mark.parametrize("momentum", (None, 0.0, 0.1, 1.0))
@pytest.mark.parametrize("track", ("always", "never", "no more"))
def test_running_statistics_follow_any_momentum(momentum: float | None, track: str) -> None:
    norm = made(nn.BatchNorm2d, momentum=momentum, track_running_stats=track != "never")
    norm.track_running_stats = track == "always"
    one, (copies, _) = copy.deepcopy(norm), synchronised(norm, 2)
    for _ in range(3):
        inputs = torch.randn(5, CHANNELS, 2, 2, dtype=torch.float64) + 4
        run(one, inputs, inputs)
        run_ranks(copies, inputs, inputs, (3, 2))
    for each in copies:
        assert each.state_dict().keys() == one.state_dict().keys()
        for name, wanted in one.state_dict().items():
            assert_close(each.state_dict()[name].double(), wanted.double())


def test_a_large_mean_costs_no_digits() -> None:
    """In float32, mean 10,000 and deviation 1: the difference of mean square and squared mean is noise."""
    inputs = 10_000 + torch.randn(64, CHANNELS, 8)
    exact = inputs.double().transpose(0, 1).flatten(1)
    ranks = Ranks(2)
    both = together(*(partial(norms.combined, inputs[32 * rank :][:32], ranks.gather(rank)) for rank in range(2)))
    for mean, squares, total in both:
        assert total == 64 * 8
        np.testing.assert_allclose(squares / total, exact.numpy().var(1), rtol=1e-4)
        np.testing.assert_allclose(mean, exact.numpy().mean(1), rtol=1e-7)
    naive = inputs.square().mean((0, 2)) - inputs.mean((0, 2)).square()
    assert (naive - exact.var(1)).abs().max() > 0.5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("weights", (torch.float32, None), ids=("mixed", "alike"))
def test_other_precisions(dtype: torch.dtype, weights: torch.dtype | None) -> None:
    """Against float64 on the same numbers; what is left is the output's own rounding."""
    norm = made(nn.BatchNorm2d, weights or dtype)
    one, copies = copy.deepcopy(norm).double(), synchronised(norm, 3)[0]
    inputs, gradient = (torch.randn(2, 6, CHANNELS, 4, 4) + 1).to(dtype)
    wanted = run(one, inputs.double(), gradient.double())
    found = run_ranks(copies, inputs, gradient, (1, 2, 3))
    assert all(each.dtype == dtype for each in found)
    assert_same(tuple(each.double() for each in found), wanted, 2 * torch.finfo(dtype).eps)
    summed = torch.stack([each.weight.grad.double() for each in copies]).sum(0)
    assert copies[0].weight.grad.dtype == (weights or dtype)
    assert_close(summed, one.weight.grad, 2 * torch.finfo(weights or dtype).eps + 2e-6)


def strided(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 2).contiguous().transpose(0, 2)


@pytest.mark.parametrize(
    "layout",
    (strided, lambda tensor: tensor.contiguous(memory_format=torch.channels_last), lambda tensor: tensor[:1, :1]),
    ids=("strided", "channels last", "expanded gradient"),
)
def test_any_layout_in_memory(layout: Callable[[Tensor], Tensor]) -> None:
    norm = made(nn.BatchNorm2d)
    one, (copies, _) = copy.deepcopy(norm), synchronised(norm, 2)
    values, slopes = torch.randn(2, 4, CHANNELS, 3, 6, dtype=torch.float64)
    inputs = layout(values) if layout(values).shape == values.shape else values
    gradient = layout(slopes).expand(values.shape)
    assert_same(run_ranks(copies, inputs, gradient, (1, 3)), run(one, inputs, gradient), 1e-12)


def test_only_the_gradients_that_are_needed() -> None:
    """Inputs without one are not waited for in backward; frozen weights get none."""
    norm = made(nn.BatchNorm1d)
    inputs = torch.randn(4, CHANNELS, dtype=torch.float64)
    copies, ranks = synchronised(norm, 2)
    together(*(lambda rank=rank: copies[rank](inputs[2 * rank :][:2]).sum().backward() for rank in range(2)))
    assert ranks.calls == [1, 1] and copies[0].weight.grad is not None
    norm.weight.requires_grad_(False)
    copies, ranks = synchronised(norm, 2)
    run_ranks(copies, inputs, inputs, (2, 2))
    assert ranks.calls == [2, 2]
    assert copies[0].weight.grad is None and copies[0].bias.grad is not None


def test_one_value_on_all_ranks_together_is_too_few() -> None:
    """One on each is not, which torch refuses of one rank alone."""
    copies, _ = synchronised(made(nn.BatchNorm1d), 2)
    inputs = torch.randn(2, CHANNELS, dtype=torch.float64)
    run_ranks(copies, inputs, inputs, (1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got 1 on all ranks"):
        run_ranks(copies, inputs[:1], inputs[:1], (1, 0))


def test_inputs_have_the_dimensions_that_torch_wants() -> None:
    copies, _ = synchronised(made(nn.BatchNorm2d), 2)
    with pytest.raises(ValueError, match="expected 4D input"):
        copies[0](torch.randn(2, CHANNELS, dtype=torch.float64))


def test_a_second_derivative_is_refused() -> None:
    copies, _ = synchronised(made(nn.BatchNorm1d), 2)
    inputs = torch.randn(2, 2, CHANNELS, dtype=torch.float64, requires_grad=True)

    def first(rank: int) -> Tensor:
        (slope,) = torch.autograd.grad(copies[rank](inputs[rank]).square().sum(), inputs, create_graph=True)
        return slope

    slopes = together(lambda: first(0), lambda: first(1))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(slopes[0].sum())


@pytest.mark.parametrize("track", (True, False))
def test_evaluation_asks_nobody_and_is_torchs_own(track: bool) -> None:
    norm = made(nn.BatchNorm2d, track_running_stats=track).eval()
    changed = to_synchronised(copy.deepcopy(norm))
    changed.gather = nobody
    inputs, gradient = torch.randn(2, 3, CHANNELS, 2, 2, dtype=torch.float64)
    assert_same(run(changed, inputs, gradient), run(norm, inputs, gradient))


@pytest.mark.parametrize(("kind", "shape"), KINDS[:-1])
def test_without_other_ranks_nothing_changes(kind: type[_BatchNorm], shape: tuple[int, ...]) -> None:
    norm = made(kind)
    changed = to_synchronised(copy.deepcopy(norm))
    inputs, gradient = torch.randn(2, 3, CHANNELS, *shape, dtype=torch.float64)
    assert_same(run(changed, inputs, gradient), run(norm, inputs, gradient))
    assert torch.equal(changed.weight.grad, norm.weight.grad)
    assert changed.state_dict().keys() == norm.state_dict().keys()
    assert all(torch.equal(changed.state_dict()[name], each) for name, each in norm.state_dict().items())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        changed(inputs[:1].mean(tuple(range(2, inputs.dim())), keepdim=True))


class Model(nn.Module):
    """One module under two names, one in evaluation, one frozen, one with a hook, one without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.shared = self.first[1]
        self.inner = nn.ModuleDict({"a": nn.BatchNorm2d(4, eps=1e-3), "b": nn.BatchNorm2d(4, affine=False)})
        self.inner["a"].eval().requires_grad_(False)
        self.plain = [self.inner["a"]]  # where named_modules does not look
        self.hooked = nn.BatchNorm2d(4, momentum=None)
        self.heard: list[int] = []
        self.hooked.register_forward_hook(lambda *_: self.heard.append(1))

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.shared(self.plain[0](self.inner["b"](self.first(images))))
        hooked: Tensor = self.hooked(hidden)
        return hooked


def test_modules_become_group_norms_where_they_are() -> None:
    model = Model().double()
    held = dict(model.named_parameters())
    modules = dict(model.named_modules())
    for norm in norms.batch_norms(model).values():
        if norm.affine:
            nn.init.normal_(norm.weight)
    assert to_group_norm(model, groups=2) is model
    assert dict(model.named_modules()) == modules and dict(model.named_parameters()) == held
    assert dict(model.named_buffers()) == {}
    assert [type(each) for each in modules.values()].count(nn.GroupNorm) == 4
    assert model.shared is model.first[1] and model.plain[0] is model.inner["a"]
    assert not model.inner["a"].training and model.hooked.training
    assert not model.inner["a"].weight.requires_grad
    first: Any = modules["inner.a"]
    wanted = nn.GroupNorm(2, 4, eps=1e-3).double()
    wanted.load_state_dict(first.state_dict())
    assert vars(first).keys() == vars(wanted).keys()
    assert repr(first) == repr(wanted)
    inputs = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(first(inputs), wanted(inputs))
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert model.heard == [1]


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("groups", (1, 5))
def test_group_norm_is_over_a_sample_and_the_root_may_be_one(
    kind: type[_BatchNorm], shape: tuple[int, ...], groups: int
) -> None:
    """Against the formula, written out; it does not depend on who else is in the batch."""
    norm = made(kind)
    weight, bias, eps = norm.weight.detach(), norm.bias.detach(), norm.eps
    changed = to_group_norm(norm, groups=groups)
    if groups == CHANNELS and not shape:
        return  # a single value: torch refuses it
    inputs = torch.randn(3, CHANNELS, *shape, dtype=torch.float64) + 5
    for sample, output in zip(inputs, changed(inputs), strict=True):
        for channels in np.split(np.arange(CHANNELS), groups):
            part = sample[channels].numpy()
            scaled = (part - part.mean()) / np.sqrt(part.var() + eps)
            column = (len(channels), *[1] * len(shape))
            wanted = scaled * weight[channels].numpy().reshape(column) + bias[channels].numpy().reshape(column)
            np.testing.assert_allclose(output[channels].detach().numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_modules_become_synchronised_where_they_are() -> None:
    model = Model()
    held, modules, state = dict(model.named_parameters()), dict(model.named_modules()), model.state_dict()
    assert to_synchronised(model) is model
    assert dict(model.named_modules()) == modules and dict(model.named_parameters()) == held
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], each) for name, each in state.items())
    assert all(isinstance(each, nn.BatchNorm2d) for each in norms.batch_norms(model).values())
    kinds = [type(each) for each in norms.batch_norms(model).values()]
    to_synchronised(model)  # as often as one likes
    assert [type(each) for each in norms.batch_norms(model).values()] == kinds
    model.shared.gather = nobody  # type: ignore[assignment]
    assert copy.deepcopy(model).shared.gather is nobody  # a copy is of the same ranks, whose group cannot be copied
    model.first[0](torch.randn(2, 3, 8, 8))
    to_group_norm(model)
    assert norms.batch_norms(model) == {} and type(model.shared) is nn.GroupNorm


class Activated(nn.BatchNorm2d):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()


class Careful(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, bias=False)


LOST = "has a forward or parameters of its own, which would be lost"
REFUSED = [
    (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(Activated(4))), f"1.0 (Activated) {LOST}"),
    (lambda: parametrizations.weight_norm(nn.BatchNorm2d(4)), f"the model (ParametrizedBatchNorm2d) {LOST}"),
    (lambda: nn.Sequential(nn.LazyBatchNorm2d()), "0 (LazyBatchNorm2d) has no size before the model has run once"),
]


@pytest.mark.parametrize("change", (to_group_norm, to_synchronised))
@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_is_not_torchs_own_is_refused_and_nothing_changed(
    change: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module], message: str
) -> None:
    model = build()
    kinds = [type(each) for each in model.modules()]
    with pytest.raises(ConfigError) as raised:
        change(model)
    assert str(raised.value) == message
    assert [type(each) for each in model.modules()] == kinds


def test_a_subclass_that_computes_the_same_is_taken() -> None:
    assert to_synchronised(Careful(4)).eps == 1e-3
    changed = to_group_norm(Careful(4))
    assert "eps=0.001" in repr(changed) and list(changed.state_dict()) == ["weight"]
    changed(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("groups", (0, 3))
def test_groups_must_divide_the_channels(groups: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match=f"{groups} groups do not divide the . channels of . "):
        to_group_norm(model, groups=groups)
    assert [type(each) for each in model] == [nn.BatchNorm1d, nn.BatchNorm1d]
