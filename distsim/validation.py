"""A parsed YAML file as a pydantic model, or its most helpful problem in one line with file and line number.

Beside that, the types of field that such models are made of: counts, names, quantities with their source.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from distsim.errors import ConfigError
from distsim.units import parse_bandwidth_Bps, parse_factor, parse_time_s, shown
from distsim.yamlfile import Document, Path, did_you_mean

Model = TypeVar("Model", bound=BaseModel)

MAX_COUNT = 1_048_576
"""Largest count in a file: beyond it a typo is likelier than a cluster."""


def parse_count(text: object) -> int:
    """Return a whole number from 1 to MAX_COUNT; ConfigError otherwise."""
    digits = str(text) if isinstance(text, str | int) and not isinstance(text, bool) else ""
    if digits.isascii() and digits.isdecimal() and len(digits) <= 9 and 1 <= int(digits) <= MAX_COUNT:
        return int(digits)
    raise ConfigError(f"{shown(text)} is not a count; expected a whole number from 1 to {MAX_COUNT}")


def parse_flag(text: object) -> bool:
    """Return True or False from `true` or `false`; ConfigError otherwise."""
    if isinstance(text, bool) or text in ("true", "false"):
        return text in (True, "true")
    raise ConfigError(f"{shown(text)} is neither true nor false; expected `true` or `false`")


def one_of(*words: str) -> BeforeValidator:
    """Accept one of `words`; ConfigError, with the nearest, otherwise."""

    def known(text: object) -> object:
        if text in words:
            return text
        hint = did_you_mean(str(text), list(words))
        raise ConfigError(f"{shown(text)} is unknown; expected one of: {', '.join(words)}{hint}")

    return BeforeValidator(known)


def _sane(unit: str, least: float, most: float) -> AfterValidator:
    """Refuse numbers that no cluster has and that would overflow sums and quotients of a simulation."""

    def within(value: float) -> float:
        if value != 0 and not least <= value <= most:
            amount = f" {unit}" if unit else ""
            raise ConfigError(f"{value:g}{amount} is out of range; expected {least:g} to {most:g}{amount}")
        return value

    return AfterValidator(within)


class Fields(BaseModel):
    """A mapping in a file: keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[int, BeforeValidator(parse_count)]
Flag = Annotated[bool, BeforeValidator(parse_flag)]
Ratio = Annotated[float, BeforeValidator(parse_factor), _sane("", 1e-3, 1e3)]
Slowdown = Annotated[float, BeforeValidator(parse_factor), _sane("", 1, 1e6)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class TimeQuantity(Fields):
    """`{value: "2 us", source: "..."}`"""

    value: Annotated[float, BeforeValidator(parse_time_s), _sane("s", 0, 1e6)] = Field(examples=['"2 us"'])
    source: Text = Field(examples=['"where the number comes from"'])


class BandwidthQuantity(Fields):
    """`{value: "450 GB/s", source: "..."}`"""

    value: Annotated[float, BeforeValidator(parse_bandwidth_Bps), _sane("B/s", 1e-3, 1e18)] = Field(
        examples=['"450 GB/s"']
    )
    source: Text = Field(examples=['"where the number comes from"'])


def validate(document: Document, model: type[Model]) -> Model:
    """Return `document` as a `model`; otherwise raise its most helpful problem as one ConfigError.

    A field's `examples[0]` is the expected form that messages show.
    """
    try:
        return model.model_validate(document.data)
    except ValidationError as invalid:
        problems = invalid.errors(include_url=False)
        # An unknown key first: it names the typo, where "the key is missing" would name its consequence.
        unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        raise _explain(document, model, (unknown or problems)[0]) from None


_NOT_A = {
    "model_type": "is not a mapping of keys to values",
    "model_attributes_type": "is not a mapping of keys to values",
    "dict_type": "is not a mapping of keys to values",
    "list_type": "is not a list",
    "tuple_type": "is not a list",
    "string_type": "is not a text",
    "string_too_short": "is empty",
    "string_too_long": "is too long",
    "too_short": "is empty",
    "too_long": "has too many items",
}


def _explain(document: Document, model: type[BaseModel], problem: ErrorDetails) -> ConfigError:
    kind, loc, given, context = problem["type"], problem["loc"], problem["input"], problem.get("ctx", {})
    owner, path, example = _walk(model, loc)
    expected = f"; expected {example}" if example else ""
    if kind == "extra_forbidden" and owner is not None:
        keys = [field.alias or name for name, field in owner.model_fields.items()]
        return document.error(
            path, f"unknown key; expected one of: {', '.join(keys)}{did_you_mean(str(loc[-1]), keys)}"
        )
    if kind == "missing":
        return document.error(path[:-1], f"the key {path[-1]!r} is missing{expected}")
    if kind == "union_tag_not_found":
        return document.error(path, f"the key 'kind' is missing{expected}")
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']+)'", context["expected_tags"])
        tag = str(context["tag"])[:40]
        message = f"unknown kind {shown(tag)}; expected one of: {', '.join(tags)}{did_you_mean(tag, tags)}"
        return document.error((*path, "kind"), message)
    if kind == "value_error":  # raised by our own validators, which say what was expected
        return document.error(path, str(context["error"]))
    return document.error(path, f"{shown(given)} {_NOT_A.get(kind, 'is not valid')}{expected}")


def _walk(model: type[BaseModel], loc: Path) -> tuple[type[BaseModel] | None, Path, str]:
    """Follow pydantic's location through the model's types.

    Returns the model that holds the last part, the path in the document (without the tags of unions and the
    marks of keys that pydantic puts between), and the expected form.
    """
    kind: Any = model
    owner: type[BaseModel] | None = None
    path: list[str | int] = []
    example = _form(model)
    for part in loc:
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            choices = [member for member in typing.get_args(kind) if member is not type(None)]
            members = {tag: member for member in choices for tag in _tags(member)}
            if part in members:
                kind = members[str(part)]
                example = _form(kind)
                continue
            kind = next(iter(members.values()))
        if part == "[key]":
            continue
        path.append(part)
        owner = None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            owner = kind
            fields = {field.alias or name: field for name, field in kind.model_fields.items()}
            if part not in fields:
                break
            examples = fields[str(part)].examples
            kind, example = fields[str(part)].annotation, f"{part}: {examples[0]}" if examples else ""
        else:
            arguments = [argument for argument in typing.get_args(kind) if argument is not Ellipsis]
            kind = arguments[-1] if arguments else None
            example = _form(kind) or example
    return owner, tuple(path), example


def _tags(member: Any) -> tuple[str, ...]:
    """Return the words of a model's field `kind`, which tell it from the others of its union."""
    kind = getattr(member, "model_fields", {}).get("kind")
    return typing.get_args(kind.annotation) if kind is not None else ("",)


def _form(kind: Any) -> str:
    """Return the keys of a model as an expected form, or nothing for what is no model."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return ""
    required = [field.alias or name for name, field in kind.model_fields.items() if field.is_required()]
    return f"the keys {', '.join(required)}"
