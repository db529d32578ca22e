"""Dropout switched off wherever it is: in modules, in functions that a forward calls, inside attention and LSTMs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

OFF: dict[str, bool | float] = {"training": False, "train": False, "dropout_p": 0.0}
"""Arguments that switch dropout off."""
PYTHON = {
    functional.dropout: "training",
    functional.dropout1d: "training",
    functional.dropout2d: "training",
    functional.dropout3d: "training",
    functional.alpha_dropout: "training",
    functional.feature_alpha_dropout: "training",
    functional.multi_head_attention_forward: "dropout_p",
}
"""Functions that drop, and the argument that each of them has for it."""
NATIVE: dict[Any, tuple[int, str]] = {
    torch.dropout: (2, "train"),
    torch.feature_dropout: (2, "train"),
    torch.alpha_dropout: (2, "train"),
    torch.feature_alpha_dropout: (2, "train"),
    functional.scaled_dot_product_attention: (4, "dropout_p"),
}
"""The same of those that Python cannot look into, with the argument's place."""


class _Off(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PYTHON:
            bound = signature(func).bind(*args, **kwargs)
            bound.arguments[PYTHON[func]] = OFF[PYTHON[func]]
            return func(*bound.args, **bound.kwargs)
        if func in NATIVE:
            place, name = NATIVE[func]
            if len(args) > place:
                args = (*args[:place], OFF[name], *args[place + 1 :])
            elif name in kwargs:
                kwargs = kwargs | {name: OFF[name]}
        return func(*args, **kwargs)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let nothing be dropped in this block; recurrent layers get back what they had."""
    recurrent = [(each, each.dropout) for each in model.modules() if isinstance(each, nn.RNNBase)]
    try:
        for each, _ in recurrent:
            each.dropout = 0.0
        with _Off():
            yield
    finally:
        for each, share in recurrent:
            each.dropout = share
