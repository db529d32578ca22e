"""Training within a memory budget is training without one: to the bit, message by message, and nothing is left."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import TRAINERS, Seen, batch, run, short_folder, torchrun

pytestmark = pytest.mark.timeout(240)

STEPS, ACCUMULATE, LAYERS = 3, 2, 4
OPTIONS = f"layers={LAYERS},width=64,context=64,dropout=0.1"
TRAINING = [
    *("--workload", "cheap:build"),
    *("--options", OPTIONS, "--steps", str(STEPS), "--batch-size", "2", "--accumulate", str(ACCUMULATE)),
    *("--optimizer", "SGD:lr=0.1", "--bucket-mb", "0.1", "--evaluate-every", "2", "--json"),
]
TIGHT = "2MB"
"""To keep everything takes 2.4 MB in half precision and 3.4 MB else; a layer alone does with 1.2 MB."""
CASES = {
    "ring": ["--strategy", "ring"],
    "no overlap": ["--strategy", "ring:segments=2", "--no-overlap"],
    "bf16": ["--strategy", "ring:channels=2", "--precision", "bf16"],
    "library": ["--strategy", "ring", "--transport", "library"],
    "halving-doubling": ["--strategy", "halving-doubling"],
    "all-to-all": ["--strategy", "all-to-all"],
    "tree": ["--strategy", "double-tree:segments=2", "--transport", "torch"],
    "colocated": ["--strategy", "parameter-server:servers=2,placement=colocated", "--clip-norm", "1.0"],
}
COPIED = {"ring": "spool", "no overlap": "host", "bf16": "spool", "colocated": "spool"}
"""Where these offload to, as well."""
RUNS = [(name, way) for name in CASES for way in ("plain", "recomputed", *(["copied"] if name in COPIED else []))]

CHEAP = """
'''The language model, on a machine where copies cost next to nothing: then plans do copy, if they may.'''

from trainers import profile
from trainers.workloads.language_model import build

profile._copies = lambda *_: (lambda count: 1e-12 * count, lambda count: 1e-12 * count)
"""
STRANGER = """
from torch import nn
from trainers import Workload
from trainers.workloads import language_model

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, inputs):
        return self.encoder(inputs)

def build(layers=None):
    import torch
    return Workload(model=Model(), data=list(torch.ones(64, 8)), loss=lambda model, batch: model(batch).sum(),
                    layers=layers)
