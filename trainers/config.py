"""What describes a training run: one frozen set of values, the same on every rank.

Flags (`--batch-size 8`) and YAML (`batch_size: 8`, see `trainers.runfile`) are two spellings of it. Each field
knows how its value is read, from text or from what it is already, and what it means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distsim.errors import ConfigError, nearest
from distsim.exchanges import STRATEGIES, parse, ranks_of
from distsim.units import parse_size, shown
from trainers.workloads import BUILT_IN

WARM_UP = 2
"""Steps before those that are profiled: the first ones allocate, compile and connect, and the profiler starts."""

Option = int | float | str | bool | None


def _whole(least: int, most: int | None = None) -> Callable[[object], int]:
    def read(given: object) -> int:
        if isinstance(given, str) and re.fullmatch("[+-]?[0-9]{1,20}", given):
            given = int(given)
        if type(given) is not int:
            raise ConfigError(f"must be a whole number, not {shown(given)}")
        if most is not None and not least <= given <= most:
            raise ConfigError(f"must be a whole number from {least} to {most}, not {given}")
        if given < least:
            raise ConfigError(f"must be at least {least}, not {given}")
        return given

    return read


def _positive(given: object) -> float:
    try:
        value = float(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"must be a positive number, not {shown(given)}")
    return value


def _positive_or_none(given: object) -> float | None:
    if given in (None, "none"):
        return None
    try:
        return _positive(given)
    except ConfigError:
        raise ConfigError(f"must be a positive number or none, not {shown(given)}") from None


def _size_or_none(given: object) -> int | None:
    if given in (None, "none"):
        return None
    try:
        bare = not isinstance(given, bool) and re.fullmatch("[0-9]{1,16}", str(given))
        value = int(str(given)) if bare else parse_size(given)
    except ConfigError:
        value = 0
    if value < 1:
        raise ConfigError(f"must be bytes, as in 2GiB or 20000000, or none, not {shown(given)}")
    return value


def _place(given: object) -> str:
    if not isinstance(given, str | Path) or not str(given).strip():
        raise ConfigError(f"must be none, host or a folder, not {shown(given)}")
    return str(given)


def _flag(given: object) -> bool:
    if not isinstance(given, bool) and given not in ("true", "false"):
        raise ConfigError(f"must be true or false, not {shown(given)}")
    return given in (True, "true")


def _one_of(*words: str) -> Callable[[object], str]:
    def read(given: object) -> str:
        if not isinstance(given, str) or given not in words:
            raise ConfigError(f"must be {' or '.join(words)}, not {shown(given)}{_near(given, words)}")
        return given

    return read


def _near(given: object, words: tuple[str, ...]) -> str:
    hint = nearest(str(given)[:40], words)
    return hint if "did you mean" in hint else ""


def _text(given: object) -> str:
    if not isinstance(given, str) or not given.strip():
        raise ConfigError(f"must be a name with options, as in NAME:KEY=VALUE,..., not {shown(given)}")
    return given


def _strategy(given: object) -> str:
    try:
        return str(parse(_text(given)))
    except ConfigError as error:
        raise ConfigError(f"cannot be used: {error}") from None


def _workload(given: object) -> str:
    names = tuple(BUILT_IN)
    if isinstance(given, str) and given not in names:
        module, _, function = given.partition(":")
        if function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
            return given
    if given not in names:
        raise ConfigError(
            f"must be {', '.join(names)} or MODULE:FUNCTION of your own, not {shown(given)}{_near(given, names)}"
        )
    return str(given)


def _options(given: object) -> dict[str, Option]:
    """Read `layers=4,width=128`, or a mapping; values get the form that `plain` gives them."""
    if isinstance(given, str):
        pairs = [part.partition("=") for part in given.split(",")]
        if not all(key and equals and value for key, equals, value in pairs):
            raise ConfigError(f"must be KEY=VALUE,..., as in layers=4,width=128, not {shown(given)}")
        twice = [key for at, (key, _, _) in enumerate(pairs) if key in [other for other, _, _ in pairs[:at]]]
        if twice:
            raise ConfigError(f"must have each key once, but {twice[0]} is there twice")
        given = {key: value for key, _, value in pairs}
    if not isinstance(given, Mapping):
        raise ConfigError(f"must be a mapping, as in {{layers: 4, width: 128}}, not {shown(given)}")
    for key, value in given.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise ConfigError(f"must have names of a function's arguments as keys, not {shown(key)}")
        if value is not None and not isinstance(value, str | int | float | Path):
            raise ConfigError(f"must have one value for {key}, not {shown(value)}: a number, text, true or false")
    return {key: plain(option_text(value)) for key, value in given.items()}


def option_text(value: object) -> str:
    """Return an option's value as one writes it: 4, 0.1, true, none, or text as it is."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def plain(text: str) -> Option:
    """Return true, false, none and numbers as such, if `option_text` gives the same text back; others as they are.

    What type the workload wants, its function's annotation says; until then nothing may be lost.
    """
    if text in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text]
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        if str(value) == text and text not in ("nan", "inf", "-inf"):
            return value
    return text


