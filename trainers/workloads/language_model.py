"""A small decoder-only transformer over bytes (pre-norm GPT blocks, output layer tied to the embedding)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers.config import RunConfig
from trainers.data import Text

VOCABULARY = 256
HEAD_WIDTH = 32


def build(config: RunConfig) -> nn.Module:
    """Build the model with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LanguageModel(config.layers, config.width, config.context).to(getattr(torch, config.dtype))


def batch(config: RunConfig, text: Text, step: int, worker: int) -> Tensor:
    """Return the worker's share of a step's batch, shape (batch_size, context + 1), int64."""
    count = config.workers * config.batch_size
    windows = text.windows(config.seed, step, count, config.context + 1)
    return torch.from_numpy(windows[worker * config.batch_size : (worker + 1) * config.batch_size])


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next byte, in nats; `tokens` has shape (batch, context + 1)."""
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out: (batch, length) -> (batch, length, 256)."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.embedding(tokens) + self.position(positions))
        return functional.linear(self.norm(hidden), self.embedding.weight)


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a layer norm and beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.queries_keys_values(self.norm_attention(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in split)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = hidden + self.perceptron(self.norm_perceptron(hidden))
        return out
