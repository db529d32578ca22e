"""Operations of a batch, against counts by hand, and peaks of devices."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainers import flops
from trainers.workload import load


def total(model: nn.Module, batch: Any) -> Tensor:
    """Return the sum of what a model makes of a batch."""
    out = model(batch)
    made: Tensor = (out[0] if isinstance(out, tuple) else out).sum()
    return made


def count(model: nn.Module, *shape: int) -> int | None:
    return flops.of_batch(model, total, torch.zeros(shape))


class Of(nn.Module):
    """A module that is one function of a batch, and has a parameter or a few."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **own: object) -> None:
        super().__init__()
        self.function = function
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, batch: Tensor) -> Tensor:
        return self.function(self, batch)


@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_a_chain_of_linear_layers(batch: int, widths: list[int]) -> None:
    """Each layer has three products of 2·b·in·out, the first one two: nobody asks for the gradient of the data."""
    products = [2 * batch * before * after for before, after in pairwise(widths)]
    chain = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
    assert count(chain, batch, widths[0]) == 3 * sum(products) - products[0]


def test_what_is_frozen_has_no_gradient() -> None:
    chain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2))
    chain[0].requires_grad_(False)  # then the second one's input needs no gradient, either
    assert count(chain, 4, 3) == 2 * 4 * (3 * 5 + 2 * 5 * 7 + 3 * 7 * 2)


@pytest.mark.parametrize(("batch", "context", "layers", "width"), [(2, 16, 1, 32), (3, 40, 3, 64)])
def test_the_language_model(batch: int, context: int, layers: int, width: int) -> None:
    """A block has 12·width² weights in products; attention has two products a head, each of 2·context²·32."""
    options = {"layers": layers, "width": width, "context": context}
    workload = load("language-model", options, 0, "float32")
    samples = workload.collate([workload.data[index] for index in range(batch)])
    tokens = batch * context
    block = 2 * tokens * 12 * width**2 + batch * (width // 32) * 2 * (2 * context**2 * 32)
    logits = 2 * tokens * width * 256
    assert flops.of_batch(workload.model, workload.loss, samples) == 3 * (layers * block + logits)


def attention(**options: Any) -> nn.Module:
    def run(module: Any, batch: Tensor) -> Tensor:
        query = batch * module.scale
        keys = query[:, :2] if options.get("enable_gqa") else query
        return functional.scaled_dot_product_attention(query, keys, keys, **options)

    return Of(run, scale=nn.Parameter(torch.ones(())))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"dropout_p": 0.1},
        {"attn_mask": torch.zeros(6, 6, device="meta")},
        {"enable_gqa": True},
    ],
    ids=lambda options: "".join(options) or "plain",
)
def test_attention_is_counted(options: dict[str, Any]) -> None:
    """Six products of 2·length²·width for each head: two forward, four backward; masked parts are computed, too."""
    assert count(attention(**options), 3, 4, 6, 5) == 6 * 3 * 4 * 2 * 6**2 * 5


def test_torchs_own_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=24, dropout=0.1, batch_first=True)
    tokens = 3 * 7
    forward = 2 * tokens * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 24) + 3 * 2 * 2 * (2 * 7**2 * 8)
    first = 2 * tokens * 3 * 16 * 16  # its input needs no gradient
    assert count(layer, 3, 7, 16) == 3 * forward - first


