"""A workload: what is trained, on what. Yours is a function `module:function` that returns one.

    def build(*, width: int = 64) -> Workload:
        return Workload(model=MyModel(width), data=MyData(), loss=my_loss)

The function's keyword parameters are the options that `--options width=128` and YAML can give, read by their
annotations: int, float, str, bool, Path, Literal and unions of these with None.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from distsim.errors import ConfigError, DistsimError, nearest
from distsim.units import shown
from trainers.config import option_text, plain
from trainers.workloads import BUILT_IN


class Samples(Protocol):
    """What can be indexed: a list, a `torch.utils.data.Dataset` with a length, a class of your own."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return a sample, the same one on every rank."""


def first_dimension(batch: Any) -> int:
    """Return the length of a batch's first tensor: how many samples it has.

    Raises: ConfigError if there is no tensor with a dimension.
    """
    for tensor in _tensors(batch):
        if tensor.dim():
            return len(tensor)
    raise ConfigError("a batch has no tensor whose first dimension is its samples; give Workload a `count`")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workload:
    """A model, its data and its loss."""

    model: nn.Module
    data: Samples
    loss: Callable[[nn.Module, Any], Tensor]
    """Of a model and a batch: the SUM over all that counts in the batch, a scalar. Dividing comes later, by the
    count of all micro-batches and ranks; means of means are not the mean."""
    reduction: Literal["sum", "mean"] = "sum"
    """What `loss` returns. A mean, over what `count` says, is made a sum by `load`."""
    count: Callable[[Any], int] = first_dimension
    """How much counts in a batch: its samples, or its tokens that are not padding."""
    collate: Callable[[list[Any]], Any] = default_collate
    """Makes a batch of samples."""
    evaluation: Samples | None = None
    """Samples that are not trained on."""
    data_name: str = ""
    """What the data are, for the record; `load` fills it in where it is empty."""
    layers: str | None = None
    """The nn.Sequential that memory plans apply to, by its name in the model (`blocks`, `encoder.layers`); None: the
    model itself."""
    loop: Callable[[nn.Module, torch.optim.Optimizer, Sequence[Any], int], object] | None = None
    """A loop of your own for `python -m trainers.accumulation` to test, see `trainers.accumulation.loops`; training
    does not use it."""

    def __post_init__(self) -> None:
        """Raises: ConfigError if there is nothing to train, or nothing to train it on."""
        if not isinstance(self.model, nn.Module):
            raise ConfigError(f"a Workload's model must be a torch.nn.Module, not {type(self.model).__name__}")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError("a Workload's model must have parameters that require a gradient; it has none")
        for name in ("loss", "count", "collate", *(["loop"] if self.loop is not None else [])):
            if not callable(getattr(self, name)):
                raise ConfigError(f"a Workload's {name} must be a function, not {shown(getattr(self, name))}")
        if self.reduction not in ("sum", "mean"):
            raise ConfigError(f"a Workload's reduction must be sum or mean, not {shown(self.reduction)}")
        for name, samples in self.parts().items():
            if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
                raise ConfigError(
                    f"a Workload's {name} must have a length and an index (a list, a map-style dataset), "
                    f"which {_kind(samples)} has not"
                )
            if not len(samples):
                raise ConfigError(f"a Workload's {name} must have samples; this has none")

    def parts(self) -> dict[str, Samples]:
        """Return the samples by what they are for."""
        return {"data": self.data} | ({"evaluation": self.evaluation} if self.evaluation is not None else {})


def load(workload: str, options: Mapping[str, object], seed: int, dtype: str) -> Workload:
    """Call a workload's function with its options; its model's weights depend on the seed, and have this dtype.

    `workload` is a built-in name or `module:function`; modules are looked for in the current directory, too.

    Raises: ConfigError naming what is missing, unknown or of a wrong type, or where the function failed.
    """
    with torch.random.fork_rng(devices=[]):
        function = _find(BUILT_IN.get(workload, workload))
        arguments = _arguments(workload, function, options)
        torch.manual_seed(seed)
        with explained(f"--workload {workload}"):
            made = function(**arguments)
    if not isinstance(made, Workload):
        raise ConfigError(
            f"--workload {workload} returned {_kind(made)}; expected a trainers.workload.Workload(model=..., data=..., "
            "loss=...)"
        )
    lazy = [name for name, each in made.model.named_parameters() if isinstance(each, nn.UninitializedParameter)]
    if lazy:
        raise ConfigError(f"--workload {workload}: {lazy[0]} of its model has no size before the model has run once")
    made.model.to(getattr(torch, dtype))
    return replace(of_sums(made), data_name=made.data_name or f"the data of {workload}")


def of_sums(workload: Workload) -> Workload:
    """Return the same workload with a loss that is a sum, as all who train it expect."""
    if workload.reduction == "sum":
        return workload

    def loss(model: nn.Module, batch: Any) -> Tensor:
        count = workload.count(batch)
        if not count:
            return torch.zeros((), requires_grad=True)  # the mean of nothing is not a number
        return workload.loss(model, batch) * count

    return replace(workload, loss=loss, reduction="sum")


