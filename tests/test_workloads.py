"""The workloads that are built in: bytes for a language model, drawn digits for a classifier."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distsim.errors import ConfigError
from trainers.workload import Workload, data_digest, load, sequence
from trainers.workloads import BUILT_IN, digits, language_model, mlp, resnet


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small take many times longer with two threads on cores that are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refused(workload: str, options: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as raised:
        load(workload, options, 0, "float32")
    return str(raised.value)


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(1, 12))
def test_every_byte_but_a_documents_first_is_a_target_once(documents: list[bytes], context: int) -> None:
    pieces = language_model.Pieces([np.frombuffer(each, dtype=np.uint8) for each in documents], context)
    wanted = []
    for document in documents:
        for first in range(0, len(document) - 1, context):
            wanted.append(document[first : first + context + 1])
    assert [bytes(pieces[index]) for index in range(len(pieces))] == wanted
    inputs, targets = language_model.collate([pieces[index] for index in range(len(pieces))], context)
    assert inputs.shape == targets.shape == (len(wanted), context)
    learned = [(int(a), int(b)) for a, b in zip(inputs.flatten(), targets.flatten(), strict=True) if b != -100]
    assert learned == [pair for document in documents for pair in itertools.pairwise(document)]
    for index in (-1, len(pieces)):
        with pytest.raises(IndexError):
            pieces[index]


def test_pieces_are_views() -> None:
    document = np.arange(100, dtype=np.uint8)
    assert np.shares_memory(language_model.Pieces([document], 10)[3], document)


@pytest.mark.parametrize(
    ("pieces", "held_out"), [(49, 0), (50, 1), (101, 2), (12_800, 256), (12_801, 251), (40_000, 254)]
)
def test_some_samples_are_held_out(pieces: int, held_out: int) -> None:
    """Every 50th, or fewer: 12,801 pieces would be 256 at most, so every 51st."""
    everything = language_model.Pieces([np.arange(pieces + 1) % 251], 1)  # type: ignore[list-item]
    train, test = language_model.split(everything)
    every = max(50, -(-pieces // 256))
    numbers = list(range(pieces))
    wanted = numbers[every - 1 :: every]
    assert (len(train), len(test)) == (pieces - held_out, held_out) == (pieces - len(wanted), len(wanted))
    assert [int(test[index][0]) for index in range(len(test))] == [number % 251 for number in wanted]
    left = [number % 251 for number in numbers if number % every != every - 1]
    assert [int(train[index][0]) for index in range(len(train))] == left


def value(workload: Workload, batch: Any) -> float:
    return float(workload.loss(workload.model, batch).detach())


@cache
def small(text: str | None = None, **options: object) -> Workload:
    return load("language-model", {"layers": 1, "width": 32, "context": 16, "text": text, **options}, 0, "float64")


def test_the_language_model_has_as_many_parameters_as_is_said() -> None:
    assert sum(each.numel() for each in language_model.LanguageModel(4, 128, 128).parameters()) == 842_496
    large = language_model.LanguageModel(6, 384, 128)
    count = sum(each.numel() for each in large.parameters())
    block = 12 * 384**2 + 13 * 384  # 4 + 8 squares; 4 biases of attention, 5 of the perceptron, 4 of norms
    assert count == 6 * block + (256 + 128 + 2) * 384 == 10_795_008
    assert f"`layers=6,width=384` has {count:,}" in (language_model.__doc__ or "")
    assert sum(each.numel() for each in load("language-model", {}, 0, "float32").model.parameters()) == 842_496


def test_the_loss_is_the_sum_over_targets_whatever_the_batches() -> None:
    """Against log-softmax by hand, byte after byte; pieces of unequal lengths, together and each alone."""
    workload = small()
    lengths = {len(workload.data[index]): index for index in range(len(workload.data))}
    chosen = [workload.data[index] for _, index in sorted(lengths.items())[-6:]]
    assert len({len(each) for each in chosen}) == 6
    alone = [workload.collate([each]) for each in chosen]
    together = workload.collate(chosen)
    by_hand = 0.0
    for inputs, targets in alone:
        logits = workload.model(inputs)[0].detach().numpy()
        for row, target in zip(logits, targets[0].tolist(), strict=True):
            by_hand += np.log(np.exp(row).sum()) - row[target] if target >= 0 else 0.0
    assert value(workload, together) == pytest.approx(by_hand, rel=1e-12)
    assert sum(value(workload, each) for each in alone) == pytest.approx(by_hand, rel=1e-12)
    assert workload.count(together) == sum(len(each) - 1 for each in chosen)
    assert [workload.count(each) for each in alone] == [len(each) - 1 for each in chosen]


def test_a_half_precision_loss_is_summed_in_float32() -> None:
    workload = load("language-model", {"layers": 1, "width": 32, "context": 64}, 0, "float32")
    batch = workload.collate([workload.data[index] for index in range(32)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = workload.loss(workload.model, batch)
    full = workload.loss(workload.model, batch)
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(float(full.detach()), rel=1e-3)  # bfloat16 would have steps of 64 here
    assert not torch.equal(half, full)


def test_the_standard_librarys_documents_end_in_shorter_pieces() -> None:
    workload = small()
    assert workload.data_name == f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
    counts = {workload.count(workload.collate([workload.data[index]])) for index in range(0, len(workload.data), 7)}
    assert len(counts) > 5
    assert max(counts) == 16
    assert workload.evaluation is not None and 200 <= len(workload.evaluation) <= 256


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(range(256)) * 4)
    workload = small(str(path))
    assert workload.data_name == str(path)
    assert (len(workload.data), len(workload.evaluation or [])) == (63, 1)  # 1,023 targets, 16 a piece
    path.write_bytes(b"ab")
    short = language_model.build(layers=1, width=32, text=str(path))
    assert (len(short.data), short.evaluation) == (1, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 33}, "width must be a multiple of 32 (the width of a head), not 33"),
        ({"width": 0}, "width must be a multiple of 32 (the width of a head), not 0"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"dropout": 1}, "dropout must be at least 0 and less than 1, not 1.0"),
        ({"dropout": "nan"}, "dropout must be at least 0 and less than 1, not nan"),
        ({"text": "none.txt"}, "text=none.txt: cannot read it: No such file or directory"),
        ({"text": "."}, "text=.: cannot read it: Is a directory"),
        ({"text": "short.txt"}, "text=short.txt: there is nothing to learn from fewer than 2 bytes"),
        ({"layer": 2}, "has no option 'layer'; did you mean 'layers'?"),
    ],
)
def test_options_of_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a")
    assert refused("language-model", options).removeprefix("--workload language-model").lstrip(": ") == message


def test_dropout_is_off_unless_asked_for() -> None:
    batch = small().collate([small().data[index] for index in range(4)])
    assert value(small(), batch) == value(small(), batch)
    dropping = small(dropout=0.5)
    for mine, theirs in zip(small().model.parameters(), dropping.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    torch.manual_seed(0)
    assert value(dropping, batch) != value(dropping, batch)
    dropping.model.eval()
    assert value(dropping, batch) == value(small(), batch)


def test_the_language_model_looks_at_nothing_that_comes_later() -> None:
    model = small().model
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 9:] = 200
    first, second = model(tokens), model(changed)
    assert torch.equal(first[:, :9], second[:, :9])
    assert not torch.equal(first[:, 9:], second[:, 9:])


def test_drawn_digits_are_the_same_for_everybody_and_can_be_learned() -> None:
    workload = load("digits", {"samples": 2000}, 1, "float32")
    assert data_digest(workload) == data_digest(load("digits", {"samples": 2000}, 2, "float32"))
    assert data_digest(workload) != data_digest(load("digits", {"samples": 2001}, 1, "float32"))
    assert workload.evaluation is not None
    images, wanted = workload.collate([workload.evaluation[index] for index in range(256)])
    assert (images.shape, images.dtype, wanted.dtype) == ((256, 1, 16, 16), torch.uint8, torch.int64)
    assert set(wanted.tolist()) == set(range(10))
    optimizer = torch.optim.SGD(workload.model.parameters(), lr=0.05, momentum=0.9)
    for step in range(120):
        batch = workload.collate([workload.data[(step * 32 + index) % 2000] for index in range(32)])
        assert workload.count(batch) == 32
        optimizer.zero_grad()
        torch.autograd.backward(workload.loss(workload.model, batch) / 32)
        optimizer.step()
    with torch.no_grad():
        right = (workload.model(images).argmax(1) == wanted).double().mean()
    assert float(right) > 0.9


def test_digits_are_drawn_along_their_strokes() -> None:
    """Without noise of any kind: what a pixel is near to, measured here point by point."""

    class Still:
        def normal(self, mean: float, deviation: float, shape: Any) -> Any:
            return np.full(shape, mean)

        def uniform(self, low: float, high: float, shape: Any) -> Any:
            return np.full(shape, (low + high) / 2)

    rows, columns = np.mgrid[:16, :16]
    for digit, strokes in digits.STROKES.items():
        points = [(7.5 + 3 * (int(x) - 1), 7.5 + 5 * (int(y) - 1)) for x, y in map(tuple, strokes.split())]
        near = np.full((16, 16), np.inf)
        for (x0, y0), (x1, y1) in zip(points[::2], points[1::2], strict=True):
            for share in np.linspace(0, 1, 201):
                x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
                near = np.minimum(near, np.hypot(columns - x, 15 - rows - y))
        drawn = digits.draw(digit, 2, Still())  # type: ignore[arg-type]
        wanted = 255 * np.clip(1 + 0.9 - near, 0, 1)
        for image in drawn:
            assert np.abs(image - wanted).max() < 3  # 201 points for a line, and whole numbers


def test_digits_gradients_add_up_over_batches() -> None:
    """Each sample is normalised alone, so that micro-batches give the gradient of the large batch."""
    workload = load("digits", {"width": 8, "samples": 12}, 0, "float64")

    def gradient(indexes: list[list[int]]) -> Tensor:
        workload.model.zero_grad()
        for each in indexes:
            batch = workload.collate([workload.data[index] for index in each])
            torch.autograd.backward(workload.loss(workload.model, batch))
        return torch.cat([each.grad.flatten() for each in workload.model.parameters() if each.grad is not None])

    whole, parts = gradient([list(range(12))]), gradient([[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10, 11]])
    assert float((whole - parts).norm()) <= 1e-12 * float(whole.norm())
    batch = workload.collate([workload.data[index] for index in range(12)])
    logits = workload.model(batch[0])
    by_hand = sum(
        float(row.exp().sum().log() - row[digit]) for row, digit in zip(logits.detach(), batch[1], strict=True)
    )
    assert value(workload, batch) == pytest.approx(by_hand, rel=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 12}, "width must be a multiple of 8 (channels normalised together), not 12"),
        ({"samples": 0}, "samples must be from 1 to 1,000,000, not 0"),
    ],
)
def test_options_of_digits(options: dict[str, object], message: str) -> None:
    assert refused("digits", options) == f"--workload digits: {message}"


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("resnet", {"width": 4, "samples": 4}, 2 + 8),
        ("resnet", {"depth": 152, "width": 1, "samples": 4}, 2 + 50),
        ("mlp", {"widths": "8-4", "samples": 4}, 3),
        ("language-model", {"layers": 2, "width": 32, "context": 16}, 2),
    ],
)
def test_layers_that_memory_plans_apply_to(name: str, options: dict[str, object], layers: int) -> None:
    assert len(sequence(load(name, options, 0, "float32"))) == layers


def test_built_in_workloads_are_examples_of_ones_own() -> None:
    """Each module has `build` and `loss`, as a user's would, and names none of the trainers but siblings."""
    modules = (language_model, digits, mlp, resnet)
    assert [f"{module.__name__}:build" for module in modules] == list(BUILT_IN.values())
    for module in modules:
        assert callable(module.build) and callable(module.loss)
        tree = ast.parse(Path(module.__file__ or "").read_text())
        taken = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        others = {name for name in taken if name.startswith("trainers") and not name.startswith("trainers.workloads")}
        assert others == {"trainers.workload"}
