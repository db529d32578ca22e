"""Images of digits, and a small convolutional network that reads them.

The images are drawn here, nothing is downloaded: each digit is a few strokes, turned, stretched, shifted, of
some thickness, and noisy. The data are the same in every run; the run's seed sets the weights alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from distsim.errors import ConfigError
from trainers.workload import Workload

SIZE = 16
"""Height and width of an image."""
HELD_OUT = 256
GROUP = 8
"""Channels that a GroupNorm takes together: it treats each sample alone, so batches may be split anyhow."""

Floats = npt.NDArray[np.float64]

_TOP = "02 22"
_MIDDLE = "01 21"
_BOTTOM = "00 20"
STROKES = {
    0: f"{_TOP} 22 20 {_BOTTOM} 00 02",
    1: "01 12 12 10",
    2: f"{_TOP} 22 21 21 00 {_BOTTOM}",
    3: f"{_TOP} 22 11 11 21 21 20 {_BOTTOM}",
    4: "12 01 01 21 12 10",
    5: f"{_TOP} 02 01 {_MIDDLE} 21 20 {_BOTTOM}",
    6: f"12 01 01 00 {_BOTTOM} 20 21 {_MIDDLE}",
    7: f"{_TOP} 22 10",
    8: f"{_TOP} {_MIDDLE} {_BOTTOM} 00 02 20 22",
    9: f"{_TOP} 02 01 {_MIDDLE} 22 21 21 10",
}
"""Each digit's strokes: pairs of points xy on a grid of 3 x 3, the origin at the lower left."""


def build(*, width: int = 16, samples: int = 4096) -> Workload:
    """Build a network of `width` channels, twice as many in its second layer, and draw `samples` images.

    Raises: ConfigError for a width that is no multiple of 8, or no samples.
    """
    if width < GROUP or width % GROUP:
        raise ConfigError(f"width must be a multiple of {GROUP} (channels normalised together), not {width}")
    if not 1 <= samples <= 10**6:
        raise ConfigError(f"samples must be from 1 to 1,000,000, not {samples}")
    return Workload(
        model=Classifier(width),
        data=Images(samples, stream=0),
        loss=loss,
        evaluation=Images(HELD_OUT, stream=1),
        data_name=f"{samples:,} drawn digits",
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the summed cross-entropy, in nats; images are (batch, 1, 16, 16), digits (batch,)."""
    images, digits = batch
    logits = model(images)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision cannot sum hundreds
    return functional.cross_entropy(exact, digits, reduction="sum")


class Images:
    """Drawn digits: samples are an image, uint8 (1, 16, 16), and its digit, int64."""

    def __init__(self, samples: int, stream: int) -> None:
        random = np.random.default_rng((20, stream))
        digits = random.integers(0, 10, size=samples)
        images = np.empty((samples, 1, SIZE, SIZE), dtype=np.uint8)
        for digit in range(10):
            images[digits == digit, 0] = draw(digit, int((digits == digit).sum()), random)
        self._images, self._digits = torch.from_numpy(images), torch.from_numpy(digits)

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index], self._digits[index]


def draw(digit: int, count: int, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a digit `count` times, (count, 16, 16): a pixel is as dark as it is near to a stroke."""
    points = np.array([[int(part) for part in point] for point in STROKES[digit].split()], dtype=np.float64) - 1
    angle = random.normal(0, 0.15, count)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=-1).reshape(count, 2, 2)
    stretch = np.array([3.0, 5.0]) * random.uniform(0.8, 1.2, (count, 2))
    middle = (SIZE - 1) / 2 + random.uniform(-1.5, 1.5, (count, 1, 2))
    placed = (points * stretch[:, None]) @ turn + middle  # (count, points, 2), in pixels
    begin, along = placed[:, ::2], placed[:, 1::2] - placed[:, ::2]
    y, x = np.mgrid[SIZE - 1 : -1 : -1, 0:SIZE]
    pixels = np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float64)
    distance = np.full((count, SIZE * SIZE), np.inf)
    for stroke in range(begin.shape[1]):
        start, way = begin[:, stroke, None], along[:, stroke, None]  # (count, 1, 2)
        share = ((pixels - start) * way).sum(-1) / (way**2).sum(-1)  # where on the line a pixel is nearest
        nearest = start + share.clip(0, 1)[..., None] * way
        distance = np.minimum(distance, np.hypot(*np.moveaxis(pixels - nearest, -1, 0)))
    thickness = random.uniform(0.6, 1.2, (count, 1))
    ink = 255 * (1 + thickness - distance).clip(0, 1) + random.normal(0, 12, distance.shape)
    drawn: npt.NDArray[np.uint8] = ink.clip(0, 255).astype(np.uint8).reshape(count, SIZE, SIZE)
    return drawn


class Classifier(nn.Module):
    """Images in, logits of ten digits out: (batch, 1, 16, 16) uint8 -> (batch, 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(width // GROUP, width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(2 * width // GROUP, 2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (SIZE // 4) ** 2, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        kind = next(self.parameters()).dtype
        logits: Tensor = self.layers(images.to(kind) / 255)
        return logits
