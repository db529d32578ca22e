"""A small decoder-only transformer over bytes (pre-norm GPT blocks, output layer tied to the embedding).

The default has 842,496 parameters; `layers=6,width=384` has 10,795,008.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from distsim.errors import ConfigError
from trainers.workload import Samples, Workload

VOCABULARY = 256
HEAD_WIDTH = 32
NO_TARGET = -100
HELD_OUT_EVERY, MOST_HELD_OUT = 50, 256

Bytes = npt.NDArray[np.uint8]


def build(
    *,
    layers: int = 4,
    width: int = 128,
    head_width: int = HEAD_WIDTH,
    context: int = 128,
    dropout: float = 0.0,
    text: str | None = None,
    lines: bool = False,
) -> Workload:
    """Build model and data: bytes of a file, or of the standard library of Python, which is on every machine.

    With `lines` every line is a document of its own, so that samples have very different numbers of tokens, as they
    have in fine-tuning on questions and answers.

    Raises: ConfigError for sizes that no model has, and for a text that cannot be read or is too short.
    """
    for name, value in (("layers", layers), ("context", context), ("head_width", head_width)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if width < head_width or width % head_width:
        raise ConfigError(f"width must be a multiple of {head_width} (the width of a head), not {width}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and less than 1, not {dropout}")
    origin, documents = _standard_library() if text is None else (text, [_file(text)])
    if lines:
        documents = [line for document in documents for line in _lines(document)]
    everything = Pieces(documents, context)
    if not len(everything):
        raise ConfigError(f"text={origin}: there is nothing to learn from fewer than 2 bytes")
    train, held_out = split(everything)
    return Workload(
        model=LanguageModel(layers, width, context, dropout, head_width=head_width),
        data=train,
        loss=loss,
        count=lambda batch: int((batch[1] != NO_TARGET).sum()),
        collate=lambda samples: collate(samples, context),
        evaluation=held_out if len(held_out) else None,
        data_name=origin,
        layers="blocks",
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the summed cross-entropy of the next byte, in nats; inputs and targets are (batch, context)."""
    inputs, targets = batch
    logits = model(inputs).flatten(0, 1)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # half precision cannot sum thousands
    return functional.cross_entropy(exact, targets.flatten(), ignore_index=NO_TARGET, reduction="sum")


def collate(samples: Sequence[Bytes], context: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (batch, context) in int64; what a sample is too short for has no target."""
    inputs = np.zeros((len(samples), context), dtype=np.int64)
    targets = np.full((len(samples), context), NO_TARGET, dtype=np.int64)
    for row, piece in enumerate(samples):
        inputs[row, : len(piece) - 1] = piece[:-1]
        targets[row, : len(piece) - 1] = piece[1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class Pieces:
    """Documents cut into pieces of `context + 1` bytes; a document's last one is shorter, down to 2 bytes.

    A piece begins with the byte that the one before ends with: each byte but a document's first is a target once.
    """

    def __init__(self, documents: Sequence[Bytes], context: int) -> None:
        self._documents, self._context = documents, context
        counts = [max(0, -(-(len(document) - 1) // context)) for document in documents]
        self._ends = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        document = int(np.searchsorted(self._ends, index, side="right")) - 1
        first = (index - int(self._ends[document])) * self._context
        return self._documents[document][first : first + self._context + 1]


@dataclass(frozen=True, slots=True)
class Part:
    """Every `every`-th one of some samples, or all the others."""

    samples: Pieces
    every: int
    held_out: bool

    def __len__(self) -> int:
        held_out = len(self.samples) // self.every
        return held_out if self.held_out else len(self.samples) - held_out

    def __getitem__(self, index: int) -> Bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.samples[index * self.every + self.every - 1 if self.held_out else index + index // (self.every - 1)]


def split(samples: Pieces) -> tuple[Samples, Samples]:
    """Return training and evaluation samples: every 50th piece is held out, or fewer, at most 256."""
    every = max(HELD_OUT_EVERY, -(-len(samples) // MOST_HELD_OUT))
    return Part(samples, every, False), Part(samples, every, True)


def _standard_library() -> tuple[str, list[Bytes]]:
    """The top-level modules of Python's standard library, a document each."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return f"Python {sysconfig.get_python_version()} standard library", [_file(str(file)) for file in files]


def _lines(document: Bytes) -> list[Bytes]:
    return np.split(document, np.flatnonzero(document == ord("\n")) + 1)


def _file(path: str) -> Bytes:
    try:
        return np.frombuffer(Path(path).read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise ConfigError(f"text={path}: cannot read it: {error.strerror}") from error


class LanguageModel(nn.Module):
    """Tokens (by default bytes) in, logits of the next one out: (batch, length) -> (batch, length, vocabulary)."""

    def __init__(
        self,
        layers: int,
        width: int,
        context: int,
        dropout: float = 0.0,
        *,
        vocabulary: int = VOCABULARY,
        head_width: int = HEAD_WIDTH,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, dropout, head_width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.dropout(self.embedding(tokens) + self.position(positions)))
        return functional.linear(self.norm(hidden), self.embedding.weight)


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a layer norm and beside a residual."""

    def __init__(self, width: int, dropout: float = 0.0, head_width: int = HEAD_WIDTH) -> None:
        super().__init__()
        self.heads = width // head_width
        self.dropout = nn.Dropout(dropout)
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.queries_keys_values(self.norm_attention(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in split)
        dropped = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropped, is_causal=True)
        hidden = hidden + self.dropout(self.attention_out(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = hidden + self.dropout(self.perceptron(self.norm_perceptron(hidden)))
        return out