def products(outputs: tuple[int, ...], weights: tuple[int, ...]) -> int:
    """Count a convolution's products one by one: each output is a sum over its group's inputs and all of the kernel."""
    _, *kernel = weights[1:]
    return sum(2 * weights[1] for _ in np.ndindex(*outputs) for _ in np.ndindex(*kernel))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 12, (3, 2), stride=2, padding=1, groups=groups))
    first = products((2, 6, 5, 5), (6, 4, 3, 3))
    second = products((2, 12, 3, 3), (12, 6 // groups, 3, 2))
    assert tuple(net(torch.zeros(2, 4, 7, 7)).shape) == (2, 12, 3, 3)
    assert count(net, 2, 4, 7, 7) == 2 * first + 3 * second


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups: int) -> None:
    """Each input goes to all outputs of its group, through the whole kernel."""
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ConvTranspose1d(4, 6, 3, stride=2, groups=groups))
    first, second = products((2, 4, 5), (4, 3, 1)), products((2, 4, 5), (4, 6 // groups, 3))
    assert count(net, 2, 3, 5) == 2 * first + 3 * second


def test_a_recurrent_layer() -> None:
    """Backward through time: the first step's state needs no gradient, and neither does any input."""
    length, batch, inputs, width = 5, 3, 8, 16
    from_input, from_state = 2 * batch * inputs * 4 * width, 2 * batch * width * 4 * width
    expected = length * 2 * (from_input + from_state) + (length - 1) * from_state
    assert count(nn.LSTM(inputs, width), length, batch, inputs) == expected


def test_what_is_computed_again_is_counted_again() -> None:
    """The first of the two layers inside: what the second one makes is not needed again."""
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    plain = nn.Sequential(nn.Linear(6, 6), inner)
    again = nn.Sequential(
        plain[0], Of(lambda module, batch: checkpoint(module.inner, batch, use_reentrant=False), inner=inner)
    )
    one, two = count(plain, 4, 6), count(again, 4, 6)
    assert one is not None and two == one + 2 * 4 * 6 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_changed(dtype: torch.dtype) -> None:
    """Neither weights, gradients, buffers and modes, nor random numbers; no hook of a parameter is called."""
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).to(dtype)
    torch.autograd.backward(model(torch.rand(4, 3, dtype=dtype)).sum())
    model[2].eval()
    called: list[object] = []
    weight: Any = next(model.parameters())
    handle = weight.register_post_accumulate_grad_hook(called.append)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [
        (parameter.grad, parameter.grad.clone()) for parameter in model.parameters() if parameter.grad is not None
    ]
    assert len(gradients) == 6
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]

    assert (
        count(model, 4, 3) == flops.of_batch(model, total, torch.ones(4, 3, dtype=dtype)) == 2 * 4 * (2 * 24 + 3 * 16)
    )

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.device.type == "cpu" for value in model.state_dict().values())
    assert all(now is parameter.grad for (now, _), parameter in zip(gradients, model.parameters(), strict=True))
    assert all(torch.equal(now, then) for now, then in gradients)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert not called
    handle.remove()


def test_random_layers_are_always_the_same_ones() -> None:
    def some(module: Any, batch: Tensor) -> Tensor:
        for layer in module.layers:
            if torch.rand(()) < 0.5:
                batch = layer(batch)
        return batch

    model = Of(some, layers=nn.ModuleList(nn.Linear(4, 4) for _ in range(40)))
    counts = {count(model, 2, 4) for _ in range(5) if torch.rand(()) >= 0}  # other random numbers each time
    assert len(counts) == 1 and counts.pop()


def test_tensors_that_name_no_device_or_are_no_buffers() -> None:
    def placed(module: Any, batch: Tensor) -> Tensor:
        out: Tensor = module.layer(batch + torch.arange(4.0) * module.offsets)
        return out

    assert count(Of(placed, layer=nn.Linear(4, 3), offsets=torch.ones(4)), 2, 4) == 2 * (2 * 2 * 4 * 3)


def test_warnings_are_left_to_training() -> None:
    def warns(module: Any, batch: Tensor) -> Tensor:
        warnings.warn("of the model", stacklevel=1)
        out: Tensor = module.layer(batch)
        return out

    assert count(Of(warns, layer=nn.Linear(4, 3)), 2, 4) == 2 * (2 * 2 * 4 * 3)


def test_shared_weights_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    copy = flops._without_data(nn.Sequential(layer, nn.ReLU(), layer))
    assert len(list(copy.parameters())) == 2 and all(each.is_meta for each in copy.parameters())


