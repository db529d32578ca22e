"""What is said of loops with one mistake each, and that sketches and fitted weights are what they must be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import accumulation_loops as ways
import pytest
import torch
from accumulation_loops import (
    Batch,
    Loop,
    always,
    batches_of,
    case,
    count,
    end,
    explained,
    mean,
    never,
    right,
    scaled,
    stepping,
    tutorial,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainers.accumulation.bookkeeping import CLEAR, WIDTH, combination, sketch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on shared cores take many times longer for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(3,) * 8, (4, 4, 4, 1) * 2, (2,) * 2, (1,) * 32])
def test_nothing_is_said_of_a_loop_that_is_right(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert case(right, sizes, dtype).findings == []


def test_of_equal_counts_the_loop_of_tutorials_is_right_and_of_others_it_is_the_mean_of_means() -> None:
    assert case(tutorial).findings == []
    for beginning in (lambda i, m: i % m == 0, lambda i, m: i % m == 0 and i > 0):  # there is nothing before the first
        assert case(stepping(end, never, beginning)).findings == []
    found = case(tutorial, (4, 4, 2) * 2).findings
    assert [each.reason for each in found] == [
        "the micro-batches' means are averaged, though they are over different counts (4, 4, 2) "
        "(step 1: weights 0.333 each, right are 0.4, 0.4, 0.2)"
    ]
    assert found[0].remedy is not None and "loss * count / count_of_the_step" in found[0].remedy
    assert found[0].found == pytest.approx((1 / 3,) * 3 + (0,) * 3) and found[0].expected[:3] == (0.4, 0.4, 0.2)


STEP_EACH = "optimizer.step() is called after every micro-batch (call 1: weights 0.25, 0, 0, 0"
LAST_LOST = "the last micro-batch of a step is left out"
ONLY_LAST = (
    "only the last micro-batch of a step counts, as if zero_grad() came before each (step 1: weights 0, 0, 0, 0.25"
)
MISSING = "zero_grad() is missing between steps: the second has the first's gradients, too (step 2: weights "
SHORTENED = "the micro-batches are shortened by factors of their own, as clipping after each of them does (step "
NO_SUM = "no weighted sum of the micro-batches' gradients is what step() is given: "

MISTAKES: dict[str, tuple[Loop, list[str]]] = {
    "not divided": (
        scaled(lambda batch, step, m: 1),
        ["the loss is not divided by the 4 micro-batches of a step (step 1: weights 1 each, right are 0.25 each)"],
    ),
    "divided twice": (
        scaled(lambda batch, step, m: 1 / m**2),
        ["the loss is divided by the 4 micro-batches of a step twice (step 1: weights 0.0625 each"],
    ),
    "a mean, divided by the samples": (
        scaled(lambda batch, step, m: 1 / count(step)),
        ["the loss, a mean already, is divided by the 12 samples of the step"],
    ),
    "a sum": (scaled(lambda batch, step, m: len(batch[0])), ["the loss, a sum, is not divided by anything"]),
    "a sum, divided by the steps": (
        scaled(lambda batch, step, m: len(batch[0]) / m),
        ["the loss, a sum, is divided by the 4 micro-batches of a step but not by what counts in them"],
    ),
    "any factor": (
        scaled(lambda batch, step, m: 0.7 / m),
        ["the gradient is 0.7 times what it must be (step 1: weights 0.175 each"],
    ),
    "zero_grad never": (stepping(end, never), [MISSING + "0.25 each, right are 0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25)"]),
    "zero_grad before each": (stepping(end, never, always), [ONLY_LAST]),
    "zero_grad after each": (stepping(end, always), [ONLY_LAST]),
    "zero_grad after the first": (
        stepping(end, lambda i, m: i % m == 0),
        ["the first micro-batch of a step is left out, as if zero_grad() came after its backward()"],
    ),
    "zero_grad replaced": (
        ways.halved,
        ["micro-batches of one step are in the other's gradient (step 2: weights 0.125, 0.125, 0.125, 0.125, 0.25"],
    ),
    "zero_grad before step": (ways.zero_before_step, ["no parameter has a gradient when optimizer.step() is called"]),
    "neither divided nor set to zero": (
        ways.undivided_and_missing,
        [MISSING + "1 each, ", "the loss is not divided by the 4 micro-batches of a step"],
    ),
    "step never": (stepping(never, end), ["optimizer.step() is never called"]),
    "step and zero_grad after each": (stepping(always, always), [STEP_EACH]),
    "step after each, zero_grad at the end": (stepping(always, end), [STEP_EACH]),
    "step at i % m == 0": (
        stepping(lambda i, m: i % m == 0, lambda i, m: i % m == 0),
        ["optimizer.step() is called after the first micro-batch of a step, as with i % accumulate == 0"],
    ),
    "step at i % m == 0, but not at 0": (
        stepping(lambda i, m: i > 0 and i % m == 0, lambda i, m: i > 0 and i % m == 0),
        ["optimizer.step() is called one micro-batch too late"],
    ),
    "step too late, and at the end": (
        stepping(lambda i, m: i in (m, 2 * m - 1), lambda i, m: i == m),
        ["optimizer.step() is called one micro-batch too late"],
    ),
    "step too early": (
        stepping(lambda i, m: (i + 2) % m == 0, lambda i, m: (i + 2) % m == 0),
        ["optimizer.step() is called one micro-batch too early"],
    ),
    "step at odd places": (
        stepping(lambda i, m: i in (1, 4, 5), lambda i, m: i == 4),
        ["optimizer.step() is called 3 times for the 8 micro-batches of 2 steps (call 1: weights 0.25, 0.25, 0, 0"],
    ),
    "step after 3": (
        ways.steps_of(3),
        ["optimizer.step() comes after each 3 micro-batches, not 4, and the loss is divided by 3"],
    ),
    "step after 8": (
        ways.steps_of(8),
        ["optimizer.step() comes after each 8 micro-batches, not 4, and the loss is divided by 8"],
    ),
    "last left out": (scaled(lambda batch, step, m: 0 if batch is step[-1] else 1 / m), [LAST_LOST]),
    "last left out, mean of the others": (
        scaled(lambda batch, step, m: 0 if batch is step[-1] else 1 / (m - 1)),
        [LAST_LOST + " (step 1: weights 0.333, 0.333, 0.333, 0, right are 0.25 each)"],
    ),
    "one twice": (
        ways.using(lambda step, m: [0, 1, 1, 2, 3]),
        ["micro-batch 2 of step 1 is used twice; micro-batch 2 of step 2 is used twice (step "],
    ),
    "one in place of another": (
        ways.using(lambda step, m: [0, 1, 1, 3] if step else [0, 1, 2, 3]),
        ["micro-batch 2 of step 2 is used twice; micro-batch 3 of step 2 is not used (step 2: weights 0.25, 0.5, 0, "],
    ),
    "one left out, others not divided": (
        scaled(lambda batch, step, m: 0 if batch is step[1] else 1),
        [
            "micro-batch 2 of step 1 is not used; micro-batch 2 of step 2 is not used",
            "the others' weights are 4 times what they must be",
        ],
    ),
    "weights of its own": (
        scaled(lambda batch, step, m: 1.7 / m if batch is step[0] else 1 / m),
        ["the micro-batches have other weights (step "],
    ),
    "clipped after each": (ways.clipping(after_each=0.2), [SHORTENED]),
    "clipped each by itself": (ways.clipped_alone, [SHORTENED]),
    "clipped by value": (ways.clipped_by_value, [NO_SUM]),
    "GradScaler without unscaling": (
        ways.scaler(unscaled=False),
        ["the gradient is 65536 times what it must be (step 1: weights 1.64e+04 each"],
    ),
    "bfloat16": (
        ways.by_hand(torch.bfloat16),
        ["the gradients are added up in low precision: bfloat16 holds all of their numbers; 0.00"],
    ),
    "float16": (
        ways.by_hand(torch.float16),
        ["the gradients are added up in low precision: float16 holds all of their numbers; 0.000"],
    ),
    "bfloat16, not divided": (
        ways.by_hand(torch.bfloat16, divide=False),
        [
            "the gradients are added up in low precision: bfloat16 holds all of their numbers; 0.00",
            "the loss is not divided by the 4 micro-batches of a step",
        ],
    ),
    "a part detached": (
        ways.changed(ways.half_detached),
        [
            "the gradients of embedding.weight, side.weight, side.bias are no such sum of the micro-batches', those of "
            "the others are"
        ],
    ),
    "all but the last elsewhere": (ways.changed(ways.all_elsewhere), [NO_SUM]),
    "frozen": (ways.frozen, ["no gradient arrives at embedding.weight"]),
    "a part left out": (
        ways.changed(ways.no_side),
        ["no gradient arrives at side.weight, side.bias", "the gradients of embedding.weight are no such sum"],
    ),
    "hook": (
        ways.hooked,
        [
            "of head.bias, the gradient is 2 times what it must be (step 1: weights 0.5 each, right are 0.25 each); "
            "the others' gradients are right"
        ],
    ),
    "not finite": (scaled(lambda *_: math.inf), ["the gradient that optimizer.step() is given is not finite"]),
}
NO_REMEDY = {"not finite"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, dtype: torch.dtype) -> None:
    loop, words = MISTAKES[mistake]
    found = case(loop, dtype=dtype).findings
    assert len(found) == len(words)
    for each, start in zip(found, words, strict=True):
        assert each.reason.startswith(start)
        assert each.error and bool(each.remedy) == (mistake not in NO_REMEDY)
        assert ("scaler.step(optimizer)" in str(each.remedy)) == (mistake == "GradScaler without unscaling")


def test_of_one_micro_batch_for_each_step_little_can_be_wrong() -> None:
    assert case(tutorial, (3, 3)).findings == case(stepping(end, never, always), (3, 3)).findings == []
    assert case(ways.undivided_and_missing, (3, 3)).said.startswith(MISSING + "1 each, right are 0, 1)")
    assert case(MISTAKES["step at i % m == 0, but not at 0"][0], (3, 3)).said.startswith(
        "optimizer.step() is called once for the 2 micro-batches of 2 steps"
    )


UNEVEN = {
    "not divided": ["the loss is not divided by the 4"],
    "divided twice": ["the loss, a mean over one of several counts, is divided by the 4 micro-batches of a step twice"],
    "a sum, divided by the steps": [
        "the loss, a sum, is divided by the 4 micro-batches of a step but not by what counts"
    ],
    "zero_grad never": [MISSING, "the micro-batches' means are averaged"],
    "step too early": ["optimizer.step() is called one micro-batch too early", "the micro-batches' means are averaged"],
    "last left out, mean of the others": [LAST_LOST, "the micro-batches' means are averaged"],
    "one twice": [
        "micro-batch 2 of step 1 is used twice; micro-batch 2 of step 2",
        "the micro-batches' means are averaged",
    ],
    "any factor": ["the micro-batches' means are averaged", "the gradient is 0.7 times that mean of means"],
}


@pytest.mark.parametrize("mistake", UNEVEN)
def test_where_counts_differ_a_mistake_is_named_beside_the_mean_of_means(mistake: str) -> None:
    found = case(MISTAKES[mistake][0], (4, 3, 4, 2) * 2).findings
    assert len(found) == len(UNEVEN[mistake])
    for each, start in zip(found, UNEVEN[mistake], strict=True):
        assert each.reason.startswith(start)


def test_gradients_that_are_nearly_parallel_in_float32_still_show_what_is_left_out() -> None:
    """Too alike for their weights to be read, not for telling 0 from 1."""
    generator = torch.Generator().manual_seed(3)
    common, own = torch.randn(40, generator=generator), torch.randn(8, 40, generator=generator)
    alike = "the micro-batches' gradients are too much alike, some nearly sums of others, to tell their weights"
    assert combination(own[0], list(common + 0.03 * own), 2.0**-12).margins.min() * 4 > CLEAR
    for micro_batch, weight, apart, words in (
        (2, 0.0, 0.03, "micro-batch 3 of step 1 is not used (step 1: weights 0.25, "),
        (5, 0.5, 0.03, "micro-batch 2 of step 2 is used twice (step 2: weights 0.25, 0.5"),
        (1, 0.32, 0.03, alike),
        (2, 0.0, 0.002, alike),
    ):
        weights = [0.25] * 8
        weights[micro_batch] = weight
        assert explained(weights, list(common + apart * own), [3] * 8).startswith(words)


def test_what_no_weighted_sum_has_is_not_taken_for_one() -> None:
    parts = list(torch.eye(9, dtype=torch.float64)[:8])
    assert explained([0.25] * 8, parts, [3] * 8) == ""
    beside = torch.eye(9, dtype=torch.float64)[8] * 0.1
    assert explained([0.25] * 8, parts, [3] * 8, beside=beside).startswith(NO_SUM + "0.2 of it is left")
    # All of these numbers are of bfloat16 by nature, and nothing is off.
    assert explained([0.25] * 8, [each * 4 for each in parts], [3] * 8) == ""


def test_clipping_at_the_end_of_a_step_is_told_from_mistakes() -> None:
    assert case(ways.clipping(at_end=100.0)).findings == []
    whole = ways.norms(case(tutorial).run)
    for norm, steps in ((min(whole) / 2, 2), (sum(whole) / 2, 1)):
        run, (found,) = case(ways.clipping(at_end=norm))
        assert found.reason.startswith(
            f"gradients are clipped to the norm {norm:.4g} at the end of a step, as the full"
        )
        assert not found.error
        assert sum(math.isclose(each, norm, rel_tol=1e-4) for each in ways.norms(run)) == steps
    # The second step is larger than what the first would be clipped to: that is not clipping.
    parts = [factor * each for factor in (1.0, 9.0) for each in torch.eye(4, dtype=torch.float64)]
    assert explained([0.125] * 4 + [0.25] * 4, parts, [3] * 8).startswith(
        "the gradient is 0.5 (step 1) and 1 (step 2) times what it must be (step 1: weights 0.125 each"
    )
    # What is clipped in both steps shows no more how large it was.
    assert [each.error for each in case(ways.clipping(at_end=1.0, divide=False)).findings] == [False]


def test_where_gradients_are_too_alike_nothing_is_said_that_is_not_known() -> None:
    same = batches_of((3,)) * 8
    assert case(tutorial, batches=same).findings == []
    twice, only_last = "the loss is divided by the 4 micro-batches of a step twice", ONLY_LAST.partition(" (")[0]
    for mistake in ("divided twice", "zero_grad after each"):
        (found,) = case(MISTAKES[mistake][0], batches=same).findings
        assert found.reason == f"{twice}, or {only_last} (here these are the same)" and found.found == ()
    assert case(MISTAKES["not divided"][0], batches=same).said.startswith("the loss is not divided by the 4")
    (found,) = case(ways.clipping(at_end=0.3), batches=same).findings
    assert "times what it must be; clipping to the norm 0.3 would do that (" in found.reason and found.error
    # The second and the third of step 1 are equal: one of them is left out, and nobody can say which.
    some = batches_of((3,) * 8)
    some[2] = some[1]
    assert case(ways.using(lambda step, m: [0, 1, 3]), batches=some).said.startswith(
        "micro-batch 3 of step 2 is not used (step 2: weights 0.25, 0.25, 0, 0.25"
    )
    assert case(ways.using(lambda step, m: [0, 1, 2, 3] if step else [0, 1, 3]), batches=some).said == (
        "the micro-batches' gradients are too much alike, some nearly sums of others, to tell their weights"
    )


def test_low_precision_that_numbers_do_not_show_is_still_told_from_a_mistake() -> None:
    def autocast(model: nn.Module, batch: Batch, last: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean(model, batch)

    found = case(ways.changed(autocast), dtype=torch.float32).findings
    assert [each.reason.partition(";")[0] for each in found] == [
        "the gradients are as low precision (autocast) or a small change of the loss makes them"
    ]
    # Of two explanations that low precision leaves, the one that fits much better.
    near = case(ways.by_hand(torch.bfloat16), (50, 53, 48, 49) * 2).findings
    assert [each.reason.partition(",")[0] for each in near][1:] == ["the micro-batches' means are averaged"]
    assert case(ways.by_hand(torch.float32), dtype=torch.float32).findings == []
    assert case(ways.by_hand(torch.float32)).said.startswith(
        "the gradients are added up in low precision: float32 holds"
    )


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(-8.0, 0.0))
def test_combination_finds_the_weights_of_any_sum(seed: int, count: int, exponent: float) -> None:
    """Parts of very different norms, with a common direction that all but hides them."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    own = torch.randn(count, 3, 20, generator=generator, dtype=torch.float64)
    sizes = 10.0 ** (6 * torch.rand(count, generator=generator, dtype=torch.float64) - 3)
    parts = [(common + 10.0 ** (exponent / 4) * each) * size for each, size in zip(own, sizes, strict=True)]
    weights = torch.randn(count, generator=generator, dtype=torch.float64) / sizes
    total = sum((part * weight for part, weight in zip(parts, weights, strict=True)), torch.zeros(3, 20))
    found = combination(total, parts, 1e-12)
    assert found.residual < 1e-12 and bool(found.margins.isfinite().all())
    assert bool(((found.weights - weights).abs() <= found.margins).all())
    off = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    columns = torch.stack([part.flatten() for part in parts], dim=1)
    for basis in torch.linalg.qr(columns).Q.T:
        off -= (off.flatten() @ basis) * basis.view(3, 20)
    rest = combination(total + off, parts, 1e-12)
    assert rest.residual == pytest.approx(float(off.norm() / (total + off).norm()), rel=1e-6)


