"""Micro-batches with everything replaced by the full batch's: what modules see is, what they compute with is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from offenders import (
    TOKENS,
    WIDTH,
    Attention,
    Center,
    Dropping,
    Leaf,
    OwnLoss,
    WithBalance,
    centered,
    contrastive,
    own_mean,
    stack,
    with_balance,
)
from offending_text import Tokens, next_token, padded, predicted, sentences
from substitution import CLASSES, FEATURES, Case, Parts, one_thread, parts, passes, vectors
from torch import Tensor, nn

from trainers.accumulation.culprits import culprits
from trainers.accumulation.outcome import Outcome
from trainers.accumulation.probes import Place
from trainers.accumulation.rounding import rounding
from trainers.accumulation.substituted import PASSES, FullBatch, Substituted, compared

__all__ = ["one_thread"]


def guilty() -> Case:
    """Every kind of thing that is wrong, between layers that are right."""
    torch.manual_seed(1)
    model = stack(
        centered(), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), Dropping(), Center(nn.Linear(WIDTH, WIDTH))
    )
    return Case(model, vectors(7), contrastive)


def prepared(case: Case, **options: Any) -> tuple[FullBatch, Outcome, Substituted]:
    record, reference = case.recorded()
    scales = rounding(case.model, case.full, record, reference, len(case.data))
    return record, reference, Substituted(record, len(case.data), tolerances=scales, dtype=case.dtype, **options)


def error(found: Outcome, reference: Outcome) -> float:
    """The largest one of any gradient, relative to the largest gradient."""
    largest = max(float(right.norm()) for right in reference.gradients.values())
    return max(float((found.gradients[name] - right).norm()) for name, right in reference.gradients.items()) / largest


def test_a_full_batch_is_recorded_as_it_is() -> None:
    torch.manual_seed(1)
    case = Case(Attention(), vectors(7, TOKENS, FEATURES))
    plain, (record, reference) = case.full(), case.recorded()
    assert reference.loss == plain.loss
    assert all(torch.equal(reference.gradients[name], each) for name, each in plain.gradients.items())
    seen: dict[str, Tensor] = {}
    for name, module in case.model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    case.full()
    assert {place.module: None for place in record.inputs} == dict.fromkeys(seen)
    assert all(torch.equal(each, seen[place.module]) for place, each in record.inputs.items())
    assert {(place.call, place.which) for place in record.inputs} == {(0, 0)}
    without = {place.module for place in record.inputs} - {place.module for place in record.input_gradients}
    assert without == {"", "norm"}  # data need no gradient
    assert all(each.shape == record.inputs[place].shape for place, each in record.input_gradients.items())


def test_what_a_module_gets_from_the_one_before_it_is_kept_once() -> None:
    torch.manual_seed(1)
    record, _ = Case(stack(nn.Tanh(), nn.Linear(WIDTH, WIDTH)), vectors(7)).recorded()
    for one, other in pairwise("0123"):
        assert record.inputs[Place(other, 0, 0)] is record.outputs[Place(one, 0, 0)]


def test_the_caller_is_the_module_whose_code_calls_whoever_it_belongs_to() -> None:
    class Seen(FullBatch):
        def output(self, place: Place, tensor: Tensor) -> Tensor:
            callers.append((place.module, self.caller, "output"))
            return super().output(place, tensor)

        def input(self, place: Place, tensor: Tensor) -> Tensor:
            callers.append((place.module, self.caller, "input"))
            return super().input(place, tensor)

    callers: list[tuple[str, str | None, str]] = []
    lent = nn.Linear(3, 3)
    borrower = Leaf(lambda x: lent(x))  # which it does not own
    with compared(nn.ModuleDict({"first": nn.Sequential(lent), "second": borrower}), Seen()):
        borrower(torch.ones(2, 3))
    assert callers == [
        ("second", None, "input"),
        ("first.0", "second", "input"),
        ("first.0", "second", "output"),
        ("second", None, "output"),
    ]


@pytest.mark.parametrize("size", [3, 1])
def test_modules_see_the_full_batchs_values_bit_by_bit(size: int) -> None:
    case = guilty()
    record, _, sight = prepared(case)
    begin, now, looks, wrong = sight.begin, slice(0), 0, list[str]()

    def beginning(first: int, count: int, counted: float | None = None) -> None:
        nonlocal now
        now = slice(first, first + count)
        begin(first, count, counted)

    def look(kept: dict[Place, Tensor], name: str, tensor: Tensor) -> None:
        nonlocal looks
        looks += 1
        right = next(each for place, each in kept.items() if place.module == name)
        if not torch.equal(tensor, right[now]):
            wrong.append(name)

    sight.begin = beginning  # type: ignore[method-assign]
    with compared(case.model, sight) as watch:
        for name, module in case.model.named_modules():
            module.register_forward_hook(lambda _, args, output, name=name: look(record.outputs, name, output))
            module.register_forward_pre_hook(lambda _, args, name=name: look(record.inputs, name, args[0]))
        for _ in passes(sight):
            case.micro_batches(parts(7, size), watch, sight)
    assert looks == 2 * len(parts(7, size)) * len(list(case.model.modules())) and not wrong


@pytest.mark.parametrize("size", [3, 1])
def test_who_is_right_has_the_right_gradients_whoever_else_is_wrong(size: int) -> None:
    """Even the linear layers inside of modules that are wrong; plain micro-batches are far off."""
    case = guilty()
    _, reference, sight = prepared(case)
    plain = case.micro_batches(parts(7, size))
    with compared(case.model, sight) as watch:
        for _ in passes(sight):
            found = case.micro_batches(parts(7, size), watch, sight)
    assert error(plain, reference) > 1e-2
    assert error(found, reference) < 1e-13


def test_the_record_stays_as_it_is_and_nothing_stays_on_the_model() -> None:
    case = guilty()
    record, _, sight = prepared(case)
    before = [each.clone() for each in (*record.outputs.values(), *record.output_gradients.values())]
    with compared(case.model, sight) as watch:
        for _ in passes(sight):
            case.micro_batches(parts(7, 7), watch, sight)
            case.micro_batches(parts(7, 3), watch, sight)
    after = [*record.outputs.values(), *record.output_gradients.values()]
    assert all(map(torch.equal, before, after))
    with pytest.raises(RuntimeError), compared(case.model, sight):
        case.model(torch.ones(3, FEATURES + 1))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in case.model.modules())


def test_a_second_pass_is_for_what_has_no_batch_dimension_and_a_third_for_what_depends_on_it() -> None:
    torch.manual_seed(1)
    plain = Case(stack(centered()), vectors(7))
    own = Case(OwnLoss(nn.Tanh()), vectors(7), own_mean)
    balance = Case(WithBalance(), vectors(7), with_balance)
    for case, expected in ((plain, 1), (own, 2), (balance, 3)):
        assert passed(case, parts(7, 3)) == expected


def test_passes_come_to_an_end_though_the_model_gives_something_else_each_time() -> None:
    class Moody(nn.Module):
        wild = False

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.sum() ** 2 if self.wild else x.sum()

    torch.manual_seed(1)
    moody, count = Moody(), 0
    case = Case(stack(moody, Leaf(lambda both: both[0])), vectors(7))
    _, _, sight = prepared(case)
    with compared(case.model, sight) as watch:
        for _ in passes(sight):
            case.micro_batches(parts(7, 3), watch, sight)
            moody.wild, count = not moody.wild, count + 1
    assert count == PASSES


def passed(case: Case, cut: Parts) -> int:
    _, _, sight = prepared(case)
    with compared(case.model, sight) as watch:
        return len([case.micro_batches(cut, watch, sight) for _ in passes(sight)])


def test_without_tolerances_what_is_off_is_left_as_it_is() -> None:
    torch.manual_seed(1)
    case = Case(stack(nn.Tanh(), centered(), nn.Linear(WIDTH, WIDTH)), vectors(7))
    record, reference = case.recorded()
    sight = Substituted(record, 7, gradients=False, tolerances=None, dtype=torch.float64)
    plain = case.micro_batches(parts(7, 3))
    with compared(case.model, sight) as watch:
        for number, _ in enumerate(passes(sight)):
            assert number == 0
            found = case.micro_batches(parts(7, 3), watch, sight)
    assert all(torch.equal(found.gradients[name], each) for name, each in plain.gradients.items())
    assert error(found, reference) > 1e-3
    with pytest.raises(AssertionError, match="without tolerances"):
        culprits(case.model, sight, watch, reference, found)


@pytest.mark.parametrize("size", [3, 1])
def test_without_gradients_kinks_cannot_flip_and_float32_agrees(size: int) -> None:
    """All units of the first layer are within rounding of their kink for one sample, and max-pooling follows."""
    torch.manual_seed(2)
    deep = [each for _ in range(3) for each in (nn.Linear(64, 64), nn.ReLU())]
    pool = nn.Unflatten(1, (4, 16)), nn.MaxPool1d(2), nn.Flatten()
    model = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), *deep, *pool, nn.Linear(32, CLASSES))
    case = Case(model, vectors(8, 512), dtype=torch.float32)
    weight, bias = (each.detach() for each in case.model.get_submodule("0").parameters())
    bias.copy_(-(weight.double() @ case.batch(0, 1)[0][0].double()))
    record, reference = case.recorded()
    plain = case.micro_batches(parts(8, size))
    sight = Substituted(record, 8, gradients=False, tolerances=None, dtype=torch.float32)
    with compared(case.model, sight) as watch:
        for _ in passes(sight):
            found = case.micro_batches(parts(8, size), watch, sight)
    assert error(plain, reference) > 1e-2
    assert error(found, reference) < 1e-5


def test_without_gradients_errors_in_backward_stay() -> None:
    torch.manual_seed(1)
    case = Case(stack(nn.Tanh()), vectors(7), contrastive)
    _, reference, sight = prepared(case, gradients=False)
    with compared(case.model, sight) as watch:
        for _ in passes(sight):
            found = case.micro_batches(parts(7, 3), watch, sight)
    assert error(found, reference) > 1e-2


def test_masks_with_infinities_and_padding_are_compared() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.softmax, self.head = Leaf(lambda both: both[0].add(both[1]).softmax(-1)), nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
            y: Tensor = self.head(self.softmax((x @ x.mT, mask)) @ x).sum(1)
            return y

    torch.manual_seed(1)
    assert Case(Masked(), vectors(7, TOKENS, FEATURES)).searched()[0] == []


def test_what_cannot_be_compared_is_left_alone_and_said_in_the_reason() -> None:
    class Chosen(nn.Module):
        """Returns the largest entries of all samples together, of which there is no telling whose they are."""

        def __init__(self) -> None:
            super().__init__()
            self.child = Leaf(lambda x: x[x > 0.5].sort().values)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.child(x).mean()
            return y

    torch.manual_seed(1)
    found, sight = Case(stack(Chosen()), vectors(7)).searched()
    assert sight.incomparable == {"1.child"}
    assert [each.module for each in found] == ["1"]
    assert "or that of 1.child in it does, whose outputs cannot be compared" in found[0].reason


def test_whole_numbers_that_modules_are_given_are_not_compared_and_the_reason_says_so() -> None:
    """Tokens that change each time that they are read, as those masked at random."""
    random = torch.Generator().manual_seed(3)

    def masked(items: list[Tensor]) -> Tensor:
        made = padded(items)
        return torch.where((torch.rand(made.shape, generator=random) < 0.3) & (made != 0), 1, made)

    torch.manual_seed(1)
    found, _ = Case(Tokens(), sentences(7), next_token, predicted, masked).searched()
    assert found[0].module == "embed" and "whole numbers that it is given" in found[0].reason


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    with torch.random.fork_rng():
        yield
