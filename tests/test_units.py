"""Quantities with units: exact values, one clear message for every mistake, round trips."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsim import units
from distsim.errors import ConfigError

times = st.floats(min_value=1e-12, max_value=1e9)
sizes = st.floats(min_value=1, max_value=1e18)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2 us", 2e-06),
        ("2us", 2e-06),
        ("1.9 µs", 1.9e-06),
        ("1.9 μs", 1.9e-06),
        ("7 ns", 7e-09),
        ("3.5 ms", 0.0035),
        ("0 s", 0.0),
        ("-0 s", 0.0),
        (".5 s", 0.5),
        ("2 min", 120.0),
        ("1.5 h", 5400.0),
        ("  1e-3   s ", 0.001),
    ],
)
def test_time(text: str, seconds: float) -> None:
    assert units.parse_time_s(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"),
    [("16 GiB", 2**34), ("1 GB", 1e9), ("1 kB", 1e3), ("1 KiB", 1024), ("0 B", 0), ("1.5 PiB", 1.5 * 2**50)],
)
def test_bytes(text: str, count: float) -> None:
    assert units.parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "Bps"),
    [("25 Gbit/s", 3.125e9), ("25 Gb/s", 3.125e9), ("450 GB/s", 450e9), ("8 bit/s", 1.0), ("1 GiB/s", 2**30)],
)
def test_bandwidth(text: str, Bps: float) -> None:
    assert units.parse_bandwidth_Bps(text) == Bps


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (units.parse_time_s, "2", "has no unit"),
        (units.parse_time_s, "2 sec", "unknown unit 'sec'"),
        (units.parse_time_s, "2 usec", "did you mean 'us'?"),
        (units.parse_time_s, "-2 us", "negative"),
        (units.parse_time_s, "nan s", "not a finite number"),
        (units.parse_time_s, "inf s", "not a finite number"),
        (units.parse_time_s, "-Infinity s", "not a finite number"),
        (units.parse_time_s, "1e999 s", "not a finite number"),
        (units.parse_time_s, "", "is not a time"),
        (units.parse_time_s, "fast", "is not a time"),
        (units.parse_time_s, "1,000 us", "unknown unit"),
        (units.parse_time_s, "٣ s", "is not a time"),
        (units.parse_time_s, 2, "2 is not a time"),
        (units.parse_time_s, None, "None is not a time"),
        (units.parse_bytes, "1e9", "has no unit"),
        (units.parse_bytes, "16 gib", "did you mean 'GiB'?"),
        (units.parse_bandwidth_Bps, "450 gb/s", "did you mean 'GB/s' or 'Gb/s'? Case matters"),
        (units.parse_bandwidth_Bps, "100 Gbps", "did you mean 'Gb/s'?"),
        (units.parse_bandwidth_Bps, "25 GB", "unknown unit 'GB'"),
        (units.parse_bandwidth_Bps, "2 us", "unknown unit 'us'"),
        (units.parse_bandwidth_Bps, "0 GB/s", "is zero"),
        (units.parse_bandwidth_Bps, "1e-999 GB/s", "is zero"),
        (units.parse_bandwidth_Bps, "1e308 PB/s", "too large"),
        (units.parse_bandwidth_Bps, "1e1000000000000000000000 PB/s", "not a finite number"),
    ],
)
def test_a_mistake_says_what_was_given_and_what_is_expected(
    parse: Callable[[object], float], text: object, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert says in message
    assert str(text) in message
    assert "expected a" in message
    assert "\n" not in message


def test_a_long_mistake_is_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        units.parse_time_s("9" * 300 + "x" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (3e-9, "3 ns"),
        (2e-6, "2 us"),
        (1.2345e-3, "1.234 ms"),
        (90, "90 s"),
        (600, "10 min"),
        (9000, "2.5 h"),
        (math.inf, "inf h"),
    ],
)
def test_format_time(seconds: float, text: str) -> None:
    assert units.format_time(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(16, "16 B"), (0, "0 B"), (999, "999 B"), (1.5e9, "1.5 GB"), (2**30, "1.074 GB")]
)
def test_format_bytes(count: float, text: str) -> None:
    assert units.format_bytes(count) == text
    assert units.format_bandwidth(count) == f"{text}/s"


@given(times)
def test_times_for_humans_read_back_within_a_thousandth(seconds: float) -> None:
    assert units.parse_time_s(units.format_time(seconds)) == pytest.approx(seconds, rel=6e-4)


@given(sizes)
def test_sizes_for_humans_read_back_within_a_thousandth(count: float) -> None:
    assert units.parse_bytes(units.format_bytes(count)) == pytest.approx(count, rel=6e-4)
    assert units.parse_bandwidth_Bps(units.format_bandwidth(count)) == pytest.approx(count, rel=6e-4)


@given(st.floats(min_value=0, allow_infinity=False))
def test_exact_texts_read_back_to_the_same_float(value: float) -> None:
    assert units.parse_time_s(units.exact_time(value)) == value
    if value:
        assert units.parse_bandwidth_Bps(units.exact_bandwidth(value)) == value


@given(st.decimals(min_value=0, max_value=10**6, places=3), st.sampled_from(sorted(units.TIME_UNITS)))
def test_a_quantity_is_rounded_once(number: object, unit: str) -> None:
    # Decimal arithmetic is exact here, so the result must be the nearest float.
    assert units.parse_time_s(f"{number} {unit}") == float(number * units.TIME_UNITS[unit])  # type: ignore[operator]


@given(st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text())))
def test_anything_else_is_a_config_error(text: object) -> None:
    for parse in (units.parse_time_s, units.parse_bytes, units.parse_bandwidth_Bps):
        try:
            value = parse(text)
        except ConfigError:
            continue
        assert math.isfinite(value) and value >= 0


@pytest.mark.parametrize(("text", "value"), [("2", 2.0), ("1.5", 1.5), (" 1e3 ", 1000.0), (4, 4.0), (0.25, 0.25)])
def test_a_factor_is_a_number_without_a_unit(text: object, value: float) -> None:
    assert units.parse_factor(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e999", "2 us", "two", "", "2x", None, [2]])
def test_what_is_no_factor(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a factor; expected a number above zero without a unit"):
        units.parse_factor(text)