def test_weights_of_dependent_parts_are_the_smallest_and_known_to_be_unknown() -> None:
    one, two, three = torch.eye(3, 7, dtype=torch.float64)
    found = combination(one + 3 * two + three, [one, two, two, three, torch.zeros(7)])
    assert found.weights.tolist() == pytest.approx([1.0, 1.5, 1.5, 1.0, 0.0])
    assert found.margins.isinf().tolist() == [False, True, True, False, True]
    assert found.residual == pytest.approx(0.0, abs=1e-15)
    assert combination(torch.zeros(7), [one, two]).residual == 0.0


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 700), min_size=1, max_size=4), st.floats(-9, 9))
def test_sketches_are_linear_and_of_the_right_length(seed: int, sizes: list[int], factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def gradients() -> dict[str, Tensor]:
        return {f"p{i}": torch.randn(size, generator=generator, dtype=torch.float64) for i, size in enumerate(sizes)}

    one, two = gradients(), gradients()
    both = {name: one[name] + factor * two[name] for name in one}
    made = sketch(both)
    assert made.shape == (len(sizes), WIDTH) and made.dtype is torch.float64
    assert torch.allclose(made, sketch(one) + factor * sketch(two), rtol=0.0, atol=1e-12)
    for row, size, each in zip(made, sizes, both.values(), strict=True):
        if size <= WIDTH:  # no two elements share a number
            assert torch.equal(row.abs()[:size], each.abs()) and not row[size:].any()


def test_sketches_keep_norms_and_tell_parameters_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(600, 800, generator=generator, dtype=torch.float64)
    assert float(sketch({"w": spread}).norm() / spread.norm()) == pytest.approx(1.0, abs=0.15)
    assert not torch.equal(sketch({"w": spread}), sketch({"v": spread}))
    assert torch.equal(sketch({"w": None, "v": spread})[1:], sketch({"v": spread}))
    assert torch.equal(sketch({"w": spread.float().double()}), sketch({"w": spread.float()}))
    columns = torch.zeros(2, 4000, 1024, dtype=torch.float64)  # all in one column, each: they do not meet in one number
    columns[:, :, 7] = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    first, second = (sketch({"w": each}).flatten() for each in columns)
    assert abs(float(first @ second / first.norm() / second.norm())) < 0.3
