"""Cutting micro-batches out of tensors of the full batch: each number there says whose it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.accumulation.distances import difference, norm
from trainers.accumulation.probes import Place
from trainers.accumulation.rounding import Scales
from trainers.accumulation.slices import cuts, matching_rows, rows, slice_of
from trainers.accumulation.tables import Statistic, Table, Taken, tables

LAYOUTS = {
    "B T C": "btc",
    "T B C": "tbc",
    "B*T C": "(bt)c",
    "T*B C": "(tb)c",
    "B C T": "bct",
    "B*T": "(bt)",
    "C T*B": "c(tb)",
}


def laid_out(layout: str, samples: range, time: int, channels: int, most: tuple[int, int, int]) -> Tensor:
    """Numbers that say of which sample, time and channel they are, naively filled in."""
    _, longest, widest = most
    sizes = {"b": len(samples), "t": time, "c": channels}
    shape, groups = [], []
    for token in layout.replace("(", " (").replace(")", ") ").split():
        for group in [token[1:-1]] if token.startswith("(") else list(token):
            shape.append(int(torch.tensor([sizes[each] for each in group]).prod()))
            groups.append(group)
    tensor = torch.full(shape, -1.0)
    for b in range(len(samples)):
        for t in range(time):
            for c in range(channels):
                at = {"b": b, "t": t, "c": c}
                index = []
                for group in groups:
                    place = 0
                    for each in group:
                        place = place * sizes[each] + at[each]
                    index.append(place)
                tensor[tuple(index)] = (samples[b] * longest + t) * widest + (c if "c" in layout else 0)
    return tensor


@st.composite
def situations(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    """A full batch, a micro-batch's tensor with as much or less padding, and where it is."""
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    samples, time, channels = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    first = draw(st.integers(0, samples - 1))
    count = draw(st.integers(1, samples - first))
    shorter = draw(st.integers(1, time))
    most = (samples, time, channels)
    full = laid_out(layout, range(samples), time, channels, most)
    return full, laid_out(layout, range(first, first + count), shorter, channels, most), samples, first, count


@given(situations())
def test_where_shapes_leave_a_choice_one_of_the_cuts_is_the_right_one(
    situation: tuple[Tensor, Tensor, int, int, int],
) -> None:
    full, part, samples, first, count = situation
    taken = [cut.take(full) for cut in cuts(full.shape, part.shape, samples, first, count)]
    assert all(each.shape == part.shape for each in taken)
    assert any(torch.equal(each, part) for each in taken)


@given(situations())
def test_the_first_cut_is_what_slice_of_returns(situation: tuple[Tensor, Tensor, int, int, int]) -> None:
    full, part, samples, first, count = situation
    made = slice_of(full, part.shape, samples, first, count)
    assert made is not None and torch.equal(made, cuts(full.shape, part.shape, samples, first, count)[0].take(full))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("first", "count"), [(0, 3), (3, 3), (6, 1)])
def test_layouts_are_told_by_their_shape(name: str, first: int, count: int) -> None:
    """7 samples of 5 times of 4 channels; with samples innermost in a dimension it takes values."""
    full = laid_out(LAYOUTS[name], range(7), 5, 4, (7, 5, 4))
    part = laid_out(LAYOUTS[name], range(first, first + count), 5, 4, (7, 5, 4))
    found = cuts(full.shape, part.shape, 7, first, count)
    assert next(cut.kind for cut in found if torch.equal(cut.take(full), part)) == "samples"
    if "tb" not in LAYOUTS[name] or name == "T B C":
        made = slice_of(full, part.shape, 7, first, count)
        assert made is not None and torch.equal(made, part)


def test_padding_is_cut_off_at_the_end_and_the_batch_is_the_dimension_that_shrinks_with_it() -> None:
    full = torch.arange(8 * 12 * 4).view(8, 12, 4)
    made = slice_of(full, (2, 9, 4), 8, 4, 2)
    assert made is not None and torch.equal(made, full[4:6, :9])
    maps = torch.arange(8 * 2 * 12 * 12).view(8, 2, 12, 12)
    made = slice_of(maps, (3, 2, 9, 9), 8, 4, 3)
    assert made is not None and torch.equal(made, maps[4:7, :, :9, :9])


