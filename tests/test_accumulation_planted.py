"""Whatever is planted, alone or with others, is blamed wherever it is, and nobody else: over many random models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offenders import WIDTH, Center, Dropping, Leaf, OneByOne, RunningMean, UnitGradient, centered, normalised, stack
from substitution import Case, blamed, one_thread, vectors
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

__all__ = ["one_thread"]
pytestmark = pytest.mark.timeout(60)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "tanh": nn.Tanh,
    "relu": lambda: nn.ReLU(inplace=True),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "sample by sample": lambda: OneByOne(linear()),
}
WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm1d(WIDTH), "forward"),
    "dropout": (lambda: nn.Dropout(0.4), "forward"),
    "dropout in own code": (Dropping, "forward"),
    "mean": (centered, "forward"),
    "mean before a child": (lambda: Center(linear(), before=True, after=False), "forward"),
    "spectral norm": (lambda: spectral_norm(linear()), "forward"),
    "running mean": (RunningMean, "forward"),
    "gradient": (lambda: Leaf(normalised), "backward"),
    "gradient of a weight": (UnitGradient, "backward"),
}
Tree = str | list["Tree"]


def trees() -> st.SearchStrategy[Tree]:
    """Modules in a row, some of which are rows in turn."""
    leaf: st.SearchStrategy[Tree] = st.sampled_from(sorted(RIGHT) + sorted(WRONG))
    return st.recursive(leaf, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=7)


@settings(max_examples=40)
@given(trees())
def test_whatever_is_planted_is_blamed_wherever_it_is_and_nobody_else(tree: Tree) -> None:
    torch.manual_seed(1)
    expected: list[tuple[str, str]] = []

    def build(tree: Tree, name: str) -> nn.Module:
        if isinstance(tree, list):
            return nn.Sequential(*[build(each, f"{name}.{number}") for number, each in enumerate(tree)])
        make, where = WRONG[tree] if tree in WRONG else (RIGHT[tree], "")
        expected.extend([(name, where)] if where else [])
        return make()

    case = Case(stack(nn.Tanh(), build(tree, "2")), vectors(8))
    assert blamed(case, 4) == expected
