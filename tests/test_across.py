"""Losses across the batch in micro-batches: equal to the large batch in plain PyTorch, in one micro-batch's memory."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from distsim.errors import ConfigError
from trainers.across import accumulate

SAMPLES, FEATURES, WIDTH, EXPERTS = 12, 5, 4, 3
Pair = tuple[Tensor, Tensor]


class Towers(nn.Module):
    """Two encoders and a temperature, as image-text models have them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), *layers, nn.Linear(8, WIDTH))
        self.right = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.double()

    def forward(self, pair: Pair) -> Pair:
        left, right = self.left(pair[0]), self.right(pair[1])
        return functional.normalize(left, dim=1), functional.normalize(right, dim=1)

    def info_nce(self, left: Tensor, right: Tensor) -> Tensor:
        """Symmetric cross entropy of which left belongs to which right."""
        logits = self.scale.exp() * left @ right.T
        own = torch.arange(len(left))
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def balance(gates: Tensor) -> Tensor:
    """Share of samples times mean probability, summed over experts: not a mean over samples."""
    shares = functional.one_hot(gates.argmax(1), EXPERTS).to(gates.dtype).mean(0)
    return EXPERTS * (shares * gates.softmax(1).mean(0)).sum()


def encode(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def made(build: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def samples(seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=generator)
    return left, left + torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=generator)


def split(pair: Pair, size: int) -> list[Pair]:
    return list(zip(torch.split(pair[0], size), torch.split(pair[1], size), strict=True))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], far: float = 1e-12) -> None:
    assert found.keys() == expected.keys() and expected
    for name, each in expected.items():
        assert float(each.norm()) > 0, name
        assert float((found[name] - each).norm()) <= far * float(each.norm()), name


@pytest.mark.parametrize("size", range(1, SAMPLES + 1))
def test_two_towers_get_the_large_batchs_gradient(size: int) -> None:
    model, pair = made(Towers), samples()
    assert isinstance(model, Towers)
    expected_loss = model.info_nce(*model(pair))
    backward(expected_loss)
    expected = gradients(model)
    model.zero_grad()
    loss = accumulate(model, encode, model.info_nce, split(pair, size))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-14)
    assert not loss.requires_grad
    assert set(expected) == {name for name, _ in model.named_parameters()}
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("size", range(1, SAMPLES + 1))
def test_a_balance_of_load_gets_the_large_batchs_gradient(size: int) -> None:
    model = made(lambda: nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, EXPERTS)).double())
    inputs, _ = samples()
    backward(balance(model(inputs)))
    expected = gradients(model)
    model.zero_grad()
    accumulate(model, encode, balance, torch.split(inputs, size))
    assert_same(gradients(model), expected)


def test_the_micro_batches_own_losses_are_no_substitute() -> None:
    model, pair = made(Towers), samples()
    assert isinstance(model, Towers)
    accumulate(model, encode, model.info_nce, split(pair, 4))
    expected = gradients(model)
    model.zero_grad()
    for part in split(pair, 4):
        backward(model.info_nce(*model(part)) * len(part[0]) / SAMPLES)
    found = gradients(model)
    assert all(float((found[name] - each).norm() / each.norm()) > 0.05 for name, each in expected.items())


