"""Watching modules: nothing changes unless a sight changes it; what is seen is what naive code computes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from watching import kept, run

from trainers.accumulation.probes import Place, Record, Sight, watched
from trainers.workloads import resnet
from trainers.workloads.language_model import LanguageModel


class Outputs(NamedTuple):
    """A nest of outputs, as models of libraries have them."""

    logits: Tensor
    hidden: dict[str, Any]


class Nested(nn.Module):
    """Returns tensors in a tuple, a dict and a list; integers and a tensor that is there twice among them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, given: Tensor, *, scale: Tensor) -> Outputs:
        made = self.linear(given) * scale
        parts = made.chunk(2, dim=-1)  # views, not contiguous
        return Outputs(made, {"index": made.argmax(-1), "parts": list(parts), "again": made, "none": None})


class Inside(nn.Module):
    """Works in place on what modules give and get, calls one twice, and has shared and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.nested = Nested()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.first(given)
        hidden *= 2
        self.relu(hidden)  # whose result is not used: it is in `hidden`
        made = self.nested(hidden, scale=hidden.detach().mean())
        left, right = made.hidden["parts"]
        both = self.frozen(torch.cat([right, left], -1)) + self.tied(self.first(made.logits))
        out: Tensor = self.norm(functional.dropout(both, 0.5, self.training))
        return out


class Attention(nn.Module):
    """Library attention: on one tensor it takes another path than on three equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.memory = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.5)

    def forward(self, given: Tensor) -> Tensor:
        mixed, weights = self.attention(given, given, given)
        out: Tensor = self.memory(self.layer(mixed))[0] + weights.mean()
        return out


def language_model() -> tuple[nn.Module, Tensor]:
    """Return the project's own one, with dropout."""
    return LanguageModel(2, 32, 16, dropout=0.1), torch.arange(64).reshape(4, 16) * 7 % 256


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "language model": language_model,
    "batch norm": lambda: (resnet.network(18, 4, "batch", 10), torch.rand(2, 3, 32, 32)),
    "group norm": lambda: (resnet.network(18, 4, "group", 10), torch.rand(2, 3, 32, 32)),
    "in place": lambda: (Inside(), torch.randn(5, 6)),
    "attention": lambda: (Attention(), torch.randn(3, 4, 8)),
    "spectral norm": lambda: (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()),
        torch.randn(3, 6),
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sight", [Sight, Record])
def test_watching_changes_no_bit(name: str, sight: type[Sight]) -> None:
    torch.manual_seed(0)
    model, given = CASES[name]()
    state = {key: each.clone() for key, each in model.state_dict().items()}
    plain = {key: each.clone() for key, each in run(model, given).items()}
    model.load_state_dict(state)
    found = kept(model, given, sight())
    assert found.keys() == plain.keys()
    for key, each in plain.items():
        if name == "attention" and sight is Record and key != "loss":  # parts of a gradient are added in another order
            assert torch.allclose(found[key], each, rtol=1e-5, atol=1e-6), key
        else:
            assert torch.equal(found[key], each), key
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_record_is_what_naive_code_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 5), b=nn.ReLU(inplace=True), c=nn.Linear(5, 3)))
    given = torch.randn(7, 4)
    record = Record()
    kept(model, given, record)
    first = functional.linear(given, model.a.weight, model.a.bias)  # type: ignore[union-attr, arg-type]
    second = first.relu()
    third = functional.linear(second, model.c.weight, model.c.bias)  # type: ignore[union-attr, arg-type]
    gradients = torch.autograd.grad(third.square().sum(), [first, second, third])
    for name, value, gradient in zip("abc", (first, second, third), gradients, strict=True):
        assert torch.equal(record.outputs[Place(name, 0, 0)], value)
        assert torch.equal(record.output_gradients[Place(name, 0, 0)], gradient)
    assert torch.equal(record.outputs[Place("", 0, 0)], third)
    # The batch needs no gradient, and what is changed in place has none any more.
    assert record.input_gradients.keys() == {Place("c", 0, 0)}
    assert torch.equal(record.input_gradients[Place("c", 0, 0)], gradients[1])
    same = record.input_gradients[Place("c", 0, 0)].data_ptr(), record.output_gradients[Place("b", 0, 0)].data_ptr()
    assert same[0] == same[1]  # one clone for both


def test_places_count_calls_and_floating_tensors() -> None:
    torch.manual_seed(0)
    model, record = Inside(), Record()
    given = torch.randn(5, 6)
    with watched(model, record) as watch:
        watch.begin()
        model(given).sum().backward()
        twice = [place for place in record.outputs if place.module == "first"]
        assert twice == [Place("first", 0, 0), Place("first", 1, 0)]
        nested = [place.which for place in record.outputs if place.module == "nested"]
        assert nested == [0, 1, 2]  # logits and two parts: integers do not count, what is there twice does so once
        made = record.outputs[Place("nested", 0, 0)]
        assert torch.equal(record.outputs[Place("nested", 0, 1)], made[:, :3])
        assert Place("nested", 0, 0) in record.input_gradients  # and the scale is another input, without a gradient
        assert Place("nested", 0, 1) not in record.input_gradients
        before = record.outputs[Place("first", 0, 0)]  # a clone from before it was doubled, and before the ReLU
        assert torch.equal(record.outputs[Place("relu", 0, 0)], (2 * before).relu()) and (before < 0).any()
        model(given)
        assert Place("first", 3, 0) in record.outputs
        watch.begin()
        record.outputs.clear()
        model(given)
        assert Place("first", 0, 0) in record.outputs and Place("first", 2, 0) not in record.outputs


