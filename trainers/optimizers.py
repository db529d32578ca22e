"""Optimizers and learning rates by spec: `AdamW:lr=3e-4,betas=0.9;0.95` and `cosine:warmup=100,final=0.1`.

The optimizers are the classes that torch.optim has, and their options are the keyword arguments of these.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distsim.errors import ConfigError, nearest

EXPECTED = {NoneType: "none", bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
"""What an option's text may be, by the type of its values."""


def names() -> dict[str, type[Optimizer]]:
    """Return the optimizers that this torch has, by name."""
    exported = ((name, getattr(torch.optim, name)) for name in sorted(dir(torch.optim)))
    return {
        name: kind
        for name, kind in exported
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }


def build(spec: str, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Return the optimizer that a spec names, over parameters.

    A value is written as in Python, but `true`, `false` and `none` in small letters and a tuple with `;` between
    its items.

    Raises: ConfigError naming the optimizer, option or value that is unknown, and the nearest one; with the
    optimizer's own words if it refuses a value or the parameters, or if it needs more than dense gradients for
    its steps (LBFGS: a closure; SparseAdam: sparse gradients).
    """
    name, given = _split("optimizer", spec)
    known = names()
    if name not in known:
        same = [each for each in known if each.lower() == name.lower()]
        hint = f"; did you mean {same[0]!r}?" if same else nearest(name, known)
        raise ConfigError(f"unknown optimizer {name!r}{hint}")
    kind, parameters = known[name], list(parameters)
    options = _options(f"optimizer {name}", given, _types(kind))
    try:
        optimizer = kind(parameters, **options)
    except Exception as error:  # each optimizer refuses in its own way, and all they are given is the user's
        raise ConfigError(f"optimizer {spec!r}: {_line(error)}") from None
    try:
        _one_step(kind, options, parameters[0])
    except Exception as error:
        raise ConfigError(
            f"optimizer {spec!r} cannot make the steps of this training, from dense gradients and without a "
            f"closure: {_line(error)}"
        ) from None
    return optimizer


def learning_rates(spec: str, optimizer: Optimizer, steps: int) -> LambdaLR:
    """Return the learning rates of `steps` steps as multiples of the optimizer's: call `step()` after each.

    `constant`, `linear` (to `final` of the rate at the last step) or `cosine` (half a wave, to the same). With
    `warmup=N` the rate grows linearly over the first N steps, from 1/N of it, and descends from there.

    Raises: ConfigError naming what is unknown or out of range.
    """
    name, given = _split("schedule", spec)
    if name not in SHAPES:
        raise ConfigError(f"unknown schedule {name!r}{nearest(name, SHAPES)}")
    types: dict[str, Any] = {"warmup": int} | ({"final": float} if name != "constant" else {})
    options = _options(f"schedule {name}", given, types)
    warmup: int = options.get("warmup", 0)
    final: float = options.get("final", 0.0)
    if not 0 <= warmup < steps:
        raise ConfigError(f"schedule {spec!r}: warmup must be from 0 to {steps - 1}, less than the {steps} steps")
    if not 0 <= final <= 1:
        raise ConfigError(f"schedule {spec!r}: final is a fraction of the learning rate, from 0 to 1")
    shape, peak = SHAPES[name], max(warmup - 1, 0)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - peak) / max(steps - 1 - peak, 1), 1.0)
        return final + (1 - final) * shape(done)

    return LambdaLR(optimizer, factor)


SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""How much of the rate's descent is left when this part of it, 0 to 1, is done."""


def _split(what: str, spec: str) -> tuple[str, dict[str, str]]:
    """Take a spec `NAME:KEY=VALUE,...` apart."""
    name, colon, rest = spec.partition(":")
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"{what} {spec!r}: expected KEY=VALUE, not {part!r}, as in {name}:KEY=VALUE,KEY=VALUE")
        if key in given:
            raise ConfigError(f"{what} {spec!r}: {key} is given twice")
        given[key] = value
    return name, given


def _types(kind: type[Optimizer]) -> dict[str, Any]:
    """Return the types of an optimizer's options: as annotated, or else that of the default."""
    annotated = get_type_hints(kind.__init__)
    options = list(inspect.signature(kind).parameters.values())[1:]  # the first one are the parameters
    return {each.name: annotated.get(each.name, type(each.default)) for each in options}


def _options(what: str, given: Mapping[str, str], types: Mapping[str, Any]) -> dict[str, Any]:
    """Read options of these types."""
    options = {}
    for key, text in given.items():
        if key not in types:
            raise ConfigError(f"{what} has no option {key!r}{nearest(key, types)}")
        try:
            options[key] = _value(text, types[key])
        except ValueError as error:
            raise ConfigError(f"{what}: {key} cannot be {text!r}; expected {error}") from None
    return options


def _value(text: str, kind: Any) -> Any:
    """Read a value; ValueError says what was expected."""
    if get_origin(kind) is tuple:
        kinds, parts = get_args(kind), text.split(";")
        if len(parts) != len(kinds):
            raise ValueError(f"{len(kinds)} values with ';' between them")
        return tuple(map(_value, parts, kinds))
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in kinds and text == "none":
        return None
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        if number in kinds:
            try:
                value = number(text)
            except ValueError:
                continue
            if math.isfinite(value):
                return value
    if str in kinds:
        return text
    raise ValueError(" or ".join(words for each, words in EXPECTED.items() if each in kinds))


def _one_step(kind: type[Optimizer], options: Mapping[str, Any], like: nn.Parameter) -> None:
    """Make a step of one parameter: some optimizers and options fail only there, when training has begun."""
    parameter = nn.Parameter(torch.zeros(1, 1, dtype=like.dtype, device=like.device))
    parameter.grad = torch.zeros_like(parameter)
    kind([parameter], **options).step()


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
