"""Buckets: which parameters lie where, when they are handed over, and that no gradient is lost or copied."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distsim.errors import DistsimError
from trainers.buckets import Buckets, flat_parameters
from trainers.plan import SUMS, plan


class Handed:
    """Notes what is handed over, with a copy of what it held by then."""

    def __init__(self) -> None:
        self.buckets: list[int] = []
        self.held: list[Tensor] = []

    def __call__(self, number: int, gradients: Tensor) -> None:
        self.buckets.append(number)
        self.held.append(gradients.clone())


def chain(widths: tuple[int, ...] = (4, 6, 5, 3)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, dtype=torch.float64) for a, b in pairwise(widths)))


def watched(model: nn.Module, bucket_mb: float = 1e-4) -> tuple[Buckets, Handed]:
    """Buckets of at most 100 bytes, and what they hand over."""
    handed, parameters = Handed(), list(model.parameters())
    return Buckets(parameters, plan(parameters, "ring", 2, bucket_mb), handed), handed


def gradients_of(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor | None]:
    """What autograd says, by another way than accumulation."""
    return list(torch.autograd.grad(loss(model), list(model.parameters()), allow_unused=True))


def squares(rows: int = 3, seed: int = 1) -> Callable[[nn.Module], Tensor]:
    inputs = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda model: model(inputs).square().sum()


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(8, 400))
def test_the_last_parameters_come_first_and_no_bucket_is_too_large(sizes: list[int], limit: int) -> None:
    parameters = [torch.empty(size) for size in sizes]
    made = plan(parameters, "ring", 3, limit / 1e6)
    assert [place for bucket in made.buckets for place in bucket] == list(reversed(range(len(sizes))))
    for bucket, following in zip(made.buckets, [*made.buckets[1:], None], strict=True):
        size_bytes = 4 * sum(sizes[place] for place in bucket)
        assert size_bytes <= limit or len(bucket) == 1
        if following is not None:  # and none is smaller than it need be
            assert size_bytes + 4 * sizes[following[0]] > limit
    assert [exchange.params for exchange in made.exchanges[: len(made.buckets)]] == [
        sum(sizes[place] for place in bucket) for bucket in made.buckets
    ]
    assert made.names[-1] == "numbers"
    assert made.exchanges[-1].params == SUMS + len(sizes)


@given(sizes=st.lists(st.integers(1, 3_000_000), min_size=1, max_size=40), limit=st.sampled_from([2.0, 25.0, 1e3]))
def test_with_overlap_the_first_and_the_last_buckets_are_small(sizes: list[int], limit: float) -> None:
    parameters = [torch.empty(size, device="meta") for size in sizes]
    made = plan(parameters, "ring", 1, limit, overlap=True)
    assert [place for bucket in made.buckets for place in bucket] == list(reversed(range(len(sizes))))
    filled = [4 * sum(sizes[place] for place in bucket) for bucket in made.buckets]
    for number, bucket in enumerate(made.buckets):
        before, left = sum(filled[:number]), sum(filled[number:])
        most = min(limit * 1e6, max(1e6, min(before, left / 2)))
        assert filled[number] <= most or len(bucket) == 1
        if number + 1 < len(made.buckets):
            assert filled[number] + 4 * sizes[made.buckets[number + 1][0]] > most


def test_gpt2s_gradients_begin_early_and_end_soon() -> None:
    """498 MB in parameters of 1 MB: twice as much each time up to 25, and half of what is left at the end."""
    made = plan([torch.empty(250_000, device="meta")] * 498, "ring", 1, 25, overlap=True)
    assert [len(bucket) for bucket in made.buckets] == [1, 1, 2, 4, 8, 16, *[25] * 17, 20, 10, 5, 3, 1, 1, 1]


def test_no_bucket_has_two_types() -> None:
    parameters = [torch.empty(3), torch.empty(3, dtype=torch.float64), torch.empty(2, dtype=torch.float64)]
    made = plan(parameters, "ring", 2, 25)
    assert made.buckets == ((2, 1), (0,))
    assert made.dtypes == ("float64", "float32", "float64")


def test_gradients_are_views_and_equal_autograds() -> None:
    model = chain()
    wanted = gradients_of(model, squares())
    buckets, handed = watched(model)
    buckets.begin()
    buckets.expect_last()
    torch.autograd.backward(squares()(model))
    assert handed.buckets == list(range(len(buckets.gradients)))  # all of them before `finish`
    buckets.finish()
    assert handed.buckets == list(range(len(buckets.gradients)))
    storages = {flat.untyped_storage().data_ptr() for flat in buckets.gradients}
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert parameter.grad.untyped_storage().data_ptr() in storages
        assert torch.equal(parameter.grad, gradient)
    for held, flat in zip(handed.held, buckets.gradients, strict=True):
        assert torch.equal(held, flat)  # complete when handed over
    assert buckets.used == [True] * 6


def test_buckets_are_handed_over_while_backward_goes_on() -> None:
    model = chain()
    seen: list[int] = []
    buckets, handed = watched(model)
    first = next(iter(model.parameters()))
    first.register_hook(lambda gradient: seen.append(len(handed.buckets)))  # type: ignore[no-untyped-call]
    buckets.begin()
    buckets.expect_last()
    torch.autograd.backward(squares()(model))
    assert seen[0] > 0


def test_micro_batches_add_up_and_only_the_last_hands_over() -> None:
    model = chain()
    buckets, handed = watched(model)
    buckets.begin()
    for number in range(3):
        if number == 2:
            buckets.expect_last()
        else:
            assert handed.buckets == []
        torch.autograd.backward(squares(seed=number)(model))
    buckets.finish()
    wanted = gradients_of(model, lambda one: sum((squares(seed=number)(one) for number in range(3)), torch.zeros(())))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-13, atol=1e-13)
    assert len(handed.buckets) == len(buckets.gradients)


class Branches(nn.Module):
    """Uses one of its two branches, or a third that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.last = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, inputs: Tensor, right: bool) -> Tensor:
        out: Tensor = self.last(self.right(inputs) if right else self.left(inputs))
        return out


