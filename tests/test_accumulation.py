"""The accumulation test as a whole: what is equivalent passes, what is planted is found and named.

Oracles: micro-batches that count alike, layers that look at one sample, and losses that are sums are equivalent by
algebra; each planted workload breaks exactly one of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from processes import run as run_process
from processes import torchrun
from torch import nn

from distsim.errors import ConfigError
from trainers.accumulation import Report, examine
from trainers.accumulation.__main__ import main
from trainers.accumulation.effective import Pair, pairs, parts
from trainers.workload import Workload
from trainers.workloads import language_model, resnet

pytestmark = pytest.mark.timeout(120)


def seeded(build: Callable[..., Workload], **options: Any) -> Workload:
    """Build with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(**options)


def small_resnet(norm: str, depth: int = 18) -> Workload:
    return seeded(resnet.build, depth=depth, width=8, norm=norm, samples=64)


def lines(dropout: float = 0.0) -> Workload:
    """A transformer on lines of very different lengths."""
    return seeded(language_model.build, layers=1, width=32, context=24, lines=True, dropout=dropout)


def blamed(report: Report) -> dict[str, str]:
    """Module -> why."""
    return {cause.module: cause.reason for cause in report.culprits}


EQUIVALENT: dict[str, Callable[[], Workload]] = {
    "sums": planted.plain,
    "means that say so": planted.averaging,
    "sentences": planted.sentences,
    "means over words": lambda: planted.sentences(reduction="mean"),
    "group norm": lambda: small_resnet("group"),
    "transformer": lines,
    "own loop": lambda: planted.plain(loop="weighted"),
    "own loop, words": lambda: planted.sentences(loop="weighted"),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_what_is_equivalent_passes_in_both_formats(name: str) -> None:
    report = examine(seeded(EQUIVALENT[name]), effective_batch=8)
    assert report.equivalent, report.text()
    assert [(each.format, each.micro_batch, each.steps) for each in report.pairs] == [
        (form, size, -(-8 // size)) for form in ("float64", "float32") for size in (1, 2, 3, 4, 8)
    ]
    for each in report.pairs:
        assert each.logits is not None and each.gradient is not None
        assert each.logits.norm > 0 and each.gradient.norm > 0
    assert not report.culprits and "NOT" not in report.text()


def test_all_pairs_of_32_are_tested() -> None:
    found = pairs(32, 1)
    assert [each for each in found if each.micro_batch * each.steps == 32] == [
        Pair(1, 32),
        Pair(2, 16),
        Pair(4, 8),
        Pair(8, 4),
        Pair(16, 2),
        Pair(32, 1),
    ]
    assert [each for each in found if each.micro_batch * each.steps != 32] == [Pair(3, 11)]


@pytest.mark.parametrize("effective", [1, 2, 7, 12, 32])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sample_is_in_one_micro_batch(effective: int, ranks: int) -> None:
    if effective % ranks:
        with pytest.raises(ConfigError, match="cannot be shared out evenly"):
            pairs(effective, ranks)
        return
    for pair in pairs(effective, ranks):
        cut = [part for rank in range(ranks) for part in parts(pair, effective, ranks, rank)]
        samples = sorted(sample for part in cut for sample in range(part.first, part.first + part.size))
        assert samples == list(range(effective))
        assert max(part.size for part in cut) == pair.micro_batch
        assert max(len(parts(pair, effective, ranks, rank)) for rank in range(ranks)) == pair.steps


def test_batch_normalisation_is_blamed_module_by_module() -> None:
    workload = small_resnet("batch")
    report = examine(workload, effective_batch=8)
    norms = {name for name, module in workload.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert not report.equivalent and blamed(report).keys() == norms
    assert all("variance of the micro-batch" in reason for reason in blamed(report).values())
    by_pair = {(each.format, each.micro_batch): each for each in report.pairs}
    assert by_pair["float64", 8].equivalent and not by_pair["float64", 4].equivalent
    assert by_pair["float64", 4].gradient is not None and by_pair["float64", 4].gradient.relative > 0.05


def test_group_normalisation_in_its_place_is_the_remedy() -> None:
    assert examine(small_resnet("batch"), effective_batch=8, batch_norm="group").equivalent
    with pytest.raises(ConfigError, match="--batch-norm group: the model has no batch normalisation"):
        examine(small_resnet("group"), batch_norm="group")


@pytest.mark.parametrize("plant", [planted.dropout, lambda: lines(dropout=0.2)])
def test_dropout_is_blamed_and_the_rest_can_be_tested_without(plant: Callable[[], Workload]) -> None:
    report = examine(seeded(plant), effective_batch=8)
    assert not report.equivalent and report.culprits
    assert all("random" in reason for reason in blamed(report).values())
    assert examine(seeded(plant), effective_batch=8, without_dropout=True).equivalent


@pytest.mark.parametrize("plant", [planted.contrastive, planted.balance])
def test_a_loss_across_the_batch_is_blamed(plant: Callable[[], Workload]) -> None:
    report = examine(seeded(plant), effective_batch=8)
    assert not report.equivalent
    (cause,) = report.culprits
    assert cause.where == "loss" and cause.module == ""
    assert not any(each.equivalent for each in report.pairs if each.micro_batch < 8)
    assert all(each.equivalent for each in report.pairs if each.micro_batch == 8)


def test_means_of_micro_batches_that_count_unequally_are_found() -> None:
    report = examine(seeded(planted.sentences), effective_batch=8, normalise="micro-batch")
    assert not report.equivalent
    (cause,) = report.culprits
    assert cause.where == "loop" and "means" in cause.reason and cause.remedy is not None
    assert report.weights is not None and math.isclose(sum(report.weights.expected), 1.0)
    assert len(set(report.weights.found)) == 1 != len(set(report.weights.expected))


def test_means_of_micro_batches_that_count_alike_are_right() -> None:
    """But for the pair whose last micro-batch is smaller."""
    report = examine(seeded(planted.plain), effective_batch=8, normalise="micro-batch")
    assert {each.micro_batch for each in report.pairs if not each.equivalent} == {3}
    assert examine(
        seeded(planted.plain), effective_batch=8, normalise="micro-batch", micro_batches=[1, 2, 4]
    ).equivalent


def test_a_mean_over_something_else_than_the_count_is_found() -> None:
    report = examine(seeded(planted.sentences, reduction="mean", count="sentences"), effective_batch=8)
    assert not report.equivalent
    (cause,) = report.culprits
    assert cause.where == "loss" and "weighs" in cause.reason and "count" in (cause.remedy or "")


@pytest.mark.parametrize(
    ("loop", "words"),
    [("never zeroed", "zero_grad"), ("not divided", "divided"), ("steps always", "step")],
)
def test_an_own_loops_mistake_is_found(loop: str, words: str) -> None:
    report = examine(seeded(planted.plain, loop=loop), effective_batch=8)
    assert not report.equivalent and report.loop == "own"
    assert [cause.where for cause in report.culprits] == ["loop"]
    assert words in report.culprits[0].reason, report.text()


def test_the_textbook_loop_is_right_only_where_micro_batches_count_alike() -> None:
    report = examine(seeded(planted.plain, loop="textbook"), effective_batch=8)
    assert {each.micro_batch for each in report.pairs if not each.equivalent} == {3}  # 3 + 3 + 2
    report = examine(seeded(planted.sentences, loop="textbook"), effective_batch=8)
    assert {each.micro_batch for each in report.pairs if not each.equivalent} == {1, 2, 3, 4}


def test_wrong_gradients_of_one_layer_are_found_in_its_gradients() -> None:
    """A hook that clips each micro-batch's gradient, as some loops do."""
    workload = seeded(planted.plain)
    weight = workload.model.get_parameter("0.weight")
    weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))  # type: ignore[no-untyped-call]
    report = examine(workload, effective_batch=8)
    wrong = {name for each in report.pairs for name, difference in each.gradients.items() if not difference.equivalent}
    assert wrong == {"0.weight"} and blamed(report).keys() == {"0"}


def test_a_micro_batch_that_cannot_be_computed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    report = examine(seeded(planted.batch_norm), effective_batch=8, micro_batches=[1, 4])
    (single, *_) = report.pairs
    assert single.error is not None and "more than 1 value per channel" in single.error
    assert "more than 1 value per channel" in report.text() and not report.equivalent


def test_tolerances_scale_with_the_formats() -> None:
    """Linear in the unit roundoff: 2^29 between the two."""
    report = examine(seeded(planted.plain), effective_batch=8, micro_batches=[2])
    wide, narrow = report.pairs
    for name, each in wide.gradients.items():
        assert math.isclose(narrow.gradients[name].tolerance / each.tolerance, 2**29, rel_tol=1e-12)
        assert each.tolerance < 1e-13 * each.norm


def test_the_model_is_left_as_it_was() -> None:
    workload = seeded(planted.batch_norm)
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    drawn = torch.get_rng_state()
    examine(workload, effective_batch=8)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, value in workload.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in workload.model.parameters())
    assert not any(module._forward_hooks for module in workload.model.modules())


def test_json_has_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    code = main(["--factory", "planted:batch_norm", "--effective-batch", "8", "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert code == 1 and report["equivalent"] is False and report["effective_batch"] == 8
    assert [cause["module"] for cause in report["culprits"]] == ["2"]
    first = report["pairs"][1]["gradients"][0]
    assert first.keys() == {"name", "norm", "difference", "tolerance"} and first["difference"] > first["tolerance"]
    assert main(["--factory", "planted:plain", "--effective-batch", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equivalent"] is True


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--factory", "planted:nothing"], "nothing does not exist in planted"),
        (["--factory", "plain"], "MODULE:FUNCTION"),
        (["--factory", "planted:plain", "--effective-batch", "0"], "--effective-batch must be at least 1, not 0"),
        (["--factory", "planted:plain", "--effective-batch", "99"], "has only 48 samples"),
        (["--factory", "planted:plain", "--micro-batches", "2,x"], "--micro-batches must be whole numbers"),
        (["--factory", "planted:plain", "--micro-batches", "40"], "--micro-batches must be from 1 to 32"),
        (["--factory", "planted:plain", "--formats", "float16"], "--formats must be float64 or float32"),
        (["--factory", "planted:plain", "--normalise", "steps"], "--normalise must be count or micro-batch"),
        (["--factory", "planted:plain", "--batch-norm", "group"], "the model has no batch normalisation"),
        (["--factory", "planted:plain", "--options", "loop=textbook", "--normalise", "micro-batch"], "loop of its own"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err and "Traceback" not in printed.err


LANGUAGE = ("--workload", "language-model", "--options", "layers=1,width=32,context=24,lines=true")


@pytest.mark.parametrize("normalise", ["count", "micro-batch"])
def test_on_four_ranks_tokens_count(normalise: str, tmp_path: Path) -> None:
    flags = ["--effective-batch", "16", "--normalise", normalise, "--json"]
    ran = run_process(torchrun(4, "-m", "trainers.accumulation", *LANGUAGE, *flags), tmp_path)
    report = json.loads(ran.out)
    assert report["ranks"] == 4 and not ran.left
    assert report["equivalent"] == (normalise == "count") == (ran.code == 0)
    assert [(each["micro_batch"], each["steps"]) for each in report["pairs"][:4]] == [(1, 4), (2, 2), (3, 2), (4, 1)]
    assert [cause["where"] for cause in report["culprits"]] == ([] if normalise == "count" else ["loop"])


def test_synchronised_batch_norm_helps_between_ranks_and_not_in_time(tmp_path: Path) -> None:
    flags = ["--workload", "resnet", "--options", "depth=18,width=8,samples=64", "--effective-batch", "8"]
    both = [*flags, "--formats", "float64", "--micro-batches", "1,2,4", "--json"]
    kept, together = (
        json.loads(run_process(torchrun(2, "-m", "trainers.accumulation", *both, "--batch-norm", how), tmp_path).out)
        for how in ("keep", "sync")
    )
    assert [each["equivalent"] for each in kept["pairs"]] == [False, False, False]
    assert [(each["steps"], each["equivalent"]) for each in together["pairs"]] == [(4, False), (2, False), (1, True)]


def test_a_report_of_a_replaced_format_is_still_a_report() -> None:
    report = examine(seeded(planted.plain), effective_batch=4, formats=["float32"], name="mine", options={"a": 1})
    assert report.formats == ("float32",) and "mine (a=1)" in report.text()
    assert not replace(report, pairs=(replace(report.pairs[0], error="x"),)).equivalent
