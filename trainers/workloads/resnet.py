"""Residual networks of 18 to 152 layers, on drawn digits enlarged to 64 x 64.

As in He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2015), table 1; where a bottleneck
halves its image, the 3 x 3 convolution does it, not the first one (as in the "v1.5" of later implementations). The
model is one nn.Sequential of stem, blocks and head. `depth=152,classes=1000` has 60,192,808 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from distsim.errors import ConfigError
from trainers.workload import Workload
from trainers.workloads import digits

ENLARGED = 4
"""Times as high and as wide as they are drawn: 64 x 64."""
DIGITS = 10
WIDENING = 4
"""Of a bottleneck: its output has this many times the channels that it computes with."""

STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Depth -> blocks of each stage; from 50 on they are bottlenecks."""

Norm = Literal["batch", "group"]
MakeNorm = Callable[[int], nn.Module]


def build(
    *, depth: int = 18, width: int = 64, norm: Norm = "batch", classes: int = DIGITS, samples: int = 1024
) -> Workload:
    """Build a network of `depth` layers, with `width` channels in its first stage, and draw `samples` images.

    `norm` is batch (statistics over the micro-batch) or group (over a sample: nn.GroupNorm of one group, a layer
    norm); of more `classes` than ten, the others do not occur.

    Raises: ConfigError for a depth that is none, and for numbers that are too small.
    """
    if depth not in STAGES:
        raise ConfigError(f"depth must be one of {', '.join(map(str, STAGES))}, not {depth}")
    if width < 1:
        raise ConfigError(f"width must be at least 1, not {width}")
    if classes < DIGITS:
        raise ConfigError(f"classes must be at least {DIGITS}, one for each digit, not {classes}")
    if not 1 <= samples <= 10**6:
        raise ConfigError(f"samples must be from 1 to 1,000,000, not {samples}")
    return Workload(
        model=network(depth, width, norm, classes),
        data=Enlarged(samples, stream=0),
        loss=loss,
        evaluation=Enlarged(digits.HELD_OUT, stream=1),
        data_name=f"{samples:,} drawn digits, 64 x 64",
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the summed cross-entropy, in nats; images are (batch, 3, 64, 64), digits (batch,)."""
    images, wanted = batch
    kind = next(model.parameters()).dtype
    logits = model(images.to(kind) / 255)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision cannot sum hundreds
    return functional.cross_entropy(exact, wanted, reduction="sum")


class Enlarged(digits.Images):
    """Samples are an image, uint8 (3, 64, 64), three times the same channel, and its digit, int64."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, digit = super().__getitem__(index)
        large = image.repeat_interleave(ENLARGED, dim=1).repeat_interleave(ENLARGED, dim=2)
        return large.expand(3, -1, -1), digit


def network(depth: int, width: int = 64, norm: Norm = "batch", classes: int = 1000) -> nn.Sequential:
    """Return a network: images in, (batch, 3, height, width), logits out, (batch, classes)."""
    normed: MakeNorm = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 1)
    stem = nn.Sequential(
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), normed(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    widening = WIDENING if depth >= 50 else 1
    layers: list[nn.Module] = [stem]
    channels = width
    for stage, blocks in enumerate(STAGES[depth]):
        inner = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Block(channels, inner, inner * widening, stride, normed))
            channels = inner * widening
    layers.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)))
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class Block(nn.Module):
    """Two convolutions of 3 x 3, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1 if it widens, beside a residual."""

    def __init__(self, channels: int, inner: int, out: int, stride: int, normed: MakeNorm) -> None:
        super().__init__()
        if out == inner:
            sizes = [(channels, inner, 3, stride), (inner, out, 3, 1)]
        else:
            sizes = [(channels, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
        parts: list[nn.Module] = []
        for before, after, kernel, step in sizes:
            convolution = nn.Conv2d(before, after, kernel, stride=step, padding=kernel // 2, bias=False)
            parts += [convolution, normed(after), nn.ReLU()]
        self.path = nn.Sequential(*parts[:-1])
        self.beside = nn.Sequential()
        if stride > 1 or channels != out:
            self.beside = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), normed(out))

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.path(images) + self.beside(images))
