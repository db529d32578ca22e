"""Chain: layers one after another, what each costs forward and backward, and how large what it leaves behind is.

Times and sizes are in whatever unit the file has them, or in seconds and bytes where it says `"unit": "SI"`. The
model is that of Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, "Optimal checkpointing for heterogeneous
chains" (2019), where `saved` is given, and without it one in which a backward needs plain activations.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from distsim.errors import ConfigError
from distsim.units import shown
from distsim.yamlfile import Document, did_you_mean
from distsim.yamlfile import read as read_document

Floats = npt.NDArray[np.float64]
Needs = Literal["input", "output", "both"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chain:
    """Layers 1..L. Layer i makes activation a_i of a_(i-1); its gradient g_i is as large as a_i.

    Raises: ConfigError for columns of unequal length, negative numbers, and half of a pair.
    """

    forward: Floats
    """Time of each layer's forward, shape (L,)."""
    backward: Floats
    """Time of each layer's backward, shape (L,)."""
    size: Floats
    """Of a_0, ..., a_L, shape (L + 1,)."""
    needs: Needs = "input"
    """What a backward reads beside its gradient: a_(i-1), a_i or both; with `saved` it reads abar_i and a_(i-1)."""
    saved: Floats | None = None
    """Of abar_i: all that layer i's backward needs and only a recording forward leaves, a_i among it; shape (L,)."""
    forward_tmp: Floats | None = None
    backward_tmp: Floats | None = None
    """Needed for the time of the operation alone, shape (L,); None: nothing."""
    write: Floats | None = None
    read: Floats | None = None
    """Time to copy a_1, ..., a_L to the disk (or to host memory) and back, shape (L,); None: there is none."""
    write_saved: Floats | None = None
    read_saved: Floats | None = None
    """The same for all of abar_i."""
    names: tuple[str, ...] = ()
    """Of the layers; none, or one for each."""
    unit: Literal["", "SI"] = ""
    """SI: seconds and bytes."""

    def __post_init__(self) -> None:
        layers = len(self.forward)
        if layers < 1:
            raise ConfigError("a chain needs at least one layer")
        if self.needs not in get_args(Needs):
            raise ConfigError(f"needs must be input, output or both, not {shown(self.needs)}")
        for name in COLUMNS:
            column = getattr(self, name)
            if column is None:
                continue
            column = np.asarray(column, np.float64)
            object.__setattr__(self, name, column)
            expected = layers + (name == "size")
            if column.shape != (expected,):
                raise ConfigError(f"{KEYS[name]} has {column.size} numbers; expected {expected} for {layers} layers")
            if not ((column >= 0) & (column <= MOST)).all():
                raise ConfigError(f"{KEYS[name]} must have numbers from 0 to {MOST:g}")
        for one, other in (("write", "read"), ("write_saved", "read_saved")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ConfigError(f"{one} and {other} belong together: give both or none")
        if self.write_saved is not None and self.saved is None:
            raise ConfigError("write_saved is the time to copy what size_saved says the size of; give both or none")
        if self.saved is not None and (self.saved < self.size[1:]).any():
            layer = int(np.argmax(self.saved < self.size[1:])) + 1
            raise ConfigError(f"size_saved of layer {layer} is less than its size: what is saved contains a_{layer}")
        if grain := self.grain:
            for name in SIZES:
                if getattr(self, name) is not None:
                    object.__setattr__(self, name, np.rint(getattr(self, name) / grain) * grain)
        if self.names and len(self.names) != layers:
            raise ConfigError(f"names has {len(self.names)} entries; expected {layers}, one for each layer")

    @property
    def grain(self) -> float:
        """What sizes that are not whole are multiples of: so fine that only the last bits of long fractions change, and
        so coarse that all sums are exact, in whatever order; 0 for whole sizes."""
        columns = [column for name in SIZES if (column := getattr(self, name)) is not None]
        if all((column == np.rint(column)).all() for column in columns):
            return 0.0
        return float(2.0 ** (math.frexp(4 * sum(float(column.sum()) for column in columns))[1] - 53))

    def below(self, peak: float) -> float:
        """Return the largest budget that is really less than a peak; sums that only rounding tells apart are one."""
        return peak - self._slack if self.grain else math.nextafter(peak, -math.inf)

    def allowed(self, budget: float) -> float:
        """Return a budget as it is meant: a sum of fractions may differ from it in the last bits."""
        return budget + self._slack

    @property
    def _slack(self) -> float:
        return 8 * (self.layers + 1) * self.grain

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return len(self.forward)

    @property
    def plain_time(self) -> float:
        """Every forward and every backward once: what no plan can be faster than."""
        return float(self.forward.sum() + self.backward.sum())

    @property
    def offloads(self) -> bool:
        """Whether anything can be copied to disk."""
        return self.write is not None or self.write_saved is not None

    def tmp(self, forward: bool) -> Floats:
        """Return what forwards, or backwards, need for themselves, shape (L,)."""
        column = self.forward_tmp if forward else self.backward_tmp
        return np.zeros(self.layers) if column is None else column

    def to_json(self) -> str:
        """Return the file that `read` reads."""
        values: dict[str, Any] = {"L": self.layers, "needs": self.needs, "unit": self.unit, "names": list(self.names)}
        values |= {
            KEYS[name]: plain_numbers(getattr(self, name)) for name in COLUMNS if getattr(self, name) is not None
        }
        kept = {key: value for key, value in values.items() if value not in ("", [])}
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()) + "\n}\n"