"""
RING = ["--strategy", "ring", *TRAINING, "--workload", "language-model"]
REFUSED: dict[str, tuple[list[str], str]] = {
    "too little": (
        [*RING, "--memory-budget", "10kB"],
        r"--memory-budget 10000: no plan for the 4 layers fits into 10 kB; the least that is feasible is \d+ bytes "
        r"\([\d.]+ [kM]B\)",
    ),
    "no sequence": (
        ["--strategy", "ring", "--workload", "stranger:build", "--memory-budget", "1MB"],
        r"--memory-budget: a memory plan needs an nn.Sequential, and the model is a Model; give Workload layers=, the "
        r"name of one in it; its nn.Sequential parts: encoder",
    ),
    "no such part": (
        ["--strategy", "ring", "--workload", "stranger:build", "--options", "layers=enc", "--memory-budget", "1MB"],
        r"--memory-budget: the workload's layers='enc' are no part of its model; did you mean 'encoder'\?",
    ),
    "no folder": (
        [*RING, "--memory-budget", TIGHT, "--offload", "nowhere"],
        r"nowhere: cannot make a file for offloaded tensors here: No such file or directory",
    ),
    "no two plans": (
        [*RING, "--memory-budget", "3MB"],
        r"ranks disagree; nothing has been exchanged:",
    ),
    "compiled": ([*RING, "--memory-budget", TIGHT, "--compile"], r"--memory-budget runs layers one by one, .*"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What two ranks have seen of each run, and the folder."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "spool").mkdir()
    (folder / "cheap.py").write_text(CHEAP)
    (folder / "stranger.py").write_text(STRANGER)
    commands: dict[tuple[str, str], Any] = {("refused", name): argv for name, (argv, _) in REFUSED.items()}
    commands["refused", "no two plans"] = [[*RING, "--memory-budget", TIGHT], REFUSED["no two plans"][0]]
    for name, way in RUNS:
        flags = [] if way == "plain" else ["--memory-budget", TIGHT]
        flags += ["--offload", COPIED[name]] if way == "copied" else []
        commands[name, way] = [*CASES[name], *TRAINING, *flags, "--out", f"out/{name}/{way}"]
    resnet = [
        "--strategy",
        "ring",
        "--workload",
        "resnet",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--evaluate-every",
        "2",
    ]
    commands["resnet", "plain"] = [*resnet, "--out", "out/resnet/plain", "--json"]
    commands["resnet", "planned"] = [*resnet, "--out", "out/resnet/planned", "--json", "--memory-budget", "20MB"]
    seen = batch(2, folder, list(commands.values()), timeout_s=200)
    return {**dict(zip(commands, seen, strict=True)), "folder": folder}


def record(seen: list[Seen]) -> dict[str, Any]:
    assert [rank.code for rank in seen] == [0, 0], seen
    found: dict[str, Any] = json.loads(seen[0].out)
    return found


def logged(folder: Path) -> list[tuple[str, float]]:
    """What the metrics say of each step and evaluation: which of them it is, and the loss."""
    (file,) = folder.glob("*.metrics.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    return [(event["event"], event["loss"]) for event in events]


@pytest.mark.parametrize(("name", "way"), [each for each in RUNS if each[1] != "plain"])
def test_a_budget_changes_neither_results_nor_messages(two: dict[Any, Any], name: str, way: str) -> None:
    """With dropout, accumulated micro-batches, several buckets and evaluations in between."""
    plain, planned = (record(two[name, each]) for each in ("plain", way))
    for one, other in zip(two[name, "plain"], two[name, way], strict=True):
        assert np.array_equal(one.parameters, other.parameters)
    for key in ("losses", "totals", "schedule_digest"):
        assert planned[key] == plain[key]
    assert planned["configuration"]["parameters_digest"] == plain["configuration"]["parameters_digest"]
    counts = [[(each["name"], each["messages"], each["bytes"]) for each in of["parts"]] for of in (plain, planned)]
    assert counts[0] == counts[1]
    seen = logged(two["folder"] / "out" / name / "plain")
    assert seen == logged(two["folder"] / "out" / name / way)
    assert [event for event, _ in seen] == ["step", "step", "evaluation", "step"]


@pytest.mark.parametrize(("name", "way"), [each for each in RUNS if each[1] != "plain"])
def test_what_has_run_is_what_was_planned(two: dict[Any, Any], name: str, way: str) -> None:
    """Evaluations run as ever: forwards are the plan's, for each micro-batch."""
    found = record(two[name, way])
    memory, passes = found["environment"]["memory"], STEPS * ACCUMULATE
    words = [word.partition("_") for word in memory["plan"].split()]
    ran = [layer for op, _, layer in words if op in ("F", "Fall")]
    wrote = [layer for op, _, layer in words if op in ("W", "Wall")]
    read = [layer for op, _, layer in words if op in ("R", "Rall")]
    assert (memory["forwards"], memory["stores"], memory["loads"]) == tuple(
        passes * len(each) for each in (ran, wrote, read)
    )
    assert memory["layers"] == LAYERS == len(set(ran))
    assert memory["recomputed"] == len({layer for layer in ran if ran.count(layer) > 1})
    assert memory["copied"] == len(set(wrote))
    assert (memory["copied"] > 0) == (way == "copied") == (memory["written_bytes"] > 0)
    assert memory["recomputed"] > 0 or way == "copied"
    assert 0 < memory["planned_bytes"] <= found["configuration"]["memory_budget"] == 2_000_000
    assert memory["predicted_time_s"] >= memory["plain_time_s"] * (1 - 1e-12) > 0


def test_statistics_of_batch_normalisation_are_updated_once(two: dict[Any, Any]) -> None:
    """The loss of an evaluation follows from them; those of training do not."""
    assert record(two["resnet", "planned"])["environment"]["memory"]["recomputed"] > 0
    for one, other in zip(two["resnet", "plain"], two["resnet", "planned"], strict=True):
        assert np.array_equal(one.parameters, other.parameters)
    seen = logged(two["folder"] / "out" / "resnet" / "plain")
    assert seen == logged(two["folder"] / "out" / "resnet" / "planned")
    assert [event for event, _ in seen] == ["step", "step", "evaluation"]


def test_a_plain_run_says_nothing_of_memory(two: dict[Any, Any]) -> None:
    assert "memory" not in record(two["ring", "plain"])["environment"]


def test_offloading_leaves_nothing_in_the_folder(two: dict[Any, Any]) -> None:
    assert list((two["folder"] / "spool").iterdir()) == []


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_message_before_anything_is_exchanged(two: dict[Any, Any], case: str) -> None:
    first, second = two["refused", case]
    assert (first.code, second.code, first.connected, second.connected) == (2, 2, False, False)
    assert (first.out, second.out, second.err) == ("", "", "")
    (message,) = re.findall("trainers: error: (.*)", first.err)
    assert re.fullmatch(REFUSED[case][1], message)
    if case == "no two plans":
        (line,) = first.err.splitlines()[1:]
        assert line == "  rank 1: configuration: memory_budget is 3000000, on rank 0 it is 2000000"