def test_the_batch_is_rather_the_dimension_of_which_samples_keep_their_share() -> None:
    """(T, B, C) with 16 times and 8 samples: 2 samples of 2 times could be cut from the first dimension, too."""
    full = torch.arange(16 * 8 * 4).view(16, 8, 4)
    made = slice_of(full, (2, 2, 4), 8, 4, 2)
    assert made is not None and torch.equal(made, full[:2, 4:6])


def test_what_has_no_batch_dimension_is_returned_whole_or_without_padding() -> None:
    table = torch.arange(20.0).view(5, 4)
    for part, whole in (((5, 4), table), ((3, 4), table[:3]), ((5, 4), table)):
        made = slice_of(table, part, 8, 2, 2)
        assert made is not None and torch.equal(made, whole)
    assert slice_of(torch.tensor(3.0), (), 8, 2, 2) == 3.0
    assert [cut.kind for cut in cuts((5, 4), (5, 4), 8, 2, 2)] == ["same"]
    assert [cut.kind for cut in cuts((5, 4), (3, 4), 8, 2, 2)] == ["shorter"]


def test_all_samples_are_all_samples() -> None:
    full = torch.arange(24.0).view(8, 3)
    made = slice_of(full, (8, 3), 8, 0, 8)
    assert made is not None and torch.equal(made, full)
    assert cuts((8, 3), (8, 3), 8, 0, 8)[0].kind == "samples"


def test_shapes_that_cannot_be_tell_nothing() -> None:
    full = torch.zeros(8, 4)
    assert slice_of(full, (4,), 8, 0, 2) is None
    assert slice_of(full, (2, 5), 8, 0, 2) is None
    assert slice_of(full, (9, 4), 8, 0, 2) is None


def test_pairs_of_samples_are_the_block_of_the_micro_batch() -> None:
    full = torch.arange(49.0).view(7, 7)
    found = {cut.kind: cut.take(full) for cut in reversed(cuts((7, 7), (3, 3), 7, 3, 3))}
    assert torch.equal(found["pairs"], full[3:6, 3:6])
    assert "pairs" not in {cut.kind for cut in cuts((7, 7), (3, 7), 7, 3, 3)}


@given(st.data())
def test_rows_are_found_wherever_they_are(data: st.DataObject) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    full = torch.randn(9, 2, 2, generator=random)
    index = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True)))
    noise = 1e-9 * torch.randn(len(index), 2, 2, generator=random)
    found = matching_rows(full, full[index] + noise, 1e-6)
    assert found is not None and torch.equal(found, index)
    assert torch.equal(rows(found).take(full), full[index])


def test_rows_that_are_nowhere_or_could_be_two_tell_nothing() -> None:
    full = torch.arange(12.0).view(6, 2) + 1
    assert matching_rows(full - 5, (full - 5)[1:4], 1e-6) is not None
    assert matching_rows(full - 5, torch.zeros(1, 2), 1e9) is None
    assert matching_rows(full, full[2:4] + 0.1, 1e-6) is None
    assert matching_rows(torch.cat([full, full[2:3]]), full[2:4], 1e-6) is None  # twice in the full batch
    assert matching_rows(full, full[[2, 2, 3]], 1e-6) is not None  # which `Taken` finds out
    assert matching_rows(full, full[:, :1], 1e-6) is None
    assert matching_rows(full[:2], full[:3], 1e-6) is None
    assert matching_rows(full[:, 0], full[:2, 0], 1e-6) is None


def test_equal_infinities_and_nans_are_no_difference_and_others_are() -> None:
    inf, nan = float("inf"), float("nan")
    one = torch.tensor([1.0, inf, -inf, nan])
    assert difference(one, one) == 0.0
    assert difference(one, torch.tensor([4.0, inf, -inf, nan])) == 3.0
    assert difference(one, torch.tensor([1.0, -inf, -inf, nan])) == inf
    assert difference(one, torch.tensor([1.0, inf, -inf, 0.0])) != difference(one, one)
    assert norm(torch.tensor([3.0, inf, nan, 4.0])) == 5.0