KEYS = {
    **{"forward": "fwd", "backward": "bwd", "size": "size", "saved": "size_saved"},
    **{"forward_tmp": "fwd_tmp", "backward_tmp": "bwd_tmp", "write": "write", "read": "read"},
    **{"write_saved": "write_saved", "read_saved": "read_saved"},
}
"""Column -> its key in a file."""
COLUMNS = tuple(each.name for each in fields(Chain) if each.name in KEYS)

SIZES = ("size", "saved", "forward_tmp", "backward_tmp")
MOST = 1e30
"""The largest number: sums of products of such numbers do not overflow."""

ABOUT = ("id", "kind", "model", "title", "source", "points", "layers")
ANSWERS = ("frontier", "largest_gap", "time_", "budget_", "extra_")
"""Keys, and beginnings of keys, that a solved instance may have beside its numbers; they are not read."""


def plain_numbers(column: Floats) -> list[float | int]:
    """Return numbers for JSON: whole ones as such."""
    return [plain_number(number) for number in column.tolist()]


def plain_number(number: float) -> float | int:
    """Return a number for JSON: a whole one as such, a fraction without the last bits, which are noise in sums."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else float(f"{number:.15g}")


def read(path: str) -> Chain:
    """Read a chain file, JSON as in `Chain.to_json`.

    Raises: ConfigError with file and line for what is missing, unknown, of the wrong length or no number.
    """
    return of_document(read_document(path))


def of_document(document: Document) -> Chain:
    """Make a chain of a parsed file."""
    data = document.data
    if not isinstance(data, dict):
        raise document.error((), 'not a chain; expected a JSON object with "fwd", "bwd" and "size"')
    if "cases" in data:
        raise document.error(("cases",), "several instances; expected a file with one of them")
    known = {*KEYS.values(), "L", "needs", "names", "unit"}
    for key in data:
        if key not in known and key not in ABOUT and not key.startswith(ANSWERS):
            raise document.error(
                (key,), f"unknown key{did_you_mean(key, sorted(known))}; valid: {', '.join(sorted(known))}"
            )
    for key in ("fwd", "bwd", "size"):
        if key not in data:
            raise document.error((), f'no "{key}"; expected "fwd", "bwd" and "size", lists of numbers')
    columns: Any = {name: _numbers(document, key) for name, key in KEYS.items() if key in data}
    layers = len(columns["forward"])
    if "L" in data and data["L"] != str(layers):
        raise document.error(("L",), f"{shown(data['L'])} layers, but fwd has {layers} numbers")
    for name, column in columns.items():
        expected = layers + (name == "size")
        if len(column) != expected:
            raise document.error((KEYS[name],), f"{len(column)} numbers; expected {expected} for {layers} layers")
    names = data.get("names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise document.error(("names",), "expected a list of names")
    for key, words in (("needs", get_args(Needs)), ("unit", ("SI",))):
        if key in data and data[key] not in words:
            raise document.error((key,), f"{shown(data[key])} is unknown; expected {' or '.join(words)}")
    try:
        texts: Any = {key: data[key] for key in ("needs", "unit") if key in data}
        return Chain(**columns, names=tuple(names), **texts)
    except ConfigError as error:
        raise document.error((), str(error)) from None


def _numbers(document: Document, key: str) -> Floats:
    values = document.data[key]
    if not isinstance(values, list):
        raise document.error((key,), f"{shown(values)} is not a list of numbers")
    found = []
    for place, value in enumerate(values):
        try:
            number = float(value) if isinstance(value, str) else math.nan
        except ValueError:
            number = math.nan
        if not 0 <= number <= MOST:
            raise document.error((key, place), f"{shown(value)} is not a number from 0 to {MOST:g}")
        found.append(number)
    return np.array(found, np.float64)