FAILS = """
import os, sys
from distsim.errors import DistsimError
from trainers.__main__ import main
from trainers.workloads import language_model

loss, calls = language_model.loss, []

def broken(model, batch):
    calls.append(1)
    if len(calls) == 5:
        raise DistsimError("stumbled")
    return loss(model, batch)

if os.environ["RANK"] == "1":
    language_model.loss = broken
sys.exit(main())
"""


def test_a_rank_that_fails_while_others_offload_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FAILS)
    (tmp_path / "cheap.py").write_text(CHEAP)
    (tmp_path / "spool").mkdir()
    flags = ["--strategy", "ring", *TRAINING, "--memory-budget", TIGHT, "--offload", "spool", "--steps", "9"]
    ended = run(torchrun(2, tmp_path / "script.py", *flags), tmp_path)
    assert (ended.code != 0, ended.out, ended.left) == (True, "", [])
    assert ended.err.count("trainers: error: stumbled") == 1
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.slow
def test_workers_of_dedicated_servers_run_by_the_plan(two: dict[Any, Any]) -> None:
    """On Ray, where workers and the server are actors; of two gradients the sum is the same one in any exchange."""
    flags = ["--strategy", "parameter-server", "--workers", "2", *[each for each in TRAINING if each != "--json"]]
    with short_folder() as folder:
        (folder / "cheap.py").write_text(CHEAP)
        ended = run([*TRAINERS, *flags, "--memory-budget", TIGHT, "--offload", "."], folder)
        assert (ended.code, ended.left) == (0, []), ended.err
        found = json.loads((folder / "runs" / "parameter-server.measured.json").read_text())
    plain = record(two["ring", "plain"])
    assert found["losses"] == plain["losses"]
    assert found["configuration"]["parameters_digest"] == plain["configuration"]["parameters_digest"]
    memory = found["environment"]["memory"]
    assert memory["forwards"] == STEPS * ACCUMULATE * len(re.findall(r"\bF(?:all)?_", memory["plan"])) > 0
    said = (
        r"  memory    ([\d.,]+ [kM]B) of 2 MB planned: (\d) of 4 layers recomputed, (\d) copied; \+\d+% time predicted"
    )
    ((_, recomputed, copied),) = re.findall(said, ended.out)
    assert (int(recomputed), int(copied)) == (memory["recomputed"], memory["copied"])
    assert memory["copied"] > 0


ATTACHED = """
import json, os
import torch
import trainers
from distsim.memory.plan import parse
from trainers import memory
from trainers.offload import host_store
from trainers.workloads import language_model

torch.set_num_threads(1)
rank, ended = int(os.environ["RANK"]), []
PLAN = "Fall_1 Wall_1 Dall_1 F_2 Fall_3 LOSS B_3 D_2 Fall_2 B_2 D_1 Rall_1 B_1"
for planned in (False, True):
    for overlap in (True, False):
        torch.manual_seed(0)
        work = language_model.build(layers=3, width=32, context=16, dropout=0.1)
        exchange = trainers.attach(work.model, "ring", bucket_mb=0.02, overlap=overlap)
        with host_store() as store:
            if planned:
                applied = memory.apply(work.model.blocks, parse(PLAN, 3), waits=[], store=store)
            torch.manual_seed(rank)
            optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                for part in range(2):
                    inputs, targets = work.collate([work.data[8 * step + 4 * part + 2 * rank + at] for at in range(2)])
                    def backward():
                        logits = exchange(inputs).flatten(0, 1)
                        torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100).backward()
                    if part:
                        backward()
                    else:
                        with exchange.no_sync():
                            backward()
                optimizer.step()
            flat = torch.nn.utils.parameters_to_vector(work.model.parameters()).detach()
            ended.append(flat.numpy().tobytes().hex())
            if planned:
                assert applied.total.forwards == [6, 12, 6], applied.total.forwards
        exchange.close()
assert len(set(ended)) == 1
print(ended[0] == ended[2], flush=True)
"""


def test_an_own_loop_that_is_attached_runs_by_a_plan(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ATTACHED)
    ended = run(torchrun(2, tmp_path / "script.py"), tmp_path)
    assert (ended.code, ended.left) == (0, []), ended.err
    assert ended.out.count("True") == 2 and "False" not in ended.out  # of two ranks, whose lines may run together
