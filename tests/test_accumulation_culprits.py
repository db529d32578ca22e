"""Who is blamed, where and why: exactly what is planted, and nobody else.

Each case is run with 7 samples (8 where two are needed for a mean) as 3+3+1, and one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from offenders import (
    WIDTH,
    Attention,
    Backward,
    Center,
    Checkpointed,
    Drifting,
    Dropping,
    Experts,
    Flat,
    Leaf,
    MeanChild,
    OneByOne,
    OwnLoss,
    Picked,
    RunningMean,
    Similarities,
    TimeFirst,
    UnitGradient,
    WithBalance,
    balancing,
    by_itself,
    centered,
    contrastive,
    convolutions,
    in_parts,
    mean_of_batch,
    normalised,
    own_mean,
    own_sum,
    penalised,
    picked,
    scored,
    stack,
    tokens,
    with_balance,
)
from offending_text import OwnTextLoss, Packed, Tokens, next_token, predicted, text
from substitution import CLASSES, FEATURES, Case, blamed, one_thread, vectors
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

__all__ = ["one_thread"]
pytestmark = pytest.mark.timeout(60)

SIZES = (3, 1)
Blamed = list[tuple[str, str]]


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


INNOCENT: dict[str, Callable[[], Case]] = {
    "norms of each sample": lambda: Case(stack(nn.Tanh(), nn.LayerNorm(WIDTH), nn.GroupNorm(2, WIDTH)), vectors(7)),
    "batch norm in evaluation": lambda: Case(stack(nn.BatchNorm1d(WIDTH), nn.Tanh()).eval(), vectors(7)),
    "instance norm": lambda: convolutions(lambda size: nn.InstanceNorm2d(size, affine=True, track_running_stats=True)),
    "group norm": lambda: convolutions(lambda size: nn.GroupNorm(2, size)),
    "no parameters before": lambda: Case(
        nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), linear_in()), vectors(7)
    ),
    "weight norm": lambda: Case(stack(parametrizations.weight_norm(linear()), nn.Tanh()), vectors(7)),
    "spectral norm in evaluation": lambda: Case(stack(parametrizations.spectral_norm(linear())).eval(), vectors(7)),
    "a module under two names": lambda: Case(stack(*[linear()] * 3), vectors(7)),
    "attention": lambda: tokens(Attention()),
    "time first": lambda: tokens(TimeFirst(linear())),
    "samples and time in one": lambda: tokens(Flat(linear(), time_first=False)),
    "time and samples in one": lambda: tokens(Flat(linear(), time_first=True)),
    "sample by sample": lambda: Case(stack(OneByOne(nn.Sequential(linear(), nn.Tanh()))), vectors(7)),
    "experts": lambda: tokens(Flat(Experts(nn.Tanh()), time_first=False)),
    "checkpoints": lambda: Case(stack(Checkpointed(nn.Sequential(linear(), nn.Tanh()))), vectors(7)),
    "text": lambda: text(Tokens()),
    "tied weights": lambda: text(Tokens(tied=True)),
    "packed": lambda: text(Packed(), lambda model, batch: model(batch).square().sum(), len),
    "the model's own loss": lambda: Case(OwnLoss(nn.Tanh()), vectors(7), own_mean),
    "the model's own sum": lambda: Case(OwnLoss(nn.Tanh(), "sum"), vectors(7), own_sum),
    "the model's own mean over words": lambda: text(
        OwnTextLoss(), lambda model, batch: model(batch) * predicted(batch), predicted
    ),
    "picked numbers": lambda: Case(Picked(nn.Tanh()), picked()),
    "no model, but parts": lambda: Case(
        nn.ModuleDict({"body": stack(), "head": nn.Linear(CLASSES, 4)}), vectors(7), in_parts
    ),
}


def linear_in() -> nn.Linear:
    return nn.Linear(FEATURES, CLASSES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", INNOCENT)
def test_nobody_is_blamed_for_what_each_sample_gets_alone(name: str, size: int) -> None:
    torch.manual_seed(1)
    assert blamed(INNOCENT[name](), size) == []


FORWARD: dict[str, tuple[Callable[[], Case], list[str], str]] = {
    "dropout": (lambda: Case(stack(nn.Tanh(), nn.Dropout(0.3), linear()), vectors(7)), ["2"], "random"),
    "dropout in own code": (lambda: Case(stack(Dropping(), nn.Tanh()), vectors(7)), ["1"], "random"),
    "dropout in attention": (lambda: tokens(Attention(0.2)), [""], "random"),
    "dropout sample by sample": (
        lambda: Case(stack(OneByOne(nn.Sequential(linear(), nn.Dropout(0.3), linear()))), vectors(7)),
        ["1.child.1"],
        "random",
    ),
    "dropout, time first": (
        lambda: tokens(Flat(nn.Sequential(linear(), nn.Dropout(0.2), linear()), time_first=True)),
        ["middle.1"],
        "random",
    ),
    "dropout in an expert": (
        lambda: tokens(Flat(Experts(nn.Dropout(0.2)), time_first=False)),
        ["middle.experts.1.1"],
        "random",
    ),
    "dropout of packed sequences": (
        lambda: text(Packed(0.2), lambda model, batch: model(batch).square().sum(), len),
        ["lstm"],
        "random",
    ),
    "a leaf": (lambda: Case(stack(nn.Tanh(), centered(), linear()), vectors(7)), ["2"], "its output for a sample"),
    "innocent child, then its mean": (
        lambda: Case(stack(Center(linear())), vectors(7)),
        ["1"],
        "its output for a sample",
    ),
    "before an innocent child": (
        lambda: Case(stack(Center(linear(), before=True, after=False)), vectors(7)),
        ["1"],
        "hands to 1.child",
    ),
    "a guilty child, too": (
        lambda: Case(stack(Center(nn.Sequential(linear(), centered()))), vectors(7)),
        ["1.child.1", "1"],
        "its output for a sample",
    ),
    "under two names": (lambda: Case(stack(*[linear(), centered()] * 2), vectors(7)), ["2"], "its output"),
    "time first": (lambda: tokens(TimeFirst(centered(1))), ["middle"], "its output for a sample"),
    "samples and time in one": (
        lambda: tokens(Flat(nn.Sequential(linear(), centered(), linear()), time_first=False)),
        ["middle.1"],
        "its output for a sample",
    ),
    "a statistic from a child": (lambda: Case(stack(MeanChild()), vectors(7)), ["1"], "its output for a sample"),
    "capacity of experts": (
        lambda: tokens(Flat(Experts(nn.Tanh(), capacity=1.0), time_first=False)),
        ["middle"],
        "its output for a sample",
    ),
    "in a checkpoint": (
        lambda: Case(stack(Checkpointed(nn.Sequential(linear(), centered(), linear()))), vectors(7)),
        ["1.child.1"],
        "its output for a sample",
    ),
    "padding": (lambda: text(Tokens(causal=False)), [""], "or on how far they are padded"),
    "in a model with its own loss": (
        lambda: Case(OwnLoss(centered()), vectors(7), own_mean),
        ["model.1"],
        "its output for a sample",
    ),
    "in a part of no model": (
        lambda: Case(nn.ModuleDict({"body": stack(centered()), "head": nn.Linear(4, 4)}), vectors(7), in_parts),
        ["body.1"],
        "its output for a sample",
    ),
    "balance loss": (
        lambda: Case(WithBalance(), vectors(7), with_balance),
        ["balanced"],
        "neither the sum nor the mean",
    ),
    "pairs": (
        lambda: Case(
            stack(Similarities(), nn.Identity(), Leaf(lambda x: x.sum(1, keepdim=True).expand(-1, WIDTH))), vectors(7)
        ),
        ["1"],
        "pairs",
    ),
    "spectral norm": (
        lambda: Case(stack(parametrizations.spectral_norm(linear()), nn.Tanh()), vectors(7)),
        ["1.parametrizations.weight.0"],
        "changes what the next one depends on: _u, _v",
    ),
    "spectral norm by a hook": (
        lambda: Case(stack(spectral_norm(linear()), nn.Tanh()), vectors(7)),
        ["1"],
        "changes what the next one depends on: weight_u, weight_v",
    ),
    "a running mean": (lambda: Case(stack(RunningMean(), nn.Tanh()), vectors(7)), ["1"], "its output for a sample"),
    "another order": (
        lambda: Case(nn.Sequential(linear_in(), Leaf(lambda x: x.roll(1, 0))), vectors(7)),
        [""],
        "its output for a sample",
    ),
    "pairs for the loss": (
        lambda: Case(nn.Sequential(linear_in(), Similarities()), vectors(7), scored),
        ["1"],
        "pairs",
    ),
    "nobody knows what for the loss": (
        lambda: Case(
            nn.Sequential(stack(nn.Dropout(0.3)), Leaf(lambda x: (x - x.mean(0))[x > 0])),
            vectors(7),
            lambda model, batch: model(batch[0]).square().sum(),
        ),
        ["0.1"],
        "random",
    ),
    "a counter": (lambda: Case(stack(Drifting(), nn.Tanh()), vectors(7)), ["1"], "depends on: calls"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FORWARD)
def test_whose_forward_is_to_blame(name: str, size: int) -> None:
    build, modules, reason = FORWARD[name]
    torch.manual_seed(1)
    found, _ = build().searched(size)
    assert [(each.module, each.where) for each in found] == [(module, "forward") for module in modules]
    assert reason in found[0].reason
    assert found[0].difference > 1e4 * found[0].tolerance > 0


BACKWARD: dict[str, tuple[Callable[[], nn.Module], Blamed, str]] = {
    "a leaf": (lambda: Backward(nn.Identity(), after=True), [("1", "backward")], "passes back to 1.child"),
    "before an innocent child": (lambda: Backward(linear(), before=True), [("1", "backward")], "its backward gives"),
    "after an innocent child": (lambda: Backward(linear(), after=True), [("1", "backward")], "passes back to 1.child"),
    "a guilty child": (
        lambda: nn.Sequential(linear(), Leaf(normalised), linear()),
        [("1.1", "backward")],
        "the gradient that its backward gives",
    ),
    "a guilty child, too": (
        lambda: Backward(nn.Sequential(linear(), Leaf(normalised)), before=True),
        [("1.child.1", "backward"), ("1", "backward")],
        "its backward gives",
    ),
    "a weight": (UnitGradient, [("1", "backward")], "the gradients of its parameter 1.weight do not add up"),
    "a weight in a list": (
        lambda: UnitGradient(listed=True),
        [("1", "backward")],
        "the gradients of its parameter 1.weights.0 do not add up",
    ),
    "forward explains backward": (
        lambda: nn.Sequential(centered(), Leaf(normalised)),
        [("1.0", "forward"), ("1.1", "backward")],
        "its output",
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BACKWARD)
def test_whose_backward_is_to_blame(name: str, size: int) -> None:
    build, expected, reason = BACKWARD[name]
    torch.manual_seed(1)
    middle = build()
    found, _ = Case(stack(middle, nn.Tanh()), vectors(7)).searched(size)
    assert [(each.module, each.where) for each in found] == expected
    assert reason in found[0].reason and found[0].type == type(middle.get_submodule(found[0].module[2:])).__name__


@pytest.mark.parametrize("size", SIZES)
def test_gradients_for_a_table_are_compared_together_though_padding_cuts_it_off(size: int) -> None:
    torch.manual_seed(1)
    table = Backward(nn.Embedding(16, WIDTH), after=True)
    found, _ = text(Tokens(position=table)).searched(size)
    assert [(each.module, each.where) for each in found] == [("position", "backward")]
    assert "passes back to position.child" in found[0].reason


LOSSES: dict[str, tuple[Callable[[], Case], str, str]] = {
    "InfoNCE": (lambda: Case(stack(), vectors(7), contrastive), "compares samples", "trainers.across"),
    "balance": (lambda: Case(stack(), vectors(7), balancing), "compares samples", "trainers.across"),
    "a mean": (lambda: Case(stack(), vectors(7), mean_of_batch), "returns the mean", "reduction='mean'"),
    "the model's mean": (
        lambda: Case(OwnLoss(nn.Tanh()), vectors(7), lambda model, batch: model(*batch)["loss"]),
        "returns the mean",
        "reduction='mean'",
    ),
    "a mean over words": (
        lambda: text(Tokens(), lambda model, batch: next_token(model, batch) / predicted(batch)),
        "returns the mean",
        "reduction='mean'",
    ),
    "means of means over words": (
        lambda: text(Tokens(), lambda model, batch: next_token(model, batch) / predicted(batch) * len(batch), len),
        "weighs a sample by what else is in the batch",
        "sum over what counts",
    ),
    "a count that is always 1": (
        lambda: Case(stack(), vectors(7), count=lambda batch: 1),
        "do not add up to the full batch's",
        "count of a batch be the sum",
    ),
    "a count of one too many": (
        lambda: Case(stack(), vectors(7), count=lambda batch: len(batch[0]) + 1),
        "off by a factor of",
        "count of a batch be the sum",
    ),
    "a penalty on parameters": (lambda: Case(stack(), vectors(7), penalised), "not all of it is a sum", "times the"),
    "a batch made together": (
        lambda: Case(stack(), vectors(7), collate=by_itself),
        "what the model is given for a sample",
        "collate",
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_when_the_loss_is_to_blame(name: str, size: int) -> None:
    build, reason, remedy = LOSSES[name]
    torch.manual_seed(1)
    found, _ = build().searched(size)
    assert [(each.module, each.type, each.where) for each in found] == [("", "loss", "loss")]
    assert reason in found[0].reason and remedy in str(found[0].remedy)


def test_both_batch_norms_deep_inside_are_blamed_and_the_remedy_is_named() -> None:
    for build in (deep_norms, flat_norms):
        torch.manual_seed(1)
        found, _ = build().searched(2)
        assert [(each.module, each.where) for each in found] == [("1", "forward"), ("3.1", "forward")]
        assert all("mean and the variance of the micro-batch" in each.reason for each in found)
        assert all("--batch-norm group" in str(each.remedy) for each in found)


def deep_norms() -> Case:
    return convolutions(nn.BatchNorm2d)


def flat_norms() -> Case:
    inner = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(WIDTH))
    return Case(stack(nn.BatchNorm1d(WIDTH), linear(), inner), vectors(8))


def test_a_module_and_a_loss_are_blamed_together_and_the_loss_last() -> None:
    torch.manual_seed(1)
    case = Case(stack(nn.Tanh(), nn.Dropout(0.3)), vectors(7), contrastive)
    assert blamed(case) == [("2", "forward"), ("", "loss")]


def test_a_penalty_that_is_wrong_does_not_make_modules_look_guilty_but_their_forward_does() -> None:
    torch.manual_seed(1)
    case = Case(stack(nn.Tanh(), nn.Dropout(0.3)), vectors(7), penalised)
    assert blamed(case) == [("2", "forward"), ("", "loss")]


def test_one_micro_batch_of_everything_is_the_full_batch() -> None:
    torch.manual_seed(1)
    for case in (deep_norms(), Case(stack(centered()), vectors(7), contrastive)):
        assert blamed(case, 8) == []


def test_batch_norm_that_counts_on_its_statistics_of_old_is_blamed_only_if_it_has_none() -> None:
    torch.manual_seed(1)
    model = convolutions(lambda size: nn.BatchNorm2d(size, track_running_stats=False))
    model.model.eval()
    assert blamed(model) == [("1", "forward"), ("3.1", "forward")]
