"""Small models of text, padded or packed: some are right, the others attend to padding or drop out."""

from __future__ import annotations

from typing import Any

import torch
from offenders import WIDTH
from substitution import CLASSES, FEATURES, Case
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence


class Tokens(nn.Module):
    """A language model on padded tokens (0 is padding); without `causal` it attends to padding, too."""

    def __init__(self, *, causal: bool = True, tied: bool = False, position: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, WIDTH), position or nn.Embedding(16, WIDTH)
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.causal = nn.Linear(WIDTH, 11), causal
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        logits: Tensor = self.head(x + self.out(y.transpose(1, 2).flatten(2)))
        return logits


class Packed(nn.Module):
    """An LSTM on packed sequences: their steps are one dimension, sorted by length, in an order of the batch's own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, FEATURES), nn.Linear(5, CLASSES)
        self.lstm = nn.LSTM(FEATURES, 5, 2, batch_first=True, dropout=dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1)
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        y: Tensor = self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0].sum(1))
        return y


class OwnTextLoss(nn.Module):
    """A language model that computes its loss: the mean over the tokens that are to be predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tokens()

    def forward(self, tokens: Tensor) -> Tensor:
        return next_token(self.model, tokens) / predicted(tokens)


def sentences(samples: int, seed: int = 0) -> list[Tensor]:
    """Tokens 1 to 10, of unequal lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (samples,), generator=random).tolist()
    return [torch.randint(1, 11, (length,), generator=random) for length in lengths]


def padded(items: list[Tensor]) -> Tensor:
    return pad_sequence(items, batch_first=True)


def predicted(tokens: Tensor) -> int:
    """How many tokens there are to predict."""
    return int((tokens[:, 1:] != 0).sum())


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens)[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=0, reduction="sum")


def text(model: nn.Module, loss: Any = next_token, count: Any = predicted) -> Case:
    """Seven sentences."""
    return Case(model, sentences(7), loss, count, padded)