def _about(read: Callable[[object], object], meaning: str) -> Mapping[str, Any]:
    return MappingProxyType({"read": read, "help": meaning})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A training run. Everything here is part of the fingerprint that ranks compare.

    Raises: ConfigError naming the flag that cannot be used, what was expected and the nearest valid name.
    """

    strategy: str = field(metadata=_about(_strategy, f"{', '.join(STRATEGIES)}; with options NAME:KEY=VALUE,..."))
    workers: int = field(metadata=_about(_whole(1), "ranks that compute gradients"))
    workload: str = field(
        default="language-model", metadata=_about(_workload, f"{', '.join(BUILT_IN)}, or MODULE:FUNCTION of your own")
    )
    options: Mapping[str, object] = field(
        default_factory=dict, hash=False, metadata=_about(_options, "the workload's, as in layers=4,width=128")
    )
    steps: int = field(default=50, metadata=_about(_whole(1), "optimizer steps"))
    batch_size: int = field(default=4, metadata=_about(_whole(1), "samples of a micro-batch, each worker"))
    accumulate: int = field(
        default=1, metadata=_about(_whole(1), "micro-batches of a worker in a step, with one exchange for all")
    )
    batch_norm: str = field(
        default="keep",
        metadata=_about(
            _one_of("keep", "sync", "group"),
            "statistics of batch normalisation: keep, over a worker's micro-batch; sync, over those that all workers "
            "have at a time; group, over each sample: group normalisation in its place",
        ),
    )
    uneven: str = field(
        default="join",
        metadata=_about(_one_of("join", "drop"), "samples left at an epoch's end: join, a smaller step, or drop"),
    )
    optimizer: str = field(
        default="SGD:lr=0.1,momentum=0.9", metadata=_about(_text, "class of torch.optim, with its arguments")
    )
    schedule: str = field(
        default="constant", metadata=_about(_text, "of the learning rate: constant, linear, cosine; warmup=, final=")
    )
    clip_norm: float | None = field(
        default=None, metadata=_about(_positive_or_none, "largest norm of all gradients together, or none")
    )
    dtype: str = field(
        default="float32", metadata=_about(_one_of("float32", "float64"), "float32 or float64: of parameters")
    )
    precision: str = field(
        default="full",
        metadata=_about(
            _one_of("full", "bf16", "fp16"), "of the forward pass: full, bf16 or fp16, the latter with loss scaling"
        ),
    )
    compile: bool = field(default=False, metadata=_about(_flag, "compile the model with torch.compile"))
    memory_budget: int | None = field(
        default=None,
        metadata=_about(
            _size_or_none,
            "bytes, as in 2GiB, for the activations and their gradients of one micro-batch in the workload's layers: "
            "they are measured and planned, to keep, recompute or offload; none: all is kept",
        ),
    )
    offload: str = field(
        default="none",
        metadata=_about(_place, "where a memory budget may copy activations to: none, host (its memory) or a folder"),
    )
    bucket_mb: float = field(
        default=25.0, metadata=_about(_positive, "gradients exchanged together, in MB of 1e6 bytes")
    )
    overlap: bool = field(
        default=True, metadata=_about(_flag, "exchange while backward goes on, and not after it between barriers")
    )
    transport: str = field(
        default="auto",
        metadata=_about(
            _one_of("auto", "tcp", "torch", "library"),
            "auto, tcp (our own), torch (torch.distributed) or library (its ring all-reduce, not the schedule)",
        ),
    )
    evaluate_every: int = field(default=0, metadata=_about(_whole(0), "steps between evaluations; 0: none"))
    profile: int = field(default=0, metadata=_about(_whole(0), "steps traced by torch.profiler; 0: none"))
    seed: int = field(default=0, metadata=_about(_whole(0, 2**63 - 1), "of weights, order of samples and dropout"))

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, read(each.name, getattr(self, each.name)))
        try:
            servers = self.servers
        except ConfigError as error:
            raise ConfigError(f"--strategy {self.strategy} cannot have {self.workers} workers: {error}") from None
        transport = f"--transport {self.transport}"
        if servers and self.transport != "auto":
            raise ConfigError(f"{transport} connects workers; dedicated servers are reached through Ray: leave it out")
        if servers and self.batch_norm == "sync":
            raise ConfigError(
                "--batch-norm sync goes over torch.distributed, and with dedicated servers workers are Ray actors; use "
                "--batch-norm group, or let workers be servers: --strategy parameter-server:placement=colocated"
            )
        if self.transport == "library" and parse(self.strategy).name != "ring":
            raise ConfigError(
                f"{transport} is the library's ring all-reduce; with --strategy {self.strategy} use --transport auto"
            )
        if self.profile and self.profile + WARM_UP > self.steps:
            raise ConfigError(
                f"--profile {self.profile}: with {WARM_UP} steps of warm-up that takes {self.profile + WARM_UP} steps, "
                f"and --steps is {self.steps}"
            )
        if self.offload != "none" and self.memory_budget is None:
            raise ConfigError(f"--offload {self.offload} is for what does not fit into a --memory-budget; give one")
        if self.memory_budget is not None and self.compile:
            raise ConfigError(
                "--memory-budget runs layers one by one, some of them again, and --compile makes one function of them; "
                "leave one of the two out"
            )
        if self.batch_norm == "sync" and self.compile:
            raise ConfigError(
                "--batch-norm sync talks to the other workers at every normalisation, where a compiled function has to "
                "end: --compile would have next to nothing to compile; leave one of the two out"
            )
        if self.precision != "full" and self.dtype != "float32":
            raise ConfigError(
                f"--precision {self.precision} computes in less than the parameters have; use --dtype float32"
            )

    @property
    def servers(self) -> int:
        """Ranks beyond the workers: dedicated parameter servers."""
        return ranks_of(self.strategy, self.workers) - self.workers


FIELDS = {each.name: each for each in fields(RunConfig)}


def read(name: str, given: object) -> Any:
    """Return a field's value from text, as flags and files have it, or from a value as it is.

    Raises: ConfigError that begins with the field's flag.
    """
    try:
        return FIELDS[name].metadata["read"](given)
    except ConfigError as error:
        raise ConfigError(f"--{name.replace('_', '-')} {error}") from None