def sequence(workload: Workload) -> nn.Sequential:
    """Return the layers that memory plans apply to.

    Raises: ConfigError if the model has no such part, or if it is no nn.Sequential, or an empty one.
    """
    parts = dict(workload.model.named_modules())
    sequences = [name for name, part in parts.items() if name and isinstance(part, nn.Sequential)]
    choice = f"; its nn.Sequential parts: {', '.join(sequences[:8])}" if sequences else "; no part of it is one"
    name = workload.layers or ""
    found = parts.get(name)
    if found is None:
        hint = nearest(name, sequences if sequences else list(parts)[1:])
        raise ConfigError(f"the workload's layers={shown(name)} are no part of its model{hint}")
    if not isinstance(found, nn.Sequential):
        if not name:
            raise ConfigError(
                f"a memory plan needs an nn.Sequential, and the model is {_kind(found)}; give Workload "
                f"layers=, the name of one in it{choice}"
            )
        raise ConfigError(f"the workload's layers={shown(name)} must be an nn.Sequential, not {_kind(found)}{choice}")
    if not len(found):
        raise ConfigError(f"the workload's layers={shown(name)} must have layers; this nn.Sequential has none")
    return found


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on `device`, in whatever dicts, lists and tuples they are."""
    return mapped(batch, lambda tensor: tensor.to(device))


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with each of its tensors changed, in whatever dicts, lists and tuples they are."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [mapped(value, change) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def data_digest(workload: Workload) -> str:
    """SHA-256, in hexadecimal, of the number of samples and the first, middle and last of them.

    Data that draw from torch's random numbers are read with the same ones everywhere.

    Raises: ConfigError saying where reading a sample failed.
    """
    digest = hashlib.sha256()
    with torch.random.fork_rng(devices=[]):
        for name, samples in workload.parts().items():
            digest.update(f"{name} {len(samples)}".encode())
            for index in sorted({0, len(samples) // 2, len(samples) - 1}):
                torch.manual_seed(0)
                with explained(f"reading sample {index} of the workload's {name}"):
                    _feed(digest.update, samples[index])
    return digest.hexdigest()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    """Hash a sample by what it holds; of objects that are none of the usual kinds, their type."""
    if isinstance(value, Tensor):
        update(f"{value.dtype} {tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype} {value.shape}".encode())
        update(value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            _feed(update, key)
            _feed(update, value[key])
    elif isinstance(value, list | tuple):
        update(f"{len(value)}".encode())
        for part in value:
            _feed(update, part)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        update(f"{type(value).__name__} {value!r}".encode())
    else:
        update(type(value).__name__.encode())


def _find(reference: str) -> Callable[..., object]:
    """Import `module:function`."""
    name, _, attribute = reference.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    with explained(f"--workload {reference}: importing {name} failed"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, but what it imports is not
            raise ConfigError(f"there is no module {error.name!r}, neither in {here} nor installed") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        what = "is not a function" if hasattr(module, attribute) else "does not exist"
        raise ConfigError(f"--workload {reference}: {attribute} {what} in {name}{nearest(attribute, own)}")
    return typing.cast(Callable[..., object], function)


def _arguments(workload: str, function: Callable[..., object], options: Mapping[str, object]) -> dict[str, Any]:
    """Return `options` with the types that the function's annotations say."""
    with explained(f"--workload {workload}: reading the types of its options failed"):
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    known = {each.name: each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    others = next((each for each in parameters if each.kind is each.VAR_KEYWORD), None)
    arguments = {}
    for name, value in options.items():
        parameter = known.get(name, others)
        if parameter is None:
            hint = nearest(name, known) or "; it has none"
            raise ConfigError(f"--workload {workload} has no option {name!r}{hint}")
        text, kind = option_text(value), parameter.annotation
        what = f"--workload {workload}: {name}"
        arguments[name] = plain(text) if kind in (parameter.empty, Any) else _read(what, text, kind)
    for name, each in known.items():
        if each.default is each.empty and name not in arguments:
            raise ConfigError(f"--workload {workload} needs the option {name!r}, as in --options {name}=...")
    return arguments


def _read(what: str, text: str, annotation: Any) -> Any:
    """Read an option's text as its parameter's annotation says.

    Raises: ConfigError if it cannot be read so, or if no text can.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    for kind in sorted(kinds, key=lambda kind: kind in (str, Path)):  # any text is one of these: they come last
        if kind is type(None) and text == "none":
            return None
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if typing.get_origin(kind) is Literal:
            for word in typing.get_args(kind):
                if option_text(word) == text:
                    return word
        if kind in (int, float, str, Path):
            try:
                return kind(text)
            except ValueError:
                continue
    if unknown := [kind for kind in kinds if kind not in _EXPECTED and typing.get_origin(kind) is not Literal]:
        raise ConfigError(
            f"{what} is annotated with {_name(unknown[0])}; options can be int, float, str, bool, Path, Literal, "
            "and unions of these with None"
        )
    expected = [_EXPECTED.get(kind) or " or ".join(map(option_text, typing.get_args(kind))) for kind in kinds]
    raise ConfigError(f"{what} must be {' or '.join(expected)}, not {shown(text)}")


_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    type(None): "none",
}


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what somebody's own code raises into one message: what it is, and on which line of theirs."""
    try:
        yield
    except DistsimError as error:
        raise ConfigError(f"{what}: {error}") from None
    except (Exception, SystemExit) as error:
        where = _place(error)
        said = str(error).strip().splitlines()
        raise ConfigError(f"{what}: {type(error).__name__}{': ' + said[0] if said else ''}{where}") from error


def _place(error: BaseException) -> str:
    """Return " (file:line)" of the innermost frame that is neither ours nor a library's, if there is one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
