"""Verdicts where they are easily wrong: kinks, odd outputs, data that change, casts, mistakes of users' own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distsim.errors import ConfigError
from trainers.accumulation import Report, examine
from trainers.accumulation.__main__ import main
from trainers.workload import Workload, load

EFFECTIVE = 8


def examined(model: Any, loss: Callable[..., Tensor] = planted.cross_entropy, **more: Any) -> Report:
    made: dict[str, Any] = {"data": planted.rows(), "model": model, "loss": loss}
    return examine(Workload(**(made | more)), effective_batch=EFFECTIVE)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


class Bump(nn.Module):
    """Rounds micro-batches otherwise than the full batch, in float32."""

    def forward(self, given: Tensor) -> Tensor:
        off = torch.finfo(torch.float32).eps if given.dtype == torch.float32 and len(given) < EFFECTIVE else 0.0
        return given * (1 + off)


class Kinked(nn.Module):
    """Its ReLU is given what rounding makes zero, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bump, self.last = nn.Linear(planted.WIDTH, 8), Bump(), nn.Linear(8, planted.CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        out: Tensor = self.last(torch.relu(self.bump(hidden) - hidden.detach()) + hidden.tanh())
        return out


def test_kinks_are_told_from_errors() -> None:
    report = examined(Kinked())
    assert report.equivalent, report.text()
    assert [pair.kinks for pair in report.pairs] == [False] * 5 + [True] * 4 + [False]
    assert "kinks only" in report.text() and not report.culprits


def coarse(gradient: Tensor) -> Tensor:
    return gradient.bfloat16().to(gradient.dtype) if gradient.dtype == torch.float32 else gradient


def test_gradients_that_are_wrong_in_float32_alone_are_no_kinks() -> None:
    model = planted.mlp()
    model.get_parameter("0.weight").register_hook(coarse)  # type: ignore[no-untyped-call]
    report = examined(model)
    assert [pair.equivalent for pair in report.pairs] == [True] * 5 + [False] * 4 + [True], report.text()
    assert not any(pair.kinks for pair in report.pairs)


def sloppy(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], accumulate: int) -> None:
    """Adds float32 gradients up in bfloat16."""
    for first in range(0, len(batches), accumulate):
        sums: list[Tensor] = []
        for batch in batches[first : first + accumulate]:
            optimizer.zero_grad()
            share = len(batch[0]) / EFFECTIVE
            (planted.mean_of(model, batch) * share).backward()  # type: ignore[no-untyped-call]
            found = [coarse(each.grad) for each in model.parameters() if each.grad is not None]
            sums = [coarse(one + other) for one, other in zip(sums, found, strict=True)] if sums else found
        for each, total in zip(model.parameters(), sums, strict=True):
            each.grad = total
        optimizer.step()


def test_a_loop_that_is_wrong_in_float32_alone_has_no_kinks() -> None:
    report = examined(planted.mlp(), loop=sloppy)
    assert [pair.equivalent for pair in report.pairs] == [True] * 5 + [False] * 5, report.text()


