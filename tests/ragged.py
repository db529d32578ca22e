"""A workload that is hard to share out: few sequences of unequal lengths, each through another part of the model.

Runs under test name it `ragged:build`; see `copy_to`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainers.workload import Workload
from trainers.workloads import language_model

CONTEXT, WIDTH = 16, 8


class Experts(nn.Module):
    """Each sequence goes through one of five experts, by its first byte; a sixth one has none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        mixed = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (tokens[:, 0] % 5 == number).nonzero().flatten()
            if len(chosen):  # with none, the expert gets no gradient, rather than zeros
                mixed = mixed.index_copy(0, chosen, torch.tanh(expert(hidden[chosen])))
        out: Tensor = self.out(hidden + mixed)
        return out


def build(*, samples: int = 21) -> Workload:
    """Sequences of 2 to 17 bytes, each of which is the one before plus a few."""
    random = np.random.default_rng(7)
    lengths = random.integers(2, CONTEXT + 2, size=samples)
    rises = [np.array([random.integers(128), *random.integers(1, 5, length - 1)]) for length in lengths]
    data = [rise.cumsum().astype(np.uint8) for rise in rises]
    return Workload(
        model=Experts(),
        data=data,
        loss=language_model.loss,
        count=lambda batch: int((batch[1] != language_model.NO_TARGET).sum()),
        collate=lambda pieces: language_model.collate(pieces, CONTEXT),
        data_name="ragged",
    )


def copy_to(folder: Path) -> None:
    """Put this module where runs in `folder` find it: among the modules of the current directory."""
    folder.mkdir(exist_ok=True)
    shutil.copy(__file__, folder / "ragged.py")