@pytest.mark.parametrize("early", (True, False))
def test_what_backward_leaves_out_is_handed_over_as_zeros_and_in_order(early: bool) -> None:
    model = Branches()
    buckets, handed = watched(model)
    for right in (True, False, True):  # what is used changes from step to step
        handed.buckets.clear()
        buckets.begin()
        if early:
            buckets.expect_last()
        torch.autograd.backward(model(torch.ones(2, 4, dtype=torch.float64), right).sum())
        buckets.finish()
        assert handed.buckets == list(range(len(buckets.gradients)))
        names = [name for name, _ in model.named_parameters()]
        used = {name.split(".")[0] for name, flag in zip(names, buckets.used, strict=True) if flag}
        assert used == {"last", "right" if right else "left"}
        idle = model.left if right else model.right
        assert idle.weight.grad is not None and not idle.weight.grad.any()
    buckets.drop(buckets.used)
    assert model.never.weight.grad is None and model.left.weight.grad is None
    assert model.right.weight.grad is not None


@pytest.mark.parametrize("early", (True, False))
def test_gradients_set_to_none_come_back_as_views(early: bool) -> None:
    """As an optimizer's zero_grad does it, right before backward."""
    model = chain()
    wanted = gradients_of(model, squares())
    buckets, handed = watched(model)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        if early:
            buckets.expect_last()
        torch.autograd.backward(squares()(model))
        buckets.finish()
        flats = {flat.untyped_storage().data_ptr() for flat in buckets.gradients}
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            assert parameter.grad is not None and gradient is not None
            assert parameter.grad.untyped_storage().data_ptr() in flats
            assert torch.equal(parameter.grad, gradient)
    assert len(handed.buckets) == 2 * len(buckets.gradients)


def test_nothing_stale_is_handed_over() -> None:
    """A branch used in one step, and in the next neither used nor zeroed by anybody but set to None."""
    model = Branches()
    buckets, handed = watched(model)
    inputs = torch.ones(2, 4, dtype=torch.float64)
    for right in (True, False):
        model.zero_grad(set_to_none=True)
        handed.held.clear()
        buckets.expect_last()
        torch.autograd.backward(model(inputs, right).sum())
        buckets.finish()
    assert model.right.weight.grad is not None and not model.right.weight.grad.any()