class Jitter(nn.Module):
    """Draws from the random numbers of Python and of NumPy."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * (1 + random.random() + float(np.random.random()))


class Mean(nn.Module):
    """Takes away the mean of all calls so far, which is a buffer."""

    seen: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = self.seen + inputs.detach().mean(0)
        self.calls += 1
        return inputs - self.seen / self.calls


def seeded() -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Dropout(0.4)],
        lambda: [nn.Dropout(0.2), Jitter(), nn.Dropout(0.2)],
        lambda: [Mean()],
        lambda: [nn.BatchNorm1d(8), nn.Dropout(0.3)],
        lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))],
    ],
)
@pytest.mark.parametrize("size", [2, 5, 12])
def test_the_second_forward_is_the_first_again(layers: Callable[[], list[nn.Module]], size: int) -> None:
    """Against one graph of all micro-batches, each run once: same masks, same buffers, same random numbers after."""
    pair = samples()
    plain, model = made(lambda: Towers(*layers())), made(lambda: Towers(*layers()))
    assert isinstance(model, Towers) and isinstance(plain, Towers)
    seeded()
    left, right = zip(*[plain(part) for part in split(pair, size)], strict=True)
    expected_loss = plain.info_nce(torch.cat(left), torch.cat(right))
    backward(expected_loss)
    after = states()
    seeded()
    loss = accumulate(model, encode, model.info_nce, split(pair, size))
    assert states() == after
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-14)
    assert_same(gradients(model), gradients(plain))
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_gradients_are_added_and_what_the_loss_leaves_out_gets_none() -> None:
    model, pair = made(Towers), samples()
    assert isinstance(model, Towers)

    def left_only(left: Tensor, right: Tensor, place: Tensor) -> Tensor:
        assert place.tolist() == list(range(SAMPLES)) and right.requires_grad
        return (left @ left.T).exp().sum().log()

    def with_places(model: nn.Module, batch: Any) -> Any:
        return [*model(batch[:2]), batch[2]]

    batches = [
        (*part, places) for part, places in zip(split(pair, 5), torch.split(torch.arange(SAMPLES), 5), strict=True)
    ]
    with torch.no_grad():
        accumulate(model, with_places, left_only, iter(batches))
    once = gradients(model)
    assert {name.split(".")[0] for name in once} == {"left"}
    accumulate(model, with_places, left_only, batches)
    assert_same(gradients(model), {name: 2 * each for name, each in once.items()})


def test_weights_that_autocast_has_cast_get_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = samples()
    plain, model = made(Towers).float(), made(Towers).float()
    assert isinstance(model, Towers) and isinstance(plain, Towers)
    batches = [(left.float(), right.float()) for left, right in split(pair, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        left, right = zip(*[plain(part) for part in batches], strict=True)
        backward(plain.info_nce(torch.cat(left), torch.cat(right)))
    events: list[object] = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: events.append("cleared"))
    model.register_forward_pre_hook(lambda *_: events.append(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        accumulate(model, encode, model.info_nce, batches)
        # Only older torch goes wrong without it.
        assert events == [False, False, False, "cleared", True, True, True]
    assert_same(gradients(model), gradients(plain), 2e-2)


class Held:
    """A saved tensor, counted for as long as a graph holds it."""

    def __init__(self, tensor: Tensor, live: Live) -> None:
        self.tensor, self.live = tensor, live
        live.add(1, tensor.numel())

    def __del__(self) -> None:
        self.live.add(-1, -self.tensor.numel())


class Live:
    """How many tensors, and numbers in them, graphs hold, and the most that they ever held."""

    def __init__(self) -> None:
        self.tensors = self.numbers = self.most_tensors = self.most_numbers = 0

    def add(self, tensors: int, numbers: int) -> None:
        self.tensors, self.numbers = self.tensors + tensors, self.numbers + numbers
        self.most_tensors, self.most_numbers = (
            max(self.most_tensors, self.tensors),
            max(self.most_numbers, self.numbers),
        )


@contextmanager
def counted() -> Iterator[Live]:
    live = Live()
    with saved_tensors_hooks(lambda tensor: Held(tensor.detach(), live), lambda held: held.tensor):
        yield live
    assert live.tensors == 0


@pytest.mark.parametrize("size", [1, 3, 5])
def test_graphs_hold_one_micro_batch_or_the_loss(size: int) -> None:
    width = 300
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
    model = made(lambda: nn.Sequential(nn.Linear(FEATURES, width), *layers, nn.Linear(width, EXPERTS)).double())
    inputs, _ = samples()
    parts = torch.split(inputs, size)
    with counted() as single:
        backward(model(parts[0]).sum())
    with counted() as last:
        backward(balance(model(inputs).detach().requires_grad_()))
    with counted() as large:
        backward(balance(model(inputs)))
    with counted() as found:
        accumulate(model, encode, balance, parts)
    assert found.most_tensors <= max(single.most_tensors, last.most_tensors)
    assert found.most_numbers <= max(single.most_numbers, last.most_numbers)
    weights = sum(each.numel() for each in model.parameters())
    assert large.most_numbers - weights > 0.9 * SAMPLES / size * (found.most_numbers - weights)


def test_graphs_go_even_where_the_loss_leaves_representations_out() -> None:
    model, pair = made(Towers), samples()
    parts = split(pair, 4)
    with counted() as single:
        backward(sum(each.sum() for each in model(parts[0])))
    with counted() as found:
        accumulate(model, encode, lambda left, right: (left @ left.T).exp().sum(), parts)
    assert found.most_tensors <= single.most_tensors


def test_buffers_that_stay_are_not_kept_for_each_micro_batch() -> None:
    model, inputs = made(lambda: nn.Linear(FEATURES, EXPERTS).double()), samples()[0]
    model.register_buffer("mask", torch.zeros(777))

    def loss(gates: Tensor) -> Tensor:
        gc.collect()
        assert sum(type(each) is Tensor and each.shape == (777,) for each in gc.get_objects()) == 1
        return balance(gates)

    accumulate(model, encode, loss, torch.split(inputs, 3))


def test_micro_batches_without_a_graph_count_in_the_loss() -> None:
    """As queues of earlier representations do."""
    model, pair = made(Towers), samples()
    assert isinstance(model, Towers)
    parts = split(pair, 5)

    def detached_last(model: nn.Module, part: Pair) -> Any:
        return [each.detach() if len(part[0]) == 2 else each for each in model(part)]

    left, right = zip(*[detached_last(model, part) for part in parts], strict=True)
    backward(model.info_nce(torch.cat(left), torch.cat(right)))
    expected = gradients(model)
    model.zero_grad()
    accumulate(model, detached_last, model.info_nce, parts)
    assert_same(gradients(model), expected)


def one(left: Tensor, *_: Tensor) -> Tensor:
    return left.sum()


COUNT = count()
WRONG: list[tuple[Callable[..., Any], Callable[..., Any], str]] = [
    (lambda model, batch: {}, one, "encode returned a dict; expected a tensor"),
    (lambda model, batch: [], one, "encode returned no tensors"),
    (lambda model, batch: model(batch)[0].sum(), one, "encode returned a tensor of shape ()"),
    (
        lambda model, batch: model(batch)[0].T,
        one,
        "micro-batch 3: encode returned torch.float64 (samples, 2), but torch.float64 (samples, 5) for the first",
    ),
    (
        lambda model, batch: model(batch)[: 1 + (len(batch[0]) == 5)],
        one,
        "micro-batch 3: encode returned torch.float64 (samples, 4), but torch.float64 (samples, 4) and torch.",
    ),
    (encode, lambda left, right: left, "the loss is a tensor of shape (12, 4)"),
    (encode, lambda left, right: 1.0, "the loss is a float"),
    (encode, lambda left, right: left.detach().sum(), "that depends on the representations"),
    (lambda model, batch: model(batch)[0].detach(), one, "nothing that encode returns depends on a parameter"),
    (lambda model, batch: model(batch)[0] * (1 + next(COUNT) / 1e3), one, "gave others, relative difference 0.00"),
    (lambda model, batch: [*model(batch), torch.tensor([next(COUNT)])], one, "relative difference inf"),
    (lambda model, batch: model(batch)[0][: 1 + torch.is_grad_enabled()], one, "relative difference inf"),
    (
        lambda model, batch: model(batch)[: 1 + torch.is_grad_enabled()],
        one,
        "micro-batch 1: encode returned 1 tensors and then 2",
    ),
]


@pytest.mark.parametrize(("encoder", "loss", "said"), WRONG, ids=range(len(WRONG)))
def test_mistakes_are_named(encoder: Callable[..., Any], loss: Callable[..., Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulate(made(Towers), encoder, loss, split(samples(), 5))
    assert said in str(caught.value)


def test_no_micro_batches_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="there are no micro-batches"):
        accumulate(made(Towers), encode, one, [])


def test_a_parameter_that_changes_between_the_passes_is_a_mistake() -> None:
    model, pair = made(Towers), samples()
    assert isinstance(model, Towers)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        with torch.no_grad():
            model.scale.add_(0.1)
        return model.info_nce(left, right)

    with pytest.raises(ConfigError, match="was changed between forward and backward"):
        accumulate(model, encode, loss, split(pair, 5))


def test_numbers_that_are_none_stay_so() -> None:
    model, pair = made(Towers), samples()
    assert isinstance(model, Towers)
    pair[0][3, 2] = torch.nan
    assert accumulate(model, encode, model.info_nce, split(pair, 5)).isnan()
    assert all(each.grad is not None and each.grad.isnan().any() for each in model.left.parameters())