class Wrapped(nn.Module):
    """Returns what `change` makes of the logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.change = planted.mlp(), change

    def forward(self, rows: Tensor) -> Any:
        return self.change(self.body(rows))


def masked(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.arange(planted.CLASSES) == planted.CLASSES - 1, -torch.inf)


def of(logits: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: planted.Batch) -> Tensor:
        return functional.cross_entropy(logits(model(batch[0])), batch[1] % (planted.CLASSES - 1), reduction="sum")

    return loss


ODD: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "with its own mean": (lambda logits: {"loss": logits.mean(), "logits": logits}, lambda out: out["logits"]),
    "time first": (
        lambda logits: torch.stack([logits, 2 * logits]).flatten(0, 1),
        lambda out: out.unflatten(0, (2, -1))[1],
    ),
    "infinite": (masked, lambda out: out),
    "nothing of samples": (lambda logits: [logits.shape, logits], lambda out: out[1]),
}


@pytest.mark.parametrize("name", ODD)
def test_whatever_a_model_returns_its_samples_are_compared(name: str) -> None:
    change, logits = ODD[name]
    report = examined(Wrapped(change), of(logits))
    assert report.equivalent, report.text()
    assert all(pair.logits is not None and pair.logits.norm > 0 for pair in report.pairs)


def test_a_loss_in_float32_is_not_blamed_for_what_others_do() -> None:
    class Centred(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows - rows.mean(0)

    report = examined(planted.mlp(Centred()), of(lambda out: out.float()))
    assert [cause.module for cause in report.culprits] == ["2"] and report.coarsest == "float32"
    report = examined(planted.mlp(), of(lambda out: out.float()))
    assert report.equivalent and "computes in float32" in report.text()


def test_autocast_has_the_tolerances_of_what_it_computes_in() -> None:
    def loss(model: nn.Module, batch: planted.Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return planted.cross_entropy(model, batch)

    report = examined(planted.mlp(), loss)
    assert report.equivalent and "float32: rounding may change this gradient" in report.text()


class Noisy(list[planted.Batch]):
    """Samples that are different each time that they are read."""

    def __getitem__(self, index: Any) -> Any:
        rows, label = super().__getitem__(index)
        return rows + torch.randn(planted.WIDTH), label


def test_data_that_change_are_read_once() -> None:
    report = examined(planted.mlp(), data=Noisy(planted.rows()))
    assert report.equivalent and max(pair.width for pair in report.pairs) < 1e-5
    assert not examined(planted.mlp(nn.BatchNorm1d(8)), data=Noisy(planted.rows())).equivalent


def test_random_numbers_of_python_repeat_too() -> None:
    report = examined(Wrapped(lambda logits: logits * random.random()))
    assert not report.equivalent and max(pair.width for pair in report.pairs) < 1e-5


def test_a_batch_that_is_something_else_each_time_cannot_be_tested() -> None:
    seen: list[int] = []

    def counting(logits: Tensor) -> Tensor:
        seen.append(1)
        return logits * len(seen)

    with pytest.raises(ConfigError, match="gives something else when it runs again"):
        examined(Wrapped(counting))


def test_a_model_gets_back_what_it_had() -> None:
    model = planted.mlp().double()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    examined(model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert {each.dtype for each in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("share", [1e-2, 1e-6, 1e-9])
def test_small_errors_of_a_loss_are_found_and_named(share: float) -> None:
    def loss(model: nn.Module, batch: planted.Batch) -> Tensor:
        logits = model(batch[0])
        more: Tensor = share * len(logits) * logits.softmax(1).mean(0).square().sum()
        return functional.cross_entropy(logits, batch[1], reduction="sum") + more

    (cause,) = examined(planted.mlp(), loss).culprits
    assert "depends on the others in the batch" in cause.reason and "trainers.across" in (cause.remedy or "")


def failing(*_: object) -> Tensor:
    raise RuntimeError("my own mistake")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "collate": ({"collate": failing}, r"making a batch of 8 samples: RuntimeError: my own mistake \(.*test_accum"),
    "loss": ({"loss": failing}, r"the full batch in float64: RuntimeError: my own mistake"),
    "vector": ({"loss": lambda model, batch: model(batch[0])}, r"scalar tensor .* not a tensor of shape \(8, 3\)"),
    "number": ({"loss": lambda model, batch: 1.0}, "scalar tensor .* not float"),
    "no gradient": ({"loss": lambda model, batch: model(batch[0]).sum().detach()}, "depends on no parameter"),
    "nothing counts": ({"count": lambda batch: 0}, "nothing counts"),
    "count": ({"count": lambda batch: None}, "count of a batch must be a whole number, not None"),
    "not finite": ({"loss": lambda model, batch: model(batch[0]).sum() * torch.nan}, "are not finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_of_users_are_named(name: str) -> None:
    change, expected = WRONG[name]
    with pytest.raises(ConfigError, match=expected):
        examined(planted.mlp(), **change)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model is compiled"):
        examined(torch.compile(planted.mlp(), backend="eager"))
    workload = planted.plain()
    with pytest.raises(ConfigError, match="formats must be float64 or float32, not 'float16'"):
        examine(workload, formats=["float16"])
    with pytest.raises(ConfigError, match="must have at least one size"):
        examine(workload, micro_batches=[])


def lazy() -> Workload:
    print("building")
    return Workload(model=nn.LazyLinear(3), data=planted.rows(), loss=planted.cross_entropy)


def printing() -> Workload:
    print("building")
    return planted.plain()


def test_models_without_a_size_are_refused_when_they_are_loaded() -> None:
    with pytest.raises(ConfigError, match="has no size before the model has run once"):
        load("test_accumulation_corners:lazy", {}, 0, "float32")


def test_what_a_workload_prints_is_not_in_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["--factory", "test_accumulation_corners:printing", "--effective-batch", "4", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("{") and "building" in printed.err


@pytest.mark.parametrize("flag", ["--figure=f.txt", "--out=f.txt", "--figure=.png/"])
def test_files_are_checked_before_anything_runs(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workload", "mlp", flag]) == 2
    assert "must be a file that ends in" in capsys.readouterr().err
