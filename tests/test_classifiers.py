"""The chains that read digits: residual networks, and linear layers of unequal widths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from trainers.workload import load
from trainers.workloads import digits, mlp, resnet


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small take many times longer with two threads on cores that are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Of torchvision's models of the same names: docs.pytorch.org/vision/stable/models/resnet.html, "num_params".
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize(("depth", "count"), PARAMETERS.items())
def test_residual_networks_have_as_many_parameters_as_is_known(depth: int, count: int) -> None:
    for norm in ("batch", "group"):
        with torch.device("meta"):
            model = resnet.network(depth, norm=norm)
            assert sum(each.numel() for each in model.parameters()) == count
            assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
            assert model[:-1](torch.empty(2, 3, 224, 224)).shape == (2, 2048 if depth >= 50 else 512, 7, 7)
    layers = sum(isinstance(each, nn.Conv2d) for name, each in model.named_modules() if "beside" not in name) + 1
    assert layers == depth  # as they are counted: convolutions that are not beside a residual, and the head


def test_a_bottleneck_halves_its_image_in_the_middle() -> None:
    """The 3 x 3 convolution sees all of it; the first of the four stages keeps its size."""
    strides = {
        name: (each.kernel_size[0], each.stride[0])
        for name, each in resnet.network(50, width=4).named_modules()
        if isinstance(each, nn.Conv2d) and each.stride[0] > 1
    }
    assert strides == {"0.0": (7, 2)} | {
        f"{block}.{part}": size for block in (4, 8, 14) for part, size in (("path.3", (3, 2)), ("beside.0", (1, 2)))
    }


@pytest.mark.parametrize(("norm", "adds_up"), [("group", True), ("batch", False)])
def test_a_residual_networks_gradients_add_up_where_samples_are_normalised_alone(norm: str, adds_up: bool) -> None:
    options: dict[str, object] = {"width": 4, "samples": 6, "norm": norm}
    workload = load("resnet", options, 0, "float64")

    def gradient(indexes: list[list[int]]) -> Tensor:
        workload.model.zero_grad()
        for each in indexes:
            batch = workload.collate([workload.data[index] for index in each])
            torch.autograd.backward(workload.loss(workload.model, batch))
        return torch.cat([each.grad.flatten() for each in workload.model.parameters() if each.grad is not None])

    whole, parts = gradient([list(range(6))]), gradient([[0, 1], [2, 3, 4, 5]])
    error = float((whole - parts).norm() / whole.norm())
    assert error <= 1e-12 if adds_up else error > 0.01


def test_images_are_enlarged_pixel_by_pixel() -> None:
    workload = load("resnet", {"width": 4, "samples": 20}, 0, "float32")
    drawn = digits.Images(20, stream=0)
    assert (len(workload.data), len(workload.evaluation or [])) == (20, 256)
    for index in range(20):
        image, digit = workload.data[index]
        small, wanted = drawn[index]
        assert (image.shape, image.dtype, digit) == ((3, 64, 64), torch.uint8, wanted)
        assert torch.equal(image, torch.from_numpy(np.kron(small.numpy(), np.ones((3, 4, 4), np.uint8))))


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_losses_of_digits_are_sums(name: str) -> None:
    options: dict[str, object] = {"widths": "16-8"} if name == "mlp" else {"width": 4, "norm": "group"}
    workload = load(name, {"samples": 6, **options}, 0, "float64")
    images, wanted = workload.collate([workload.data[index] for index in range(6)])
    logits = workload.model((images.flatten(1) if name == "mlp" else images).double() / 255).detach()
    by_hand = sum(float(row.exp().sum().log() - row[digit]) for row, digit in zip(logits, wanted, strict=True))
    assert float(workload.loss(workload.model, (images, wanted)).detach()) == pytest.approx(by_hand, rel=1e-13)
    workload.model.bfloat16()
    assert workload.loss(workload.model, (images, wanted)).dtype == torch.float32


def test_a_perceptrons_layers_have_the_widths_asked_for() -> None:
    model = mlp.chain([7, 3, 5], dropout=0.25)
    linear = [(each.in_features, each.out_features) for each in model.modules() if isinstance(each, nn.Linear)]
    assert linear == [(256, 7), (7, 3), (3, 5), (5, 10)]
    assert [each.p for each in model.modules() if isinstance(each, nn.Dropout)] == [0.25] * 3
    assert not any(isinstance(each, nn.Dropout) for each in mlp.chain([7, 3]).modules())


@pytest.mark.parametrize(
    ("name", "options"), [("mlp", {"widths": "64-32-64"}), ("resnet", {"width": 8, "norm": "group"})]
)
def test_digits_can_be_learned(name: str, options: dict[str, object]) -> None:
    workload = load(name, {**options, "samples": 512}, 1, "float32")
    optimizer = torch.optim.Adam(workload.model.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        batch = workload.collate([workload.data[(step * 32 + index) % 512] for index in range(32)])
        optimizer.zero_grad()
        loss = workload.loss(workload.model, batch) / 32
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"widths": "8,4"}, "widths must be numbers from 1 to 999999, as in 512-64-1024, not '8,4'"),
        ("mlp", {"widths": "0-4"}, "widths must be numbers from 1 to 999999, as in 512-64-1024, not '0-4'"),
        ("mlp", {"widths": ""}, "widths must be numbers from 1 to 999999, as in 512-64-1024, not ''"),
        ("mlp", {"dropout": 1}, "dropout must be at least 0 and less than 1, not 1.0"),
        ("mlp", {"samples": 0}, "samples must be from 1 to 1,000,000, not 0"),
        ("resnet", {"depth": 20}, "depth must be one of 18, 34, 50, 101, 152, not 20"),
        ("resnet", {"width": 0}, "width must be at least 1, not 0"),
        ("resnet", {"classes": 9}, "classes must be at least 10, one for each digit, not 9"),
        ("resnet", {"norm": "layer"}, "norm must be batch or group, not 'layer'"),
        ("resnet", {"samples": 0}, "samples must be from 1 to 1,000,000, not 0"),
    ],
)
def test_options_of_chains(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(name, options, 0, "float32")
    assert str(raised.value) == f"--workload {name}: {message}"