def test_frozen_and_gradless_modules_are_seen_forward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)).requires_grad_(False)
    record = Record()
    given = torch.randn(2, 3, requires_grad=True)
    with watched(model, record):
        model(given).sum().backward()
        assert record.output_gradients and record.input_gradients.keys() >= {Place("", 0, 0), Place("0", 0, 0)}
        before = given.grad
        record.outputs.clear()
        with torch.no_grad():
            model(given)
        assert [place.module for place in record.outputs] == ["0", "1", ""]
        assert given.grad is before
    assert torch.equal(record.outputs[Place("0", 1, 0)], model[0](given))  # not what the ReLU has made of it


class Hooked(nn.Module):
    """Changes a gradient in place on its way back, and hands on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Tanh(), nn.Identity()
        self.handed: list[Tensor] = []
        self.last.register_forward_pre_hook(lambda module, args: self.handed.append(args[0]))

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.first(given)
        hidden.register_hook(lambda gradient: gradient.mul_(2))
        out: Tensor = self.second(hidden) * self.last(self.first.bias)
        return out


def test_gradients_are_kept_as_they_were_and_parameters_handed_on() -> None:
    torch.manual_seed(0)
    model, record = Hooked(), Record()
    with watched(model, record):
        model(torch.randn(5, 3)).sum().backward()
    before, after = record.input_gradients[Place("second", 0, 0)], record.output_gradients[Place("first", 0, 0)]
    assert torch.equal(2 * before, after)
    assert model.handed[0] is model.first.bias


class Change(Sight):
    """Puts one number in the place of each output, output gradient and input gradient of the module `0`."""

    def __init__(self, output: float | None = None, back: float | None = None, passed: float | None = None) -> None:
        self.given = output, back, passed
        self.last: Tensor | None = None

    def output(self, place: Place, tensor: Tensor) -> Tensor:
        return self._put(0, place, tensor)

    def output_gradient(self, place: Place, gradient: Tensor) -> Tensor:
        return self._put(1, place, gradient)

    def input_gradient(self, place: Place, gradient: Tensor) -> Tensor | None:
        return self._put(2, place, gradient)

    def _put(self, which: int, place: Place, tensor: Tensor) -> Tensor:
        value = self.given[which]
        if place.module != "0" or value is None:
            return tensor
        self.last = torch.full((), value).expand(tensor.shape)
        return self.last


def test_a_sight_changes_values_and_gradients() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    model = nn.Sequential(linear, nn.ReLU(inplace=True))
    given = torch.randn(4, 3)
    columns, rows = given.sum(0).expand(2, 3), linear.weight.detach().sum(0).expand(4, 3)
    given.requires_grad_()
    with watched(model, Change(output=2.0)):
        out = model(given)
        assert torch.equal(out, torch.full((4, 2), 2.0))
        of_weight, of_given = torch.autograd.grad(out.sum(), [linear.weight, given])
    assert torch.allclose(of_weight, columns) and torch.allclose(of_given, rows)  # a ReLU of 2 passes all on
    with watched(model, Change(back=3.0, passed=5.0)):
        of_weight, of_given = torch.autograd.grad(model(given).sum(), [linear.weight, given])
    assert torch.allclose(of_weight, 3 * columns)
    assert torch.equal(of_given, torch.full((4, 3), 5.0))


def test_what_a_sight_gives_is_copied() -> None:
    """What follows may work in place, and must not reach what the sight keeps."""
    sight = Change(output=2.0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True))
    with watched(model, sight):
        model(torch.randn(4, 3)).mul_(7)
    assert isinstance(sight.last, Tensor) and torch.equal(sight.last, torch.full((4, 2), 2.0))


class Stateful(nn.Module):
    """Draws and keeps what others would not notice."""

    average: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.still = nn.BatchNorm1d(4).eval()
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("constant", torch.ones(4))

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.still(self.norm(given) * self.constant)
        hidden = functional.dropout(hidden, 0.5)
        hidden = self.drop(hidden)
        self.average.data.mul_(0.9).add_(hidden.detach().mean(0))  # past autograd's version counters
        self.replaced = self.replaced + 1
        out: Tensor = hidden + torch.rand(()) + torch.rand(())
        return out


def test_who_draws_random_numbers_and_changes_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Stateful(), nn.Linear(4, 4))
    given = torch.randn(6, 4)
    with watched(model, Sight()) as watch:
        watch.begin()
        torch.rand(3)  # nobody's: outside of the model
        model(given)
        assert watch.random == {"0": 2, "0.drop": 1}  # before and after the module inside
        assert watch.changed == {
            "0.norm": {"running_mean", "running_var", "num_batches_tracked"},
            "0": {"average", "replaced"},
        }
    with watched(model.eval(), Sight()) as watch:
        functional.dropout(given, 0.5)
        model[1](given)
        assert not watch.random and not watch.changed
