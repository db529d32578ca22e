"""Quantities with units: `"25 Gbit/s"`, `"5 us"`, `"16 GiB"` <-> SI numbers (s, B, B/s).

Units are case-sensitive: `B` is a byte and `b` or `bit` a bit; 1 GB is 1e9 B and 1 GiB is 2**30 B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal

from distsim.errors import ConfigError, nearest

_SI = {"": "1", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15"}
_IEC = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_EIGHTH = Decimal("0.125")

# Decimal factors: float("2") * 1e-6 may round twice; one rounding makes "2 us" exactly the float 2e-06.
TIME_UNITS: Mapping[str, Decimal] = {
    **{"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "µs": Decimal("1e-6"), "μs": Decimal("1e-6")},
    **{"ms": Decimal("1e-3"), "s": Decimal(1), "min": Decimal(60), "h": Decimal(3600)},
}
BYTE_UNITS: Mapping[str, Decimal] = {
    **{f"{prefix}B": Decimal(factor) for prefix, factor in _SI.items()},
    **{f"{prefix}B": Decimal(factor) for prefix, factor in _IEC.items()},
}
BANDWIDTH_UNITS: Mapping[str, Decimal] = {
    **{f"{unit}/s": factor for unit, factor in BYTE_UNITS.items()},
    **{f"{prefix}bit/s": Decimal(factor) * _EIGHTH for prefix, factor in _SI.items()},
    **{f"{prefix}b/s": Decimal(factor) * _EIGHTH for prefix, factor in _SI.items()},
}

_QUANTITY = re.compile(
    r"\s*(?P<number>[+-]?(?:[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?"
    r"|(?i:nan|inf(?:inity)?)(?![a-zA-Z])))\s*(?P<unit>.*)",
    re.DOTALL,
)


def shown(value: object, limit: int = 60) -> str:
    """Return `value` as it is quoted in messages: on one line and never longer than about `limit`."""
    text = repr(value if not isinstance(value, str) else value[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}..."


def parse_time_s(text: object) -> float:
    """Return seconds, 0 or more, from a text such as `"2 us"`; ConfigError if it is none."""
    return _parse(text, TIME_UNITS, "a time", "2 us")


def parse_bytes(text: object) -> float:
    """Return bytes, 0 or more, from a text such as `"16 GiB"`; ConfigError if it is none."""
    return _parse(text, BYTE_UNITS, "a size", "16 GiB")


def parse_bandwidth_Bps(text: object) -> float:
    """Return bytes per second, above 0, from `"25 Gbit/s"` or `"450 GB/s"`; ConfigError if it is none."""
    value = _parse(text, BANDWIDTH_UNITS, "a bandwidth", "25 Gbit/s")
    if value == 0:
        # Nothing would ever arrive: a simulation could only hang or divide by zero.
        raise ConfigError(f'{shown(text)} is zero; expected a bandwidth above zero such as "25 Gbit/s"')
    return value


def _parse(text: object, units: Mapping[str, Decimal], what: str, example: str) -> float:
    expected = f'expected {what}: a number and a unit such as "{example}"'
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"{shown(text)} is not {what}; {expected}")
    number, unit = match["number"], match["unit"].strip()
    value = float(number)
    if not math.isfinite(value):
        raise ConfigError(f"{shown(text)} is not a finite number; {expected}")
    if number.startswith("-") and value != 0:
        raise ConfigError(f"{shown(text)} is negative; {expected}, zero or more")
    if not unit:
        raise ConfigError(f"{shown(text)} has no unit; {expected}; units: {', '.join(units)}")
    if unit not in units:
        raise ConfigError(f"{shown(text)} has the unknown unit {shown(unit)}; {expected}{_hint(unit, units)}")
    if value == 0:
        return 0.0
    result = float(Decimal(number) * units[unit])
    if not math.isfinite(result):
        raise ConfigError(f"{shown(text)} is too large; {expected}")
    return result


def _hint(unit: str, units: Mapping[str, Decimal]) -> str:
    """Name every unit that differs only in case ("gb/s" may mean bytes or bits), else the nearest one."""
    same = [name for name in units if name.casefold() == unit.casefold()]
    if same:
        return f"; did you mean {' or '.join(repr(name) for name in same)}? Case matters: B is byte, b is bit"
    return nearest(unit[:30], units)


def format_time(seconds: float) -> str:
    """Return seconds for humans, 4 significant digits: `"2 us"`, `"1.235 ms"`, `"90 s"`, `"2.5 h"`."""
    for unit, start in (("h", 7200.0), ("min", 120.0), ("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= start:
            return f"{seconds / float(TIME_UNITS[unit]):.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns" if seconds else "0 s"


def format_bytes(count: float) -> str:
    """Return bytes for humans in decimal units, 4 significant digits: `"16 B"`, `"1.5 GB"`."""
    for prefix in ("P", "T", "G", "M", "k"):
        scale = float(_SI[prefix])
        if abs(count) >= scale:
            return f"{count / scale:.4g} {prefix}B"
    return f"{count:.4g} B"


def format_bandwidth(Bps: float) -> str:
    """Return bytes per second for humans, 4 significant digits: `"450 GB/s"`."""
    return f"{format_bytes(Bps)}/s"


def exact_time(seconds: float) -> str:
    """Return a text from which `parse_time_s` gets the same float back: `"1.25e-05 s"`."""
    return f"{float(seconds)!r} s"


def exact_bandwidth(Bps: float) -> str:
    """Return a text from which `parse_bandwidth_Bps` gets the same float back: `"3100000000.0 B/s"`."""
    return f"{float(Bps)!r} B/s"