@pytest.mark.parametrize(
    "function",
    [
        lambda module, batch: module.layer(batch) if batch.sum() > 0 else module.layer(-batch),
        lambda module, batch: module.layer(torch.from_numpy(np.asarray(batch) + 1)),
        lambda module, batch: module.layer(batch) * batch.max().item(),
        lambda module, batch: module.layer(batch).detach(),
        lambda module, batch: module.layer(torch.zeros(1, 99)),
        lambda module, batch: module.missing,
    ],
    ids=["branch", "numpy", "item", "no gradient", "shape", "bug"],
)
def test_none_where_it_cannot_be_counted(function: Callable[[Any, Tensor], Tensor]) -> None:
    assert count(Of(function, layer=nn.Linear(4, 3)), 2, 4) is None


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 HBM3"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GH200 144G HBM3e", "GH200"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM4"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM4"),
        ("A100-PCIE-40GB", "A100 PCIE"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIE"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla V100-PCIE-32GB", "V100 PCIE"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A10G", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_names_of_gpus(name: str, gpu: str | None) -> None:
    assert flops._find(name) == gpu


def test_the_table_is_dense_and_consistent() -> None:
    """Tensor cores do twice as many products of 16 bits as of TF32, on every GPU that has both, and bf16 as fp16."""
    for gpu, peak in flops.GPUS.items():
        if peak.tf32 is not None:
            assert peak.bf16 == peak.fp16 == pytest.approx(2 * peak.tf32, rel=0.03), gpu
            assert peak.tf32 >= peak.float32 * 0.999, gpu
        assert peak.fp16 is not None and peak.fp16 > peak.float32 >= (peak.float64 or 0), gpu


@pytest.mark.parametrize(
    ("dtype", "precision", "tf32", "tera", "kind"),
    [
        ("float32", "full", False, 67, "float32"),
        ("float32", "full", True, 494.5, "tf32"),
        ("float32", "bf16", False, 989.5, "bf16"),
        ("float32", "fp16", True, 989.5, "fp16"),
        ("float64", "full", True, 67, "float64"),
        ("float64", "bf16", False, 67, "float64"),  # autocast leaves it alone
    ],
)
def test_the_peak_of_a_known_gpu(
    dtype: str, precision: str, tf32: bool, tera: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        peak = flops.peak_flops(torch.device("cuda", 0), dtype, precision)
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak == (tera * 1e12, f"data sheet of H200, {kind}, dense")


@pytest.mark.parametrize(("name", "precision"), [("NVIDIA A10G", "bf16"), ("Tesla T4", "bf16")])
def test_what_the_table_has_not_is_measured(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "_measured", lambda device, computed: (1.0, f"{device} {computed}"))
    assert flops.peak_flops(torch.device("cuda", 0), "float32", precision) == (1.0, "cuda:0 bf16")


def test_the_best_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 256 rows take 1 ms, of 512 rows 2 ms at best, of 1024 rows 60 ms: no larger ones, then."""
    now, made = [10.0], []

    def product(square: Tensor, out: Tensor) -> float:
        rows = len(square)
        made.append(rows)
        seconds = {8: 5.0, 256: 0.001, 512: 0.002 if made.count(512) == 2 else 0.03}.get(rows, 0.06)
        now[0] += seconds
        return seconds

    monkeypatch.setattr(flops, "MEASURING_S", 0.5)
    monkeypatch.setattr(flops, "_seconds", product)
    monkeypatch.setattr("trainers.flops.time.perf_counter", lambda: now[0])
    best, source = flops.peak_flops(torch.device("cpu"), "float32", "full")
    assert best == 2 * 512**3 / 0.002
    assert made == [8, *[256] * 4, *[512] * 4, *[1024] * 7]
    assert 15.5 <= now[0] < 15.56  # what the first product of all takes is not counted
    assert source == f"measured, matrix products in float32, {torch.get_num_threads()} threads"


@pytest.mark.parametrize(
    ("dtype", "precision", "kind"),
    [("float32", "full", "float32"), ("float64", "full", "float64"), ("float32", "bf16", "bf16")],
)
def test_the_peak_of_this_cpu(dtype: str, precision: str, kind: str) -> None:
    peak, source = flops.peak_flops(torch.device("cpu"), dtype, precision)
    assert 1e7 < peak < 1e15
    assert source.startswith(f"measured, matrix products in {kind}, ")
