"""A parsed YAML file as a pydantic model, or its most helpful problem in one line with file and line number."""

from __future__ import annotations

import re
import types
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distsim.errors import ConfigError
from distsim.units import shown
from distsim.yamlfile import Document, Path, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


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
            members = {_tag(member): member for member in typing.get_args(kind) if member is not type(None)}
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


def _tag(member: Any) -> str:
    kind = getattr(member, "model_fields", {}).get("kind")
    return str(typing.get_args(kind.annotation)[0]) if kind is not None else ""


def _form(kind: Any) -> str:
    """Return the keys of a model as an expected form, or nothing for what is no model."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return ""
    required = [field.alias or name for name, field in kind.model_fields.items() if field.is_required()]
    return f"the keys {', '.join(required)}"
