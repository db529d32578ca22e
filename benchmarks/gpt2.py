"""GPT-2 124M on CUDA: a bare loop on one GPU, the same loop with `attach`, and DDP: tokens per second and MFU.

bf16 autocast, torch.compile, flash attention, fused AdamW. The model is GPT-2's but for the exact GELU instead of its
approximation: 124,439,808 parameters with its vocabulary of 50,257; with 50,304, a multiple of 64, 124,475,904.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import Table, against, table_of
from benchmarks.training import all_cores, in_processes, median_interval, need_torch, percentiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BARE, OURS, DDP = "bare loop, one GPU", "ours, ring", "DDP"
WANTED_TO_BARE = 0.97
TITLE = "Training steps of GPT-2 124M"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and how it is trained."""

    layers: int = 12
    width: int = 768
    head_width: int = 64
    context: int = 1024
    vocabulary: int = 50_304
    batch: int = 16
    """Sequences of each rank in a step."""
    compiled: bool = True
    steps: int = 20
    """Of a block: sides take turns in blocks, since a loop that never waits for the GPU is a part of what is
    measured. The clock stops when the block's last step is done."""
    rounds: int = 5
    """Counted blocks of each side."""

    def palm_flops(self, parameters: int) -> float:
        """Return the operations for one token by appendix B of PaLM (arXiv 2204.02311): 6N + 12LHQT.

        N is the number of parameters, L of layers, H of heads, Q their width, and T the length of a sequence.
        """
        return 6.0 * parameters + 12.0 * self.layers * self.width * self.context


SMOKE = Case(layers=2, width=64, head_width=32, context=32, vocabulary=128, batch=2, compiled=False, steps=2, rounds=2)


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure on all GPUs of this machine, `runs` blocks of each side; a table that says so if there is none."""
    need_torch("gpt2")
    import torch

    if not torch.cuda.is_available():
        return [Table(title=TITLE, included="Nothing was measured.", columns={"skipped": ["it needs a CUDA device"]})]
    case = Case(steps=2, rounds=runs) if quick else Case(rounds=runs)
    return [table(case, torch.cuda.device_count(), "cuda")]


def table(case: Case, ranks: int, kind: str) -> Table:
    """Measure a case on `ranks` processes with a device of this kind (cuda, cpu) each."""
    job = {"case": asdict(case), "kind": kind}
    found = in_processes("benchmarks.gpt2", ranks, job)
    parameters: int = found[0]["parameters"]
    peak: float = found[0]["peak_flops_per_s"]
    tokens = case.batch * case.context
    seconds = {side: np.array([each["step_s"][side] for each in found]).max(axis=0) for side in (BARE, OURS, DDP)}
    rows = [_row(side, seconds, tokens, case.palm_flops(parameters) / peak) for side in seconds]
    share = found[0]["counted_flops"] / (case.palm_flops(parameters) * tokens)
    included = (
        f"{found[0]['device']}, torch {found[0]['torch']}, {ranks} rank{'s' * (ranks > 1)}, "
        f"{datetime.now(UTC):%Y-%m-%d}. {parameters:,} parameters, {case.batch} sequences of {case.context} tokens for "
        "each rank; autocast to bf16 with parameters in float32, flash attention, AdamW, "
        f"{'compiled' if case.compiled else 'not compiled'}. Forward, backward, exchange, and the optimizer's step: "
        f"the mean of {case.steps} in a row, by CUDA events on a GPU, of the slowest rank; sides take turns. Median, "
        "10th and 90th percentile of these; tokens of each GPU. MFU: 6N + 12LHQT operations for a token (PaLM, "
        f"appendix B) over {peak / 1e12:.4g} TFLOP/s ({found[0]['peak_source']}); a count of the products of matrices "
        f"is {share:.4f} of these. Ratios are of speeds, paired block by block, and from..to is a 95 % confidence "
        f"interval of their median. Wanted: ours at least {WANTED_TO_BARE:g}x of the bare loop, on one GPU."
    )
    return table_of(TITLE, included, rows)


def _row(side: str, seconds: dict[str, npt.NDArray[np.float64]], tokens: int, token_s: float) -> dict[str, Any]:
    """Return a side's row; `token_s` is how long a token takes at the device's peak."""
    rates = tokens / seconds[side]
    to_bare, to_ddp = seconds[BARE] / seconds[side], seconds[DDP] / seconds[side]
    low, high = median_interval(to_bare)
    return {
        "side": side,
        **percentiles("step", seconds[side], "_s"),
        **percentiles("tokens", rates, "_per_s"),
        "MFU": f"{float(np.median(rates)) * token_s:.1%}",
        "ratio_to_bare": float(np.median(to_bare)),
        "ratio_from": low,
        "ratio_to": high,
        "ratio_to_DDP": float(np.median(to_ddp)),
        "reached": against(WANTED_TO_BARE, float(np.median(to_bare))) if side == OURS else None,
    }


def be_a_rank(case: dict[str, Any], kind: str, rank: int, ranks: int, folder: str) -> None:
    """Measure all sides in turns as one of the ranks, and write what was found to a file."""
    all_cores()
    import torch
    import torch.distributed as dist

    from trainers import flops
    from trainers.workloads import language_model

    of = Case(**case)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    where: dict[str, Any] = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": ranks}
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        dist.init_process_group("nccl", device_id=device, **where)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **where)
    models, sides, close = _sides(of, device, rank)
    gradients = {side: _first_gradient(models[side], sides[side]) for side in (OURS, DDP)}
    apart = float((gradients[OURS] - gradients[DDP]).norm() / gradients[DDP].norm())
    assert apart < 0.05, f"gradients of {OURS} are not those of {DDP}: {apart:g} of their length apart"
    step_s: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(of.rounds + 1):  # the first one compiles, and is the warm-up
        for side, step in sides.items():
            dist.barrier()
            seconds = _block_s(step, of.steps, device)
            if turn:
                step_s[side].append(seconds / of.steps)
    model = fresh(of, torch.device("meta"))
    tokens = torch.zeros(2, of.batch, of.context, dtype=torch.int64, device="meta")
    peak, source = flops.peak_flops(device, "float32", "bf16")
    found = {
        "step_s": step_s,
        "parameters": sum(each.numel() for each in model.parameters()),
        "counted_flops": flops.of_batch(model, language_model.loss, (tokens[0], tokens[1])),
        "peak_flops_per_s": peak,
        "peak_source": source,
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), "utf-8")
    close()
    dist.barrier()
    dist.destroy_process_group()


def _block_s(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return how long a block of steps takes, on a GPU by its own clock."""
    import torch

    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    first.record()
    for _ in range(steps):
        step()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1e3


