"""Ranges of sizes, nccl-tests' columns and the fastest strategy, against naive generators and formulas."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsim import api, exchanges, step
from distsim.cli import main
from distsim.cluster import ideal, load
from distsim.errors import ConfigError
from distsim.units import MAX_SIZES, parse_size, parse_sizes

Capture = pytest.CaptureFixture[str]

# What doc/PERFORMANCE.md of nccl-tests gives for n ranks, over algorithm bandwidth.
BUS: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1,
    "reduce": lambda n: 1,
    "personalised-all-to-all": lambda n: (n - 1) / n,
}


def rows_of(text: str) -> list[list[str]]:
    """Split the lines that are no comments into cells."""
    return [line.split() for line in text.splitlines() if not line.startswith("#")]


def run(capsys: Capture, command: str) -> str:
    """Run a command that must succeed and say nothing on stderr; return its stdout."""
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@given(st.integers(1, 10**6), st.integers(0, 10**9), st.integers(2, 1000))
def test_factors_give_the_powers_up_to_the_last(first: int, more: int, factor: int) -> None:
    last = first + more
    wanted = list(takewhile(lambda size: size <= last, (first * factor**k for k in count())))
    assert parse_sizes(f"{first}B:{last}B:x{factor}") == wanted


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(200, 10**6))
def test_steps_give_the_multiples_up_to_the_last(first: int, more: int, by: int) -> None:
    assert parse_sizes(f"{first}B:{first + more}B:+{by}B") == list(range(first, first + more + 1, by))


@given(st.lists(st.integers(0, 2**53), min_size=1, max_size=9))
def test_commas_stand_between_sizes_in_any_order(sizes: list[int]) -> None:
    assert parse_sizes(",".join(f"{size}B" for size in sizes)) == sizes


def test_units_and_ranges_mix() -> None:
    assert parse_sizes("8B:16GiB:x2") == [2**k for k in range(3, 35)]
    assert parse_sizes("1 GiB") == [2**30]
    assert parse_sizes("1MB:2MB:+300kB, 5B") == [1_000_000, 1_300_000, 1_600_000, 1_900_000, 5]
    assert parse_size("1.5 KiB") == 1536


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a size"),
        ("8", "'8' has no unit; expected a size"),
        ("8B:1KiB", "'8B:1KiB' is not a range of sizes; expected FIRST:LAST:xFACTOR or FIRST:LAST:+STEP"),
        ("8B:1KiB:2", "is not a range of sizes"),
        ("8B:1KiB:x2:x2", "is not a range of sizes"),
        ("8B:1KiB:x1", "has the factor '1'; expected a whole number from 2"),
        ("8B:1KiB:x1.5", "has the factor '1.5'"),
        ("8B:1KiB:x", "has the factor ''"),
        ("8B:1KiB:+0B", "a step of 0 never ends"),
        ("8B:1KiB:+-1B", "is negative"),
        ("0B:1KiB:x2", "0 times a factor stays 0"),
        ("1KiB:8B:x2", "the first size is above the last"),
        ("0.5B", "'0.5B' is not a whole number of bytes"),
        ("9PiB", "is not a whole number of bytes up to 2^53"),
        ("1mib", "unknown unit 'mib'"),
        ("1B:1GiB:+1B", f"more than {MAX_SIZES} sizes"),
    ],
)
def test_what_is_no_size_is_one_message(text: str, message: str, capsys: Capture) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sizes(text)
    assert message in str(caught.value)
    assert main(["exchange", "ring", "--ranks", "2", "--sizes", text]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("collective", BUS)
def test_the_columns_are_those_of_nccl_tests(collective: str, capsys: Capture) -> None:
    """Size, count, type, redop, strategy, time in us, algbw and busbw in GB/s; the average of busbw last."""
    ranks, strategy = 6, api.known(collective)[0]
    command = f"exchange {strategy} --ranks {ranks} --sizes 8B:1MiB:x32,102B --dtype float64 --collective {collective}"
    text = run(capsys, command)
    values = json.loads(run(capsys, f"{command} --json"))
    rows = rows_of(text)
    assert len(rows) == len(values["sizes"]) == 5
    for asked, cells, value in zip([8, 256, 8192, 262144, 102], rows, values["sizes"], strict=True):
        assert value["collective"] == collective
        params = asked // 8  # nccl-tests leaves the incomplete element out, too
        assert (value["size_bytes"], value["params"]) == (8 * params, params)
        redop = "sum" if "reduce" in collective else "none"
        assert cells[:5] == [str(8 * params), str(params), "float64", redop, strategy]
        time_s, algbw_Bps = value["time_s"], value["size_bytes"] / value["time_s"]
        assert value["algbw_Bps"] == pytest.approx(algbw_Bps, rel=1e-12)
        assert value["busbw_Bps"] == pytest.approx(algbw_Bps * BUS[collective](ranks), rel=1e-12)
        shown = [time_s * 1e6, value["algbw_Bps"] / 1e9, value["busbw_Bps"] / 1e9]
        assert [float(cell) for cell in cells[5:]] == pytest.approx(shown, abs=0.00501)
    busbw = [value["busbw_Bps"] for value in values["sizes"]]
    assert values["average_busbw_Bps"] == pytest.approx(sum(busbw) / len(busbw), rel=1e-12)
    assert f"# Avg bus bandwidth: {sum(busbw) / len(busbw) / 1e9:.2f} GB/s" == text.splitlines()[-1]


def test_headers_stand_over_their_columns(capsys: Capture) -> None:
    lines = run(capsys, "exchange auto --ranks 4 --sizes 1KiB,1GiB").splitlines()
    assert lines[0].startswith("# all-reduce on 4 ranks of ideal: ")
    assert lines[1].split()[1:] == ["size", "count", "type", "redop", "strategy", "time", "algbw", "busbw"]
    assert lines[2].split()[1:] == ["(B)", "(elements)", "(us)", "(GB/s)", "(GB/s)"]
    for column in ("size", "count", "type", "redop", "time", "algbw", "busbw"):
        end = lines[1].index(column) + len(column)
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for line in lines[3:-1])


def test_rows_appear_as_they_are_computed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate, shown = api.simulate, []

    def watched(*arguments: Any, **settings: Any) -> api.Result:
        shown.append(capsys.readouterr().out)
        return simulate(*arguments, **settings)

    monkeypatch.setattr(api, "simulate", watched)
    assert main(["exchange", "ring", "--ranks", "3", "--sizes", "8B,16B,32B"]) == 0
    assert [len(rows_of(text)) for text in shown] == [0, 1, 1]
    assert [cells[0] for cells in rows_of(capsys.readouterr().out)] == ["32"]


def test_nothing_sent_has_no_bandwidth(capsys: Capture) -> None:
    text = run(capsys, "exchange ring --ranks 1 --sizes 8B,1MiB")
    assert [cells[5:] for cells in rows_of(text)] == [["0.00", "-", "-"]] * 2
    assert text.endswith("# Avg bus bandwidth: none, nothing is sent\n")
    values = json.loads(run(capsys, "exchange ring --ranks 4 --sizes 3B,8B --json"))  # 3 bytes are no float32
    assert [value["busbw_Bps"] is None for value in values["sizes"]] == [True, False]
    assert values["average_busbw_Bps"] == values["sizes"][1]["busbw_Bps"]


@pytest.mark.parametrize("cluster", ["ideal", "dgx_h100", "h100_2x8_ndr"])
@pytest.mark.parametrize("collective", ["all-reduce", "all-gather", "broadcast"])
def test_auto_is_the_least_of_all(cluster: str, collective: str, capsys: Capture) -> None:
    where = "" if cluster == "ideal" else f"--cluster {cluster}"
    command = f"exchange --algorithm auto --ranks 8 --sizes 64B:64MiB:x1024 {where} --collective {collective}"
    chosen = set()
    for value in json.loads(run(capsys, f"{command} --json"))["sizes"]:
        times, misfits = {}, []
        for name in exchanges.ALGORITHMS[collective]:
            exchange = exchanges.build(name, 8, value["params"], collective)
            on = ideal(exchange.ranks) if cluster == "ideal" else load(cluster)
            try:
                times[name] = step.simulate(exchange, on).time_s
            except ConfigError:
                misfits.append(name)
        assert value["time_s"] == min(times.values())
        assert times[value["strategy"]] == value["time_s"]
        assert {name: time for name, time in value["candidates"].items() if isinstance(time, float)} == times
        assert [name for name, time in value["candidates"].items() if isinstance(time, str)] == misfits
        chosen.add(value["strategy"])
    assert [cells[4] in chosen for cells in rows_of(run(capsys, command))] == [True] * 3


def test_auto_with_one_size_shows_its_candidates(capsys: Capture) -> None:
    text = run(capsys, "exchange auto --ranks 8 --params 1000 --cluster dgx_h100")
    assert all(f"candidate: {name} " in text for name in exchanges.STRATEGIES)
    (misfit,) = (line for line in text.splitlines() if "candidate: parameter-server" in line)
    assert misfit.endswith("does not fit")


def test_the_strategy_has_two_spellings_and_is_given_once(capsys: Capture) -> None:
    rest = "--ranks 4 --params 100 --json"
    assert run(capsys, f"exchange ring {rest}") == run(capsys, f"exchange --algorithm ring {rest}")
    for command in (f"exchange {rest}", f"exchange ring --algorithm ring {rest}"):
        assert main(command.split()) == 2
        assert "expected one strategy, as STRATEGY or as --algorithm STRATEGY" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["exchange auto --sizes 8B:64KiB:x16", "compare --params 100"])
def test_csv_has_the_values_of_json(command: str, capsys: Capture, tmp_path: Path) -> None:
    command = f"{command} --ranks 8 --cluster dgx_h100"
    text = run(capsys, f"{command} --csv")
    run(capsys, f"{command} --csv {tmp_path / 'table.csv'}")
    assert (tmp_path / "table.csv").read_text() == text
    values = json.loads(run(capsys, f"{command} --json"))
    rows = list(csv.DictReader(io.StringIO(text)))
    expected = values if isinstance(values, list) else values["sizes"]
    assert len(rows) == len(expected)
    for row, value in zip(rows, expected, strict=True):
        for name, cell in row.items():
            wanted = value.get(name)
            assert cell == ("" if wanted is None else str(wanted)), name
    assert {"strategy", "time_s", "busbw_Bps", "size_bytes"} <= rows[0].keys()


def test_csv_tells_zero_from_nothing(capsys: Capture) -> None:
    (row,) = csv.DictReader(io.StringIO(run(capsys, "exchange ring --ranks 1 --params 5 --csv")))
    assert (row["messages"], row["time_s"], row["algbw_Bps"]) == ("0", "0.0", "")


def test_one_stdout_takes_one_format(capsys: Capture, tmp_path: Path) -> None:
    for command in ("exchange ring --ranks 2 --sizes 8B --json --csv", "compare --ranks 2 --params 1 --csv --json"):
        assert main(command.split()) == 2
        assert "--json and --csv both go to stdout" in capsys.readouterr().err
    text = run(capsys, f"exchange ring --ranks 2 --sizes 8B --json --csv {tmp_path / 'x.csv'}")
    assert json.loads(text)["sizes"][0]["params"] == 2
    assert main(f"exchange ring --ranks 2 --sizes 8B,16B --record {tmp_path / 'x.json'}".split()) == 2
    assert "--record takes one exchange, but --sizes has 2" in capsys.readouterr().err
