"""Strategy specs: a name with options, as in `ring:channels=2,bidirectional=true`.

The options of a strategy are the keyword parameters of its builder, with their types and defaults; every
strategy takes `segments=k` besides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from distsim.errors import ConfigError, nearest
from distsim.exchanges.recipe import Recipe

Builder = Callable[..., Recipe]
Value = int | bool | str

MAX_VALUE = 4096
"""Largest number that an option takes: tables grow with most of them."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A strategy and its options, those that differ from their defaults."""

    name: str
    options: dict[str, Value]
    segments: int = 1

    def __str__(self) -> str:
        """Return the canonical form: options in the builder's order, defaults left out, segments last."""
        values = {**self.options, **({"segments": self.segments} if self.segments > 1 else {})}
        given = ",".join(f"{key}={str(value).lower()}" for key, value in values.items())
        return f"{self.name}:{given}" if given else self.name


def parse(text: str, builders: Mapping[str, Builder]) -> Spec:
    """Read a spec for one of `builders`.

    Raises: ConfigError naming the strategy, option or value that is unknown, and the nearest one.
    """
    name, colon, rest = text.partition(":")
    if name not in builders:
        raise ConfigError(f"unknown strategy {name!r}{nearest(name, builders)}")
    known = options_of(builders[name]) | {"segments": (int, 1)}
    given: dict[str, Value] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"{text!r}: expected KEY=VALUE, not {part!r}, as in {name}:segments=2")
        if key not in known:
            raise ConfigError(f"{name} has no option {key!r}{nearest(key, known)}")
        if key in given:
            raise ConfigError(f"{text!r}: {key} is given twice")
        given[key] = _value(f"{name}: {key}", value, known[key][0])
    segments = given.pop("segments", 1)
    assert isinstance(segments, int)
    return Spec(name, {key: given[key] for key in known if key in given and given[key] != known[key][1]}, segments)


@cache
def options_of(builder: Builder) -> dict[str, tuple[Any, Any]]:
    """Return (type, default) of each option of a builder."""
    hints = get_type_hints(builder)
    parameters = inspect.signature(builder).parameters.values()
    return {each.name: (hints[each.name], each.default) for each in parameters if each.kind is each.KEYWORD_ONLY}


def _value(what: str, text: str, kind: Any) -> Value:
    """Read an option's value: a count, true or false, or one of several words."""
    if get_origin(kind) is Literal:
        words = get_args(kind)
        if text not in words:
            raise ConfigError(f"{what} cannot be {text!r}{nearest(text, words)}")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{what} must be true or false, not {text!r}")
        return text == "true"
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 0 < int(text) <= MAX_VALUE):
        raise ConfigError(f"{what} must be a whole number from 1 to {MAX_VALUE}, not {text!r}")
    return int(text)
