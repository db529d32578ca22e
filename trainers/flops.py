"""Floating-point operations of a training step, and how many a device can do: MFU is their quotient."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainers.transport import synchronize
from trainers.workload import to_device

META = torch.device("meta")

MEASURING_S = 0.2
FEWEST_ROWS, MOST_ROWS = 256, 8192
"""Of matrices that are multiplied to measure a device; larger ones need more than half a gigabyte each."""


def of_batch(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> int | None:
    """Count the operations of a batch's forward and backward: those of matrix products, convolutions, attention.

    A multiplication and an addition are two operations. What autograd does not need, such as the gradient of the
    input, is not counted; what activation checkpointing computes again, is. The model is run without data, on the
    meta device (where attention is plain matrix products: the counter does not know the CPU's own kernel for it), and
    stays as it is.

    Returns None if it cannot be run that way, for example because it looks at values.
    """
    for made_on in ("meta", "cpu"):  # where a model's `torch.arange(n)` is; a few look at the values of such tensors
        try:
            return _count(_without_data(model), loss, to_device(batch, META), torch.device(made_on))
        except Exception:  # whatever somebody else's model does on meta: there is no count then, and that is all
            continue
    return None


def _count(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, made_on: torch.device) -> int:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(0)  # layers that are left out at random: always the same ones
        warnings.simplefilter("ignore")  # training shows them
        with made_on, FlopCounterMode(display=False, custom_mapping=OWN_COUNTS) as counter:
            torch.autograd.backward(loss(model, batch))
    return int(counter.get_total_flops())


def _convolution_backward(
    grad_out: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Any
) -> int:
    """Count a convolution's backward, from shapes: as much as forward for each of both gradients that are needed."""
    transposed, needed = bool(others[4]), others[7]  # in the order of aten::convolution_backward
    gradients = int(needed[0]) + int(needed[1])  # of inputs and weights; the bias's is a mere sum
    return gradients * 2 * math.prod(inputs if transposed else grad_out) * math.prod(weight[1:])


OWN_COUNTS = {torch.ops.aten.convolution_backward: _convolution_backward}
"""FlopCounterMode counts the gradient of weights in groups as if all channels met: 768 times for 768 groups."""


def _without_data(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device without copying its data."""
    others = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(each): each.detach().to(META) for each in [*model.buffers(), *others]}
    memo |= {
        id(each): nn.Parameter(each.detach().to(META), requires_grad=each.requires_grad) for each in model.parameters()
    }
    return deepcopy(model, memo)


class Peak(NamedTuple):
    """TFLOP/s of a GPU in matrix products, dense; None: it has no units for them, or its maker does not say."""

    float64: float | None
    float32: float
    tf32: float | None
    bf16: float | None
    fp16: float | None


# From NVIDIA's data sheets and product pages, as named. Where these give a number "with sparsity", here is half of it,
# and where there are tensor cores for float64, it is theirs. fp16 and bf16 are with sums in float32, as torch has them.
GPUS = {
    # images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    "V100 SXM2": Peak(7.8, 15.7, None, None, 125),
    "V100 PCIE": Peak(7, 14, None, None, 112),
    # www.nvidia.com/en-us/data-center/tesla-t4
    "T4": Peak(None, 8.1, None, None, 65),
    # www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    "A100 SXM4": Peak(19.5, 19.5, 156, 312, 312),
    "A100 PCIE": Peak(19.5, 19.5, 156, 312, 312),
    # www.nvidia.com/en-us/data-center/products/a10-gpu
    "A10": Peak(None, 31.2, 62.5, 125, 125),
    # Ada architecture white paper, images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    "RTX 4090": Peak(None, 82.6, 82.6, 165.2, 165.2),
    # www.nvidia.com/en-us/data-center/l4 and .../l40 and .../l40s
    "L4": Peak(None, 30.3, 60, 121, 121),
    "L40": Peak(None, 90.5, 90.5, 181, 181),
    "L40S": Peak(None, 91.6, 183, 362, 362),
    # www.nvidia.com/en-us/data-center/h100; "H100 80GB HBM3" is the SXM module
    "H100 HBM3": Peak(67, 67, 494.5, 989.5, 989.5),
    "H100 PCIE": Peak(51, 51, 378, 756.5, 756.5),
    # www.nvidia.com/en-us/data-center/h200
    "H200": Peak(67, 67, 494.5, 989.5, 989.5),
    # nvdam.widen.net/s/rrgqqnpbz8/grace-datasheet-gh200-grace-hopper-superchip-3773000
    "GH200": Peak(67, 67, 494, 990, 990),
    # Blackwell data sheet: one GPU of HGX B200, and of GB200 NVL72
    "B200": Peak(37, 75, 1100, 2250, 2250),
    "GB200": Peak(40, 80, 1250, 2500, 2500),
}
"""By the words of torch.cuda.get_device_name that tell a GPU from others."""

NO_MATTER = re.compile("nvidia|tesla|geforce|[0-9]+gb?|hbm.*")
"""Further words of a name. Any other one (MIG, NVL, Laptop, Max-Q, D) makes another product of it."""


def peak_flops(device: torch.device, dtype: str, precision: str) -> tuple[float, str]:
    """Return the operations per second that a device can do at best, and where the number is from.

    That is the data sheet's for a GPU that the table has (for float32 with tensor cores, if torch may use TF32 now),
    and else the best of some matrix products, timed for 0.2 s, on a CPU with the present number of threads.
    """
    computed = _computed(dtype, precision)
    if device.type == "cuda":
        if computed == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
            computed = "tf32"
        gpu = _find(torch.cuda.get_device_name(device))
        tera = getattr(GPUS[gpu], computed) if gpu is not None else None
        if tera is not None:
            return tera * 1e12, f"data sheet of {gpu}, {computed}, dense"
    return _measured(device, computed)


def _computed(dtype: str, precision: str) -> str:
    """Return what products are computed in; autocast leaves float64 as it is."""
    return dtype if precision == "full" or dtype == "float64" else precision


def _find(name: str) -> str | None:
    """Return a device's name in the table."""
    words = set(re.split(r"[\s-]+", name.lower()))
    for gpu in GPUS:
        its = set(gpu.lower().split())
        if its <= words and all(NO_MATTER.fullmatch(word) for word in words - its):
            return gpu
    return None


def _measured(device: torch.device, computed: str) -> tuple[float, str]:
    """Time square matrix products, of more and more rows until one takes 50 ms."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}.get(computed, torch.float32)
    _seconds(*torch.ones(2, 8, 8, dtype=dtype, device=device))  # the first product of all starts the library
    best, rows, until = 0.0, FEWEST_ROWS, time.perf_counter() + MEASURING_S
    while time.perf_counter() < until:
        square, out = torch.ones(2, rows, rows, dtype=dtype, device=device)
        seconds = _seconds(square, out)
        for _ in range(3):  # others may have held the processor, or the first product of this size paid for all
            if time.perf_counter() < until:
                seconds = min(seconds, _seconds(square, out))
        best = max(best, 2 * rows**3 / seconds)
        if seconds < 0.05:
            rows = min(2 * rows, MOST_ROWS)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return best, f"measured, matrix products in {computed}{threads}"


def _seconds(square: Tensor, out: Tensor) -> float:
    synchronize(square.device)
    began = time.perf_counter()
    torch.mm(square, square, out=out)
    synchronize(square.device)
    return time.perf_counter() - began