def _sides(
    case: Case, device: torch.device, rank: int
) -> tuple[dict[str, nn.Module], dict[str, Callable[[], None]], Callable[[], None]]:
    """Return each side's model, a training step of it, and what to call when all is over."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import trainers

    tokens = torch.randint(
        case.vocabulary, (case.batch, case.context + 1), generator=torch.Generator().manual_seed(rank)
    ).to(device)
    models = {side: fresh(case, device) for side in (BARE, OURS, DDP)}
    ours = trainers.attach(models[OURS], "ring")
    called: dict[str, Callable[[Tensor], Tensor]] = {
        BARE: models[BARE],
        OURS: ours,
        DDP: DistributedDataParallel(models[DDP], gradient_as_bucket_view=True),
    }
    return models, {side: _stepper(model, called[side], tokens) for side, model in models.items()}, ours.close


def _first_gradient(model: nn.Module, step: Callable[[], None]) -> Tensor:
    """Do a step and return the gradient that it was done with, flat."""
    import torch

    step()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def _stepper(model: nn.Module, called: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], None]:
    """Return one training step, as a loop of one's own has it."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(tokens.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            loss = functional.cross_entropy(called(inputs).flatten(0, 1), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def fresh(case: Case, device: torch.device) -> nn.Module:
    """Return the model on a device, with the weights that it always begins with."""
    import torch

    from trainers.workloads.language_model import LanguageModel

    torch.manual_seed(1)
    with device:
        model = LanguageModel(
            case.layers, case.width, case.context, vocabulary=case.vocabulary, head_width=case.head_width
        )
    if case.compiled and device.type != "meta":
        model.compile()
    return model


if __name__ == "__main__":
    be_a_rank(**json.loads(sys.argv[1]))
