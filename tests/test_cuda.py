"""Gradient exchange over NCCL, on as many GPUs as there are: streams and events let nothing come too early.

Two runs of the same training are compared, bit by bit. In one, the device is idle before and after each exchange.
In the other, gradients come late in backward and sums come late in their exchange: both streams are held up, so that
whoever does not wait for the other one's event reads what was there before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import run, torchrun

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device, and this machine has none"),
]

STRATEGIES = ("ring", "halving-doubling", "all-to-all")

SCRIPT = '''
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
import trainers
from trainers.exchange import ScheduleRunner

kind, strategy, owner = sys.argv[1:]
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
torch.use_deterministic_algorithms(True)
if kind == "cuda":
    torch.cuda.set_device(device)
if owner == "user":
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
plain, held_up = ScheduleRunner.run, False
WIDTH, DEPTH, STEPS, LATE = 512, 6, 4, 3_000_000  # LATE: clock cycles, a millisecond or two


def late():
    if kind == "cuda" and held_up:
        torch.cuda._sleep(LATE)


def idle():
    if kind == "cuda" and not held_up:
        torch.cuda.synchronize(device)


def exchange(runner, values):
    idle()
    late()
    applied = plain(runner, values)
    late()
    idle()
    return applied


ScheduleRunner.run = exchange


def come_late(gradient):
    late()
    return gradient


def fresh():
    torch.manual_seed(0)
    layers = [part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers).to(device)
    for parameter in model.parameters():
        parameter.register_hook(come_late)
    return model


def inputs(step, member):
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * step + member)).to(device)


def train(model, called, close=lambda: None):
    """Gradients and parameters of all steps; nothing of it may wait for the device between two steps."""
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        optimizer.zero_grad()
        called(inputs(step, rank)).square().mean().backward()
        seen += [each.grad.clone() for each in model.parameters()]
        optimizer.step()
    seen += [each.detach().clone() for each in model.parameters()]
    close()
    return torch.cat([each.flatten() for each in seen]).cpu()


def alone():
    """The mean of all ranks' gradients, by one loop."""
    model = fresh()
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for member in range(ranks):
            (model(inputs(step, member)).square().mean() / ranks).backward()
        seen += [each.grad.clone() for each in model.parameters()]
        optimizer.step()
    seen += [each.detach().clone() for each in model.parameters()]
    return torch.cat([each.flatten() for each in seen]).cpu()


results = {}
for held_up in (False, True):
    for overlap in (True, False):
        model = fresh()
        attached = trainers.attach(model, strategy, bucket_mb=2.0, overlap=overlap, transport="torch")
        assert ranks == 1 or len(attached.plan.buckets) > 2, attached.plan.buckets
        results[f"held up {held_up}, overlap {overlap}"] = train(model, attached, attached.close)
held_up = False
reference = alone()
one = results["held up False, overlap False"]
print("FOUND " + json.dumps({
    "device": str(device),
    "equal": {name: torch.equal(each, one) for name, each in results.items()},
    "to_reference": float((one - reference).norm() / reference.norm()),
    "changed": float((one[-WIDTH:] - one[:WIDTH]).norm()),
}), flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
'''


def found(kind: str, ranks: int, strategy: str, owner: str, folder: Path) -> list[dict[str, object]]:
    """Run the script on `ranks` devices of a kind, cuda or cpu, and return what each rank prints."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it cuBLAS may sum in another order each time
    ended = run(torchrun(ranks, script, kind, strategy, owner), folder, timeout_s=300, extra=workspace)
    assert ended.code == 0, ended.err
    lines = [line.partition("FOUND ")[2] for line in ended.out.splitlines() if "FOUND " in line]
    assert len(lines) == ranks, ended.out
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("owner", ["user", "attach"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_held_up_streams_change_nothing(strategy: str, owner: str, tmp_path: Path) -> None:
    """With one GPU this is a world of one rank, in which nothing is sent; streams and events are the same."""
    check(found("cuda", torch.cuda.device_count(), strategy, owner, tmp_path))


def check(ranks: list[dict[str, object]]) -> None:
    """All runs of each rank are equal to the bit, and what one process would have computed but for rounding."""
    for each in ranks:
        equal, to_reference, changed = each["equal"], each["to_reference"], each["changed"]
        assert isinstance(equal, dict) and equal and all(equal.values()), each
        assert isinstance(to_reference, float) and to_reference < 1e-4, each
        assert isinstance(changed, float) and changed > 0, each


if __name__ == "__main__":  # the same on CPUs, over gloo: python tests/test_cuda.py FOLDER
    for strategy in STRATEGIES:
        for owner in ("user", "attach"):
            check(found("cpu", 2, strategy, owner, Path(sys.argv[1])))
