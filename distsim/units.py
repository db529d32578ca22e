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


def parse_size(text: object) -> int:
    """Return a whole number of bytes, 0 or more, from a text such as `"1 GiB"`; ConfigError if it is none."""
    value = parse_bytes(text)
    if not value.is_integer() or value > 2**53:  # floats beyond are whole, but not the number that was written
        raise ConfigError(f'{shown(text)} is not a whole number of bytes up to 2^53; expected a size such as "16 GiB"')
    return int(value)


MAX_SIZES = 10_000
"""Most sizes that one text may stand for; a step that was meant to be a factor gives millions."""


def parse_sizes(text: str) -> list[int]:
    """Return the bytes that a text stands for: sizes and ranges of sizes, with commas between them.

    A range is `FIRST:LAST:xFACTOR` or `FIRST:LAST:+STEP`, as nccl-tests has it in its flags -b, -e, -f and -i:
    `"8B:1KiB:x2"` is 8, 16, ..., 1024 and `"1MiB:2MiB:+256KiB"` is five sizes. LAST is the most, whether or not
    the steps hit it. ConfigError for anything else.
    """
    sizes: list[int] = []
    for part in text.split(","):
        fields = part.strip().split(":")
        if len(fields) == 1:
            sizes.append(parse_size(fields[0]))
            continue
        rule = fields[-1].strip()
        if len(fields) != 3 or rule[:1] not in ("x", "+"):
            raise ConfigError(
                f"{shown(part)} is not a range of sizes; "
                "expected FIRST:LAST:xFACTOR or FIRST:LAST:+STEP such as 8B:16GiB:x2 or 1MiB:8MiB:+1MiB"
            )
        size, last = parse_size(fields[0]), parse_size(fields[1])
        if size > last:
            raise ConfigError(f"{shown(part)}: the first size is above the last; expected FIRST <= LAST")
        if rule[0] == "+":
            factor, step = 1, parse_size(rule[1:])
            if step == 0:
                raise ConfigError(f"{shown(part)}: a step of 0 never ends; expected a size above 0 such as +1MiB")
        else:
            factor, step = _whole(part, rule[1:]), 0
            if size == 0:
                raise ConfigError(f"{shown(part)}: 0 times a factor stays 0; expected a first size above 0 such as 8B")
        while size <= last:
            if len(sizes) == MAX_SIZES:
                raise ConfigError(f"{shown(text)} is more than {MAX_SIZES} sizes; expected a larger factor or step")
            sizes.append(size)
            size = size * factor + step
    return sizes


def _whole(part: str, factor: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", factor) or int(factor) < 2:
        raise ConfigError(f"{shown(part)} has the factor {shown(factor)}; expected a whole number from 2 such as x2")
    return int(factor)


def parse_bandwidth_Bps(text: object) -> float:
    """Return bytes per second, above 0, from `"25 Gbit/s"` or `"450 GB/s"`; ConfigError if it is none."""
    value = _parse(text, BANDWIDTH_UNITS, "a bandwidth", "25 Gbit/s")
    if value == 0:
        # Nothing would ever arrive: a simulation could only hang or divide by zero.
        raise ConfigError(f'{shown(text)} is zero; expected a bandwidth above zero such as "25 Gbit/s"')
    return value


def parse_factor(text: object) -> float:
    """Return a number above 0 that has no unit, from a text such as `"1.5"`; ConfigError if it is none."""
    match = _QUANTITY.fullmatch(str(text)) if isinstance(text, str | int | float) else None
    value = float(match["number"]) if match is not None and not match["unit"].strip() else math.nan
    if not (0 < value < math.inf):
        raise ConfigError(f"{shown(text)} is not a factor; expected a number above zero without a unit, such as 2.5")
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
