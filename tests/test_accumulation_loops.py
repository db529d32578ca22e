"""Users' loops are run as they are found: what they give their optimizer is kept, and the model stays what it was."""

# mypy: allow-untyped-calls

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation_loops import (
    Batch,
    Loop,
    Net,
    batches_of,
    case,
    closures,
    explained,
    mean,
    right,
    scaled,
    total,
    tutorial,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from distsim.errors import ConfigError
from trainers.accumulation.loops import LoopRun, Recorder, habits, run_loop, scales
from trainers.workload import Workload


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on shared cores take many times longer for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def workload(loop: Loop, model: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Workload:
    torch.manual_seed(5)
    return Workload(model=model or Net().to(dtype), data=[0], loss=total, loop=loop)


def means(work: Workload, batches: Sequence[Batch], accumulate: int) -> list[dict[str, Tensor]]:
    """The gradients of the mean over each step, all samples in one batch."""
    found = []
    for start in range(0, len(batches), accumulate):
        step = batches[start : start + accumulate]
        whole = (torch.cat([tokens for tokens, _ in step]), torch.cat([labels for _, labels in step]))
        parameters = dict(work.model.named_parameters())
        gradients = torch.autograd.grad(mean(work.model, whole), list(parameters.values()))
        found.append(dict(zip(parameters, gradients, strict=True)))
    return found


def looping(
    step: Callable[[Optimizer, nn.Module], object] = lambda optimizer, model: optimizer.step(),
    zero: Callable[[Optimizer, nn.Module], object] = lambda optimizer, model: optimizer.zero_grad(),
    back: Callable[[Tensor], object] = torch.Tensor.backward,
) -> Loop:
    """The loop of tutorials, with other ways to do the same."""

    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        for i, batch in enumerate(batches):
            back(mean(model, batch) / accumulate)
            if (i + 1) % accumulate == 0:
                step(optimizer, model)
                zero(optimizer, model)

    return loop


def scaling(enabled: bool, clip: bool) -> Loop:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)

        def step(optimizer: Optimizer, model: nn.Module) -> None:
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()

        looping(step, back=lambda loss: scaler.scale(loss).backward())(model, optimizer, batches, accumulate)

    return loop


def with_schedule(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def step(optimizer: Optimizer, model: nn.Module) -> None:
        optimizer.step()
        rates.step()

    looping(step)(model, optimizer, batches, accumulate)


def with_hooks(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
    """Hooks that look at gradients, and after these are added up."""
    seen: list[float] = []
    handles = [each.register_hook(lambda gradient: seen.append(float(gradient.norm()))) for each in model.parameters()]
    handles += [each.register_post_accumulate_grad_hook(lambda each: None) for each in model.parameters()]
    tutorial(model, optimizer, batches, accumulate)
    assert len(seen) == len(batches) * len(list(model.parameters()))
    for handle in handles:
        handle.remove()


WAYS: dict[str, Loop] = {
    "tutorial": tutorial,
    "weighed": right,
    "zeros": looping(zero=lambda optimizer, model: optimizer.zero_grad(set_to_none=False)),
    "of the model": looping(zero=lambda optimizer, model: model.zero_grad()),
    "closure": closures,
    "GradScaler": scaling(True, False),
    "GradScaler, clipping": scaling(True, True),
    "GradScaler, off": scaling(False, False),
    "clipping": looping(
        lambda optimizer, model: (nn.utils.clip_grad_norm_(model.parameters(), 1e9), optimizer.step()),
    ),
    "schedule": with_schedule,
    "hooks": with_hooks,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_loops_as_they_are_found_give_the_gradient_of_the_mean(way: str, dtype: torch.dtype) -> None:
    work, batches = workload(WAYS[way], dtype=dtype), batches_of((3,) * 8)
    run = run_loop(work, batches, 4)
    assert run.calls == 2 and run.losses is None
    for given, expected in zip(run.steps, means(work, batches, 4), strict=True):
        assert list(given) == list(expected)
        for name, gradient in given.items():
            assert gradient is not None and gradient.dtype is dtype
            assert torch.allclose(gradient, expected[name], rtol=1e-12 if dtype is torch.float64 else 1e-4, atol=1e-6)


def test_of_one_loop_there_is_nothing_left_in_the_model() -> None:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        assert isinstance(batches, list) and all(each.grad is None for each in model.parameters())
        model.get_submodule("hidden").eval()
        model.get_submodule("embedding").requires_grad_(False)
        tutorial(model, optimizer, batches, accumulate)
        mean(model, batches[0]).backward()

    work = workload(loop)
    work.model.get_submodule("head").eval()
    work.model.get_parameter("side.bias").requires_grad_(False)
    next(work.model.parameters()).grad = torch.ones(11, 6, dtype=torch.float64)
    before = {name: each.detach().clone() for name, each in work.model.named_parameters()}
    run = run_loop(work, tuple(batches_of((2,) * 4)), 2)
    assert run.steps[0]["embedding.weight"] is None and "side.bias" not in run.steps[0]
    assert work.model.get_submodule("hidden").training and not work.model.get_submodule("head").training
    for name, parameter in work.model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])
        assert parameter.requires_grad == (name != "side.bias")


def test_what_a_step_was_given_is_a_copy_and_only_two_are_kept() -> None:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(5):
            optimizer.step()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad += 1

    run = run_loop(workload(loop), batches_of((2,) * 2), 1)
    assert run.calls == 5
    assert [float(each.min()) for step in run.steps for each in step.values() if each is not None] == [0.0] * 7 + [
        1.0
    ] * 7


def test_sparse_gradients_of_an_embedding_are_kept_as_dense_ones() -> None:
    model = Net()
    model.embedding = nn.Embedding(11, 6, sparse=True)
    work, batches = workload(tutorial, model.double()), batches_of((3,) * 2)
    given = run_loop(work, batches, 1).steps[0]["embedding.weight"]
    assert given is not None and given.layout is torch.strided
    model.embedding.sparse = False
    assert torch.allclose(given, means(work, batches, 1)[0]["embedding.weight"])


def test_a_recorder_is_an_optimizer_that_changes_nothing() -> None:
    model = nn.Linear(2, 1)
    recorder = Recorder(model)
    before = model.weight.detach().clone()
    assert isinstance(recorder, Optimizer) and recorder.param_groups[0]["lr"] > 0
    model(torch.ones(1, 2)).sum().backward()
    recorder.step()
    assert torch.equal(model.weight, before)
    recorder.zero_grad()
    assert recorder.step(lambda: 3.0) == 3.0
    assert recorder.steps[1] == {"weight": None, "bias": None}
    weight = recorder.steps[0]["weight"]
    assert weight is not None and weight.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("returned", "losses"),
    [
        ([1, 2.5], (1.0, 2.5)),
        ((torch.tensor(1.0), torch.tensor([2.0], requires_grad=True)), (1.0, 2.0)),
        ([1.0, 2.0, 3.0], (1.0, 2.0, 3.0)),
        (None, None),
        ([], ()),
        (["a", 1.0], None),
        ([True, 1.0], None),
        ([torch.ones(2)], None),
        ([torch.ones(1, dtype=torch.complex64)], None),
        (3.0, None),
    ],
)
def test_losses_are_read_where_a_loop_returns_a_list_of_them(returned: Any, losses: tuple[float, ...] | None) -> None:
    assert run_loop(workload(lambda model, optimizer, batches, accumulate: returned), [0, 0], 1).losses == losses


def test_a_loop_that_fails_is_told_its_line() -> None:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        model.get_submodule("embedding").requires_grad_(False)
        raise KeyError("here")

    line = inspect.getsourcelines(loop)[1] + 2
    work = workload(loop)
    with pytest.raises(ConfigError) as raised:
        run_loop(work, [0, 0], 1)
    assert str(raised.value) == f"the workload's loop failed: KeyError: 'here' ({Path(__file__)}:{line})"
    assert all(each.requires_grad for each in work.model.parameters())


@pytest.mark.parametrize(
    "change", [lambda each: each.data.add_(1e-12), lambda each: setattr(each, "data", each.data.half())]
)
def test_a_loop_that_changes_parameters_itself_is_refused_and_they_are_put_back(
    change: Callable[[Tensor], object],
) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> None:
        change(model.get_parameter("head.bias"))

    work = workload(loop)
    before = work.model.get_parameter("head.bias").detach().clone()
    with pytest.raises(ConfigError, match=r"has changed parameters itself \(head\.bias\); it must leave"):
        run_loop(work, [0, 0], 1)
    assert torch.equal(work.model.get_parameter("head.bias"), before)


def test_parameters_that_are_not_numbers_are_not_taken_for_changed_ones() -> None:
    work = workload(lambda model, optimizer, batches, accumulate: None)
    with torch.no_grad():
        work.model.get_parameter("head.bias")[0] = float("nan")
    assert run_loop(work, [0, 0], 1).calls == 0


def test_the_right_weights_come_first_and_no_other_habit_has_them() -> None:
    for counts, samples in (
        ([3.0] * 6, [3.0] * 6),
        ([3.0, 5, 1, 4, 4, 4], [1.0, 2, 1, 1, 2, 1]),
        ([1.0] * 6, [1.0] * 6),
    ):
        sizes = torch.tensor(counts, dtype=torch.float64), torch.tensor(samples, dtype=torch.float64)
        first, *others = scales(*sizes, 3)
        assert first.words == () and first.weights.tolist() == pytest.approx(
            [each / sum(counts[:3]) for each in counts[:3]] + [each / sum(counts[3:]) for each in counts[3:]]
        )
        assert all(each.words and not torch.allclose(each.weights, first.weights) for each in others)
        for calls in range(1, 8):
            run = LoopRun(steps=({},) * min(calls, 2), calls=calls, losses=None)
            known = habits(run, *sizes, 3)
            assert [len(each.words) for each in known] == sorted(len(each.words) for each in known)
            assert [not each.words for each in known[:2]] == ([True, False] if calls == 2 else [False] * len(known[:2]))
            assert all(each.weights.shape == (min(calls, 2), 6) for each in known)


def weighed_mean(step: Sequence[tuple[Batch, float]]) -> float:
    return sum(len(tokens) * loss for (tokens, _), loss in step) / sum(len(tokens) for (tokens, _), _ in step)


LOGS: list[tuple[Callable[[list[Any]], float], list[str]]] = [
    (weighed_mean, []),
    (lambda step: sum(loss for _, loss in step), ["the sum of those of the 3 micro-batches, not their mean"]),
    (lambda step: sum(loss for _, loss in step) / 3, ["the mean of the means of the 3 micro-batches, though they are"]),
    (lambda step: weighed_mean(step) / 3, ["the mean of the 3 micro-batches, divided by 3 once more"]),
    (
        lambda step: 8 * weighed_mean(step),
        ["the sum of those of all that counts in the 3 micro-batches, not"],
    ),
    (lambda step: step[-1][1], ["that of the last micro-batch alone"]),
    (lambda step: step[-1][1] / 3, ["that of the last micro-batch alone, divided by 3"]),
    (lambda step: 1.0, ["not the mean of its step"]),
]


@pytest.mark.parametrize(("log", "said"), LOGS)
def test_the_losses_that_a_loop_returns_are_explained(log: Callable[[list[Any]], float], said: list[str]) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> list[float]:
        right(model, optimizer, batches, accumulate)
        pairs = [(batch, float(mean(model, batch).detach())) for batch in batches]
        return [log(pairs[:accumulate]), log(pairs[accumulate:])]

    found = case(loop, (4, 3, 1) * 2, with_losses=True).findings
    assert len(found) == len(said)
    for each, what in zip(found, said, strict=True):
        assert each.reason.startswith(f"the loss that the loop returns is {what}")


def test_a_loop_that_returns_other_than_two_losses_is_told_so() -> None:
    def loop(model: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], accumulate: int) -> list[float]:
        right(model, optimizer, batches, accumulate)
        return [1.0] * len(batches)

    assert case(loop, with_losses=True).said == "the loop returns 8 losses for 2 steps"
    assert case(tutorial, with_losses=True).findings == []


