"""The benchmark of GPT-2 124M: its model and its arithmetic, and a tiny model through the same code on the CPU."""

from __future__ import annotations

from math import comb
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks import gpt2, training
from benchmarks.gpt2 import BARE, DDP, OURS, Case
from distsim.errors import DistsimError
from trainers import flops
from trainers.workloads import language_model


def model(case: Case) -> nn.Module:
    """Return a case's model, without memory."""
    return gpt2.fresh(case, torch.device("meta"))


def count(parts: nn.Module) -> int:
    return sum(each.numel() for each in parts.parameters())


def test_it_is_gpt2() -> None:
    """124,439,808 is what the model has that OpenAI published (and transformers' GPT2LMHeadModel counts)."""
    assert count(model(Case(vocabulary=50_257))) == 124_439_808
    padded = model(Case())
    assert count(padded) == 124_475_904 == 124_439_808 + 47 * 768
    assert {block.heads for block in padded.get_submodule("blocks").children()} == {12}


@pytest.mark.parametrize("case", [Case(batch=2), Case(layers=3, width=96, head_width=32, context=40, vocabulary=100)])
def test_counted_operations_are_those_of_the_formula(case: Case) -> None:
    """Equal, once what is in no product of matrices is left out: the positions' table, biases, and norms."""
    made = model(case)
    tokens = torch.zeros(2, case.batch, case.context, dtype=torch.int64, device="meta")
    counted = flops.of_batch(made, language_model.loss, (tokens[0], tokens[1]))
    multiplied = sum(each.numel() for each in made.parameters() if each.dim() == 2) - case.context * case.width
    assert counted == case.palm_flops(multiplied) * case.batch * case.context
    assert 0.9 < counted / (case.palm_flops(count(made)) * case.batch * case.context) < 1


@pytest.mark.timeout(120)
def test_the_same_code_on_the_cpu() -> None:
    table = gpt2.table(gpt2.SMOKE, 2, "cpu")
    columns = {name: list(values) for name, values in table.columns.items()}
    assert columns["side"] == [BARE, OURS, DDP]
    assert columns["reached"][0] is None and columns["reached"][1] in ("yes", "NO")
    assert columns["ratio_to_bare"][0] == columns["ratio_to_DDP"][2] == 1
    tokens = gpt2.SMOKE.batch * gpt2.SMOKE.context
    for step_s, per_s in zip(columns["step_s"], columns["tokens_per_s"], strict=True):
        assert per_s == pytest.approx(tokens / step_s, rel=0.5)  # of two blocks: medians of each, not of the same one
    assert f"torch {torch.__version__}" in table.included and "2 ranks" in table.included


def test_rows_by_hand() -> None:
    seconds = {BARE: np.array([1.0, 2.0, 4.0]), OURS: np.array([2.0, 2.0, 5.0]), DDP: np.array([1.0, 1.0, 10.0])}
    row = gpt2._row(OURS, seconds, tokens=100, token_s=0.002)
    assert row["step_s"] == 2 and row["tokens_per_s"] == 50 and row["MFU"] == "10.0%"
    assert row["ratio_to_bare"] == median([0.5, 1.0, 0.8]) and row["ratio_to_DDP"] == median([0.5, 0.5, 2.0])
    assert (row["ratio_from"], row["ratio_to"]) == (0.5, 1.0) and row["reached"] == "NO"
    assert gpt2._row(BARE, seconds, 100, 0.002)["reached"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    (table,) = gpt2.measure(1)
    assert "it needs a CUDA device" in str(table) and "Nothing was measured" in str(table)


def test_a_rank_that_fails_is_an_error() -> None:
    with pytest.raises(DistsimError, match=r"a rank of benchmarks\.gpt2 has failed: exit codes \["):
        training.in_processes("benchmarks.gpt2", 2, {"no such": "parameter"})


@given(st.integers(6, 60))
def test_interval_of_the_median_by_the_binomial_distribution(count: int) -> None:
    """The narrowest pair of values, as far from the least as from the most, that misses in at most 5 of 100 cases."""
    values = np.random.default_rng(count).permutation(count).astype(float)  # each value is its own place in order
    low, high = training.median_interval(values)
    heads = [comb(count, number) / 2**count for number in range(count + 1)]

    def missed(place: int) -> float:  # the median is below the value at `place`, or above the one opposite
        return float(sum(heads[: place + 1]) + sum(heads[count - place :]))

    place = int(low)
    assert (low, high) == (place, count - 1 - place)
    assert missed(place) <= 0.05 < missed(place + 1)


def test_interval_of_few_values_is_all_of_them() -> None:
    assert training.median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
    assert training.median_interval(np.array([7.0])) == (7.0, 7.0)