def test_what_an_earlier_pass_of_the_step_has_used_stays_used() -> None:
    """Two backward passes that both hand over, over different branches, before the optimizer's step."""
    model = Branches()
    buckets, _ = watched(model)
    for right in (True, False):
        buckets.used = [False] * len(buckets.used)
        buckets.expect_last()
        torch.autograd.backward(model(torch.ones(2, 4, dtype=torch.float64), right).sum())
        buckets.finish()
        buckets.drop(buckets.used)
    wanted = gradients_of(model, lambda one: sum(one(torch.ones(2, 4, dtype=torch.float64), r).sum() for r in (0, 1)))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (gradient is None)


def test_types_that_take_turns_do_not_cut_each_others_buckets() -> None:
    """Layers in bfloat16 with norms in float32 between them."""
    parameters = [torch.empty(10, dtype=(torch.bfloat16, torch.float32)[place % 2]) for place in range(8)]
    made = plan(parameters, "ring", 2, 25)
    assert made.buckets == ((7, 5, 3, 1), (6, 4, 2, 0))  # in the order in which they are completed
    assert plan(parameters, "ring", 2, 8e-5).buckets == ((7, 5), (3, 1), (6, 4, 2, 0))


def test_a_parameter_used_twice_counts_once() -> None:
    model = chain((4, 4))
    buckets, handed = watched(model)
    buckets.begin()
    buckets.expect_last()
    inputs = torch.ones(2, 4, dtype=torch.float64)
    torch.autograd.backward(model(model(inputs)).sum())
    wanted = gradients_of(model, lambda one: one(one(inputs)).sum())
    torch.testing.assert_close(next(model.parameters()).grad, wanted[0], rtol=0, atol=0)
    assert len(handed.buckets) == len(buckets.gradients)


def test_reentrant_checkpointing_of_a_shared_layer_is_named() -> None:
    """Each segment has a backward of its own, and a layer in two of them gets its gradient in two parts."""
    model = chain((4, 4))
    buckets, _ = watched(model)
    buckets.begin()
    buckets.expect_last()
    inputs = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    out = checkpoint(model, checkpoint(model, inputs, use_reentrant=True), use_reentrant=True)
    with pytest.raises(DistsimError, match="reentrant checkpointing does that"):
        torch.autograd.backward(out.sum())


def test_checkpointing_that_is_not_reentrant_is_fine() -> None:
    model = chain((4, 4))
    inputs = torch.ones(2, 4, dtype=torch.float64)
    wanted = gradients_of(model, lambda one: one(one(inputs)).sum())
    buckets, handed = watched(model)
    buckets.begin()
    buckets.expect_last()
    out = checkpoint(model, checkpoint(model, inputs, use_reentrant=False), use_reentrant=False)
    torch.autograd.backward(out.sum())
    torch.testing.assert_close(next(model.parameters()).grad, wanted[0], rtol=0, atol=0)
    assert len(handed.buckets) == len(buckets.gradients)


def test_tied_parameters_have_one_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64))
    model[1].weight = model[0].weight
    buckets, handed = watched(model)
    assert sum(flat.numel() for flat in buckets.gradients) == 16 + 4 + 4
    buckets.begin()
    buckets.expect_last()
    torch.autograd.backward(model(torch.ones(1, 4, dtype=torch.float64)).sum())
    assert len(handed.buckets) == len(buckets.gradients)


def test_closed_buckets_watch_no_longer() -> None:
    model = chain()
    buckets, handed = watched(model)
    buckets.close()
    buckets.expect_last()
    torch.autograd.backward(squares()(model))
    assert handed.buckets == []


def test_flat_parameters_are_the_same_values_in_new_places() -> None:
    model = chain()
    parameters = list(model.parameters())
    before, out = [each.detach().clone() for each in parameters], squares()(model)
    made = plan(parameters, "parameter-server", 2, 1e-4)
    flats = flat_parameters(parameters, made)
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
    assert torch.equal(squares()(model), out)
    flats[0].zero_()
    assert all(not parameters[place].any() for place in made.buckets[0])