def test_loops_that_weigh_by_samples_are_told_from_those_that_count() -> None:
    """Micro-batches of 2 or 4 samples, with 3 to 9 tokens that count."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(6)]
    sizes = [3, 9, 5, 4, 8, 6], [2, 4, 2, 2, 4, 2]
    assert explained([3 / 17, 9 / 17, 5 / 17, 4 / 18, 8 / 18, 6 / 18], parts, *sizes) == ""
    for weights, words in (
        ([2 / 8, 4 / 8, 2 / 8] * 2, "the micro-batches' means are weighted by their samples, which are not what"),
        ([1 / 3] * 6, "the micro-batches' means are averaged, though they are over different counts (3, 9, 5)"),
        ([1 / 8] * 6, "the loss, a mean already, is divided by the 8 samples of the step"),
        ([1 / 17] * 3 + [1 / 18] * 3, "the loss, a mean already, is divided by the 17 that count in the step"),
    ):
        assert explained(weights, parts, *sizes).startswith(words)


def test_two_mistakes_with_the_same_weights_are_both_named() -> None:
    assert case(scaled(lambda batch, step, m: 1 / m**2), (4,) * 8).said == (
        "the loss is divided by the 4 micro-batches of a step twice, or the loss, a mean already, is divided by the 16 "
        "samples of the step (here these are the same)"
    )
    # Of micro-batches of one sample a mean is a sum: the one is not named beside the other.
    assert case(scaled(lambda batch, step, m: 1.0), (1,) * 8).said.startswith(
        "the loss is not divided by the 4 micro-batches of a step (step 1: "
    )
