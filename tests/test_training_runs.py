"""What belongs to a training run besides the exchange: half precision, torch.compile, evaluation, metrics, a file.

All of it ran on two real processes.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import torch
from plain import Floats
from processes import Seen, batch

from trainers.workloads import language_model

pytestmark = pytest.mark.timeout(180)

WORKERS, BATCH_SIZE, STEPS, SEED = 2, 4, 6, 5
SAMPLES = WORKERS * BATCH_SIZE
RATE, FINAL = 0.01, 0.1
BYTES = bytes(range(256)) * 22 + b"."
"""352 samples of 16 bytes, none of them shorter: a step counts 128 of them, and dividing by that is exact."""
RATES = {"bf16": 1.0, "fp16": 1.0, "overflow": 0.1}
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
"""What torch.compile needs on a CPU."""
PATIENCE_S = 300
"""How long compiling may take on a machine that has other things to do: by itself some 20 s."""

YAML = """
strategy: halving-doubling
options: {layers: 1, width: 32, context: 16, text: text.bin}
steps: 6
batch_size: 4
optimizer: "AdamW:lr=0.01,weight_decay=0.1"
schedule: cosine:final=0.1
clip_norm: 1.5
dtype: float64
bucket_mb: 0.04
overlap: false
transport: torch
evaluate_every: 3
seed: 5
"""


class Runs:
    """The runs of one torchrun on a text of our own."""

    def __init__(self, folder: Path, compiled: bool = False) -> None:
        self.folder = folder
        (folder / "text.bin").write_bytes(BYTES)
        (folder / "run.yaml").write_text(YAML)
        self.build = partial(language_model.build, layers=1, width=32, context=16, text=str(folder / "text.bin"))
        options = ("--options", "layers=1,width=32,context=16,text=text.bin")
        sgd = ("--optimizer", f"SGD:lr={RATES['fp16']},momentum=0.9")
        numbers = ("--steps", str(STEPS), "--batch-size", str(BATCH_SIZE), "--seed", str(SEED))
        common = (*options, *numbers, "--json")
        adamw = ("--optimizer", f"AdamW:lr={RATE},weight_decay=0.1", "--schedule", f"cosine:final={FINAL}")
        described = "--dtype float64 --clip-norm 1.5 --bucket-mb 0.04 --no-overlap --transport torch --evaluate-every 3"
        overflow = f"--optimizer SGD:lr={RATES['overflow']},momentum=0.9 --batch-size 1"
        overflow += " --options layers=1,width=32,context=1,text=text.bin"
        commands: dict[str, list[str]] = {
            "bf16": ["--strategy", "ring", *common, *sgd, "--precision", "bf16"],
            "fp16": ["--strategy", "ring", *common, *sgd, "--precision", "fp16"],
            "overflow": ["--strategy", "all-to-all", *common, "--precision", "fp16", *overflow.split()],
            "flags": ["--strategy", "halving-doubling", *common, *adamw, *described.split()],
            "file": ["run.yaml", "--json"],
            "file, other seed": ["run.yaml", "--json", "--seed", "6"],
        }
        if compiled:
            ring = ["--strategy", "ring", *common]
            commands = {"eager": ring, "compiled": [*ring, "--compile"]}
        lines = [[*command, "--out", str(folder / name)] for name, command in commands.items()]
        seen = batch(WORKERS, folder, lines, timeout_s=PATIENCE_S if compiled else 90)
        self.seen: dict[str, list[Seen]] = dict(zip(commands, seen, strict=True))

    def record(self, name: str) -> dict[str, Any]:
        assert [rank.code for rank in self.seen[name]] == [0] * WORKERS, self.seen[name]
        record: dict[str, Any] = json.loads(self.seen[name][0].out)
        return record

    def parameters(self, name: str) -> Floats:
        """Of all ranks, which have the same bits."""
        self.record(name)
        assert len({rank.parameters.tobytes() for rank in self.seen[name]}) == 1
        parameters: Floats = self.seen[name][0].parameters
        return parameters

    def metrics(self, name: str) -> list[dict[str, Any]]:
        strategy = self.record(name)["strategy"]
        return [
            json.loads(line) for line in (self.folder / name / f"{strategy}.metrics.jsonl").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def distance(one: Floats, other: Floats) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("name", ("bf16", "fp16", "overflow"))
def test_half_precision_is_autocast_and_a_gradient_scaler(runs: Runs, name: str) -> None:
    """Held against torch.autocast and torch.amp.GradScaler in one process.

    Parameters and gradients are float32 on both sides, and a step's gradient is the sum of the same two parts, each
    rounded to half precision in the same way: what differs is rounding in the order of float32's 6e-8. It may tip a
    value over to the next one in half precision, 5e-4 (fp16) or 4e-3 (bf16) away; of the 21,472 few.

    The overflow: a step counts two tokens only, whose gradient, times 2**16, half precision has no room for.
    """
    autocast = torch.bfloat16 if name == "bf16" else torch.float16
    build, samples = runs.build, SAMPLES
    if name == "overflow":
        build, samples = partial(runs.build, context=1), WORKERS
    chosen = plain.sgd(RATES[name])
    plainly = partial(plain.train, build, samples, STEPS, seed=SEED, optimizer=chosen, dtype=torch.float32)
    wanted, record = plainly(autocast=autocast, parts=WORKERS), runs.record(name)
    assert distance(runs.parameters(name), wanted.parameters) <= 1e-5
    assert record["losses"] == pytest.approx(wanted.losses, rel=1e-5)
    assert distance(plainly().parameters, wanted.parameters) > 1e-4  # full precision would not pass for it
    skipped = [line["skipped"] for line in runs.metrics(name) if line["event"] == "step"]
    assert skipped == wanted.skipped
    assert any(skipped) == (name == "overflow")
    assert not all(skipped)


@pytest.mark.timeout(PATIENCE_S + 30)
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler on a CPU, and there is none here")
def test_a_compiled_model_trains_as_it_does_uncompiled(tmp_path: Path) -> None:
    """To a few roundings of float32: compiled kernels sum in another order."""
    runs = Runs(tmp_path, compiled=True)
    compiled, eager = runs.record("compiled"), runs.record("eager")
    assert (compiled["configuration"]["compile"], eager["configuration"]["compile"]) == (True, False)
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert distance(runs.parameters("compiled"), runs.parameters("eager")) <= 1e-5
    assert list(tmp_path.glob("inductor/**/*.so"))  # something was compiled


@pytest.fixture(scope="module")
def described(runs: Runs) -> plain.Trained:
    """Plain training of what the file describes."""

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 1, eta_min=FINAL * RATE)

    plainly = partial(plain.train, runs.build, SAMPLES, STEPS, seed=SEED, optimizer=adamw, schedule=cosine)
    return plainly(clip=1.5, evaluate_every=3)


def test_metrics_have_a_line_for_each_step_and_each_evaluation(runs: Runs, described: plain.Trained) -> None:
    record, lines = runs.record("flags"), runs.metrics("flags")
    assert [(line["event"], line["step"]) for line in lines] == [
        *(("step", step) for step in (0, 1, 2)),
        ("evaluation", 2),
        *(("step", step) for step in (3, 4, 5)),
        ("evaluation", 5),
    ]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["loss"] for line in steps] == record["losses"]
    assert record["losses"] == pytest.approx(described.losses, rel=1e-12)
    assert [line["count"] for line in steps] == described.counts
    assert [line["learning_rate"] for line in steps] == pytest.approx(described.rates, rel=1e-12)
    assert [line["grad_norm"] for line in steps] == pytest.approx(described.norms, rel=1e-12)
    assert [line["skipped"] for line in steps] == [False] * STEPS
    for line in steps:
        assert line["tokens_per_s"] == pytest.approx(line["count"] / line["step_s"])
        assert 0 < line["exchange_s"] <= line["exposed_s"] <= line["step_s"]  # none of it is hidden: --no-overlap
        assert line["mfu"] > 0


def test_an_evaluation_is_the_mean_over_all_that_was_held_out(runs: Runs, described: plain.Trained) -> None:
    """Seven samples, which two ranks in batches of four cannot share out evenly."""
    evaluations = [line for line in runs.metrics("flags") if line["event"] == "evaluation"]
    assert [line["count"] for line in evaluations] == [7 * 16] * 2
    assert [line["loss"] for line in evaluations] == pytest.approx(described.evaluations, rel=1e-12)


def test_a_file_and_flags_describe_the_same_run(runs: Runs, described: plain.Trained) -> None:
    file, flags = runs.record("file"), runs.record("flags")
    assert file["configuration"] == flags["configuration"]
    assert file["configuration"]["transport"] == "torch"
    assert (file["losses"], file["totals"], file["schedule_digest"]) == (
        *(flags["losses"], flags["totals"], flags["schedule_digest"]),
    )
    assert runs.parameters("file").tobytes() == runs.parameters("flags").tobytes()
    assert distance(runs.parameters("file"), described.parameters) <= 1e-12
    other = runs.record("file, other seed")
    assert other["configuration"] == {
        **file["configuration"],
        "seed": 6,
        "parameters_digest": other["configuration"]["parameters_digest"],
    }
    assert other["losses"] != file["losses"]