def table(tensor: Tensor, scale: float | None, usual: float | None = 2.0) -> Table:
    return Table({PLACE: tensor}, {} if scale is None else {PLACE: scale}, usual, torch.float64)


PLACE = Place("", 0, 0)
UNIT = 6 * 2**0.5 * 2.0**-53


def test_what_rounding_may_do_is_what_was_measured_and_no_less_than_is_usual() -> None:
    tensor = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert table(tensor, 100.0).limit(PLACE) == pytest.approx(100 * UNIT)
    assert table(tensor, 1.0).limit(PLACE) == pytest.approx(2 * 5 * UNIT)
    assert table(tensor, None).limit(PLACE) == pytest.approx(2 * 5 * UNIT)
    assert table(tensor, None, None).limit(PLACE) == pytest.approx(5 * 2.0**-26)


def test_inputs_may_be_off_relatively_as_much_as_what_becomes_of_them() -> None:
    ones, other = torch.ones(4, dtype=torch.float64), Place("", 1, 0)
    scales = Scales(
        outputs=(), loss=1.0, gradients={}, places={PLACE: 100.0}, output_gradients={PLACE: 8.0}, input_gradients={}
    )
    kept = {"input": {PLACE: 3 * ones, other: ones}, "output": {PLACE: ones, other: ones}}
    values, gradients = tables(kept, kept, scales, torch.float64)
    assert values["output"].limit(PLACE) == pytest.approx(100 * UNIT)
    assert values["input"].limit(PLACE) == pytest.approx(3 * 100 * UNIT)
    assert values["input"].limit(other) == pytest.approx(2 * 50 * UNIT)  # what is usual
    assert [gradients["input"].limit(place) for place in (PLACE, other)] == pytest.approx([6 * 4 * UNIT, 2 * 4 * UNIT])
    values, gradients = tables(kept, kept, None, torch.float64)
    assert values["input"].limit(other) == gradients["output"].limit(PLACE) == pytest.approx(2 * 2.0**-26)


@pytest.mark.parametrize(
    ("parts", "full", "share"),
    [
        ([1.0, 2.0, 4.0], 7.0, "sum"),
        ([1.0, 2.0, 4.0], (3 * 1 + 3 * 2 + 4) / 7, "samples"),
        ([1.0, 2.0, 4.0], (9 * 1 + 5 * 2 + 2 * 4) / 16, "counted"),
        ([1.0, 2.0, 4.0], (1 + 2 + 4) / 3, None),
        ([1.0, 2.0, 4.0], 7.0 + 1e-12, None),
    ],
)
def test_what_the_micro_batches_values_add_up_to(parts: list[float], full: float, share: str | None) -> None:
    statistic = Statistic(table(torch.tensor(full, dtype=torch.float64), None), PLACE)
    for part, count, counted in zip(parts, (3, 3, 1), (9.0, 5.0, 2.0), strict=True):
        statistic.add(torch.tensor(part, dtype=torch.float64), count, counted, part != full)
    assert statistic.off and statistic.share() == share


def test_taken_is_all_if_each_number_but_zeros_is_there_once() -> None:
    full = torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 0.0]])

    def all_of(*indexes: list[int]) -> bool:
        taken = Taken()
        for index in indexes:
            taken.add(table(full, None).match(rows(torch.tensor(index)), PLACE, full[index]))
        return taken.is_all(full)

    assert all_of([0, 2], [1]) and all_of([2], [0], [1])
    assert not all_of([0, 2]) and not all_of([0, 2], [2])  # as many numbers, but not the same ones


def test_a_difference_is_counted_in_tolerances_and_nan_is_more_than_any() -> None:
    right = torch.tensor([1.0, 1.0], dtype=torch.float64)
    found: list[Any] = [
        table(right, 1 / UNIT).match(cuts((2,), (2,), 5, 0, 2)[0], PLACE, right + each)
        for each in (0, 0.5, 1.5, torch.nan)
    ]
    assert [match.off for match in found] == [False, False, True, True]
    assert all(one.tolerances < other.tolerances for one, other in pairwise(found))
    assert found[3].tolerances == float("inf")
