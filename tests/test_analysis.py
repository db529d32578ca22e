"""Tables and figures from records alone: everything here is made up, nothing is trained."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from analysis.__main__ import main
from analysis.comparison import Pair, comparison_table, read_pairs
from distsim import record
from distsim.record import RunRecord, Spans, Totals

PARAMS, STEPS = 1000, 20


def made_up(strategy: str, origin: str, time_s: float, observable: bool = True) -> RunRecord:
    """Two ranks send each other the whole array once an exchange; a second phase of messages for the server's."""
    phases = (0, 1) if strategy == "parameter-server" else (0,)
    rows = [(phase, row) for phase in phases for row in (0, 1)]
    exchanges = 1 if origin == "simulated" else STEPS
    messages = len(rows) * exchanges
    spans = Spans(
        schedule=[phase for phase, _ in rows],
        row=[row for _, row in rows],
        step=[0] * len(rows),
        src=[row for _, row in rows],
        dst=[1 - row for _, row in rows],
        chunk=[0] * len(rows),
        bytes=[4 * PARAMS] * len(rows),
        start_s=[phase * time_s / 2 for phase, _ in rows],
        finish_s=[(phase + 1) * time_s / 2 for phase, _ in rows],
    )
    per_link = messages // 2
    totals = Totals(
        messages=messages,
        bytes=messages * 4 * PARAMS,
        message_sizes={4 * PARAMS: messages},
        links=[(0, 1, per_link, per_link * 4 * PARAMS), (1, 0, per_link, per_link * 4 * PARAMS)],
    )
    return RunRecord(
        origin="simulated" if origin == "simulated" else "measured",
        strategy=strategy,
        workers=2,
        ranks=2,
        params=PARAMS,
        dtype="float32",
        schedule_digest="0" * 64,
        exchanges=exchanges,
        totals=totals if observable else record.NOT_OBSERVABLE,
        exchange_time_s=[time_s] if origin == "simulated" else [time_s * 0.5] + [time_s] * (STEPS - 2) + [time_s * 9],
        losses=[] if origin == "simulated" else np.linspace(5.5, 2.25, STEPS).tolist(),
        spans=spans if observable else None,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pairs, one of them with a library that hides its messages, and a simulated record alone."""
    for strategy, simulated_s, measured_s, observable in (
        ("parameter-server", 9e-3, 10e-3, True),
        ("ring", 3e-3, 2e-3, False),
    ):
        record.write(made_up(strategy, "simulated", simulated_s), tmp_path / f"{strategy}.simulated.json")
        measured = made_up(strategy, "measured", measured_s, observable)
        record.write(measured, tmp_path / f"{strategy}.measured.json")
    record.write(made_up("all-to-all", "simulated", 1e-3), tmp_path / "all-to-all.simulated.json")
    return tmp_path


def cells(line: str) -> list[str]:
    """The cells of a line of a table; two blanks or more lie between them."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_pairs_are_read_by_name_and_single_records_left_out(folder: Path) -> None:
    pairs = read_pairs(folder)
    assert [pair.measured.strategy for pair in pairs] == ["parameter-server", "ring"]
    assert all(pair.simulated.origin == "simulated" and pair.measured.origin == "measured" for pair in pairs)


def test_the_table_multiplies_the_simulated_exchange_and_says_what_cannot_be_seen(folder: Path) -> None:
    head, *lines = comparison_table(read_pairs(folder)).splitlines()
    assert head == "2 workers, 1,000 parameters (float32), 20 steps"
    server, ring = (
        next(cells(line) for line in lines if line.startswith(name)) for name in ("parameter-server", "ring")
    )
    assert server == ["parameter-server", "80", "80", "320,000", "320,000", "9 ms", "10 ms", "-10%", "5.5000", "2.2500"]
    assert ring == [
        *("ring", "40", "not observable", "160,000", "not observable"),
        *("3 ms", "2 ms", "+50%", "5.5000", "2.2500"),
    ]


def test_the_error_is_that_of_the_simulated_time_against_the_measured_median() -> None:
    """The mean of the measured times is 1.375 times their median: it does not count."""
    pair = Pair(made_up("ring", "simulated", 4e-3), made_up("ring", "measured", 2e-3))
    assert pair.error == pytest.approx(1.0)


def test_the_figure_is_a_png_with_something_on_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    shown = capsys.readouterr()
    assert (shown.err, matplotlib.get_backend().lower()) == ("", "agg")
    assert "not observable" in shown.out
    assert shown.out.splitlines()[-1] == f"figure and records: {folder}"
    path = folder / "comparison.png"
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", raw[16:24]) == (12 * 120, int((3.2 + 2.6 * 2) * 120))
    pixels = image.imread(path)[:, :, :3]
    assert pixels.shape[2] == 3
    height = pixels.shape[0]
    for colour in ("#4c78a8", "#f58518", "#54a24b"):  # simulated and gradients, measured, parameters
        wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        assert (np.abs(pixels - wanted).max(axis=2) < 0.02).sum() > 500, colour
    for part in np.array_split(np.arange(height), 3):  # every row of charts has ink
        assert 0.01 < (pixels[part].min(axis=2) < 0.5).mean() < 0.9


def damage(folder: Path, what: str) -> str:
    """Spoil the folder; return what the message must hold."""
    path = folder / "ring.measured.json"
    text = path.read_text()
    if what == "torn":
        path.write_text(text[: len(text) // 2])
        return "ring.measured.json:"
    if what == "empty":
        path.write_text("")
        return "ring.measured.json:1: not a run record"
    if what == "not text":
        path.write_bytes(b"\xff\xfe\x00")
        return "ring.measured.json: not a run record: it is not UTF-8 text"
    if what == "another format":
        path.write_text(json.dumps({**json.loads(text), "format": "distsim run record 99"}))
        return "ring.measured.json: not a run record: format"
    if what == "unknown key":
        path.write_text(json.dumps({**json.loads(text), "surprise": 1}))
        return "ring.measured.json: not a run record: surprise"
    if what == "a folder":
        path.unlink()
        path.mkdir()
        return "ring.measured.json: cannot read it: Is a directory"
    for file in folder.glob("*.measured.json"):
        file.unlink()
    return f"{folder}: no NAME.simulated.json with a NAME.measured.json beside it"


@pytest.mark.parametrize(
    "what", ("torn", "empty", "not text", "another format", "unknown key", "a folder", "nothing measured")
)
def test_bad_records_are_one_message_and_exit_code_2(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = damage(folder, what)
    assert main([str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("analysis: error: ")
    assert expected in shown.err
    assert shown.err.count("\n") == 1
    assert not (folder / "comparison.png").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"analysis: error: {tmp_path / 'none'}: no NAME.simulated.json")


def test_a_figure_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "comparison.png").mkdir()
    assert main([str(folder)]) == 2
    assert "comparison.png: cannot write it" in capsys.readouterr().err


def test_a_measured_record_without_losses_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads((folder / "ring.measured.json").read_text())
    (folder / "ring.measured.json").write_text(json.dumps({**values, "losses": []}))
    assert main([str(folder)]) == 2
    assert "ring.measured.json" in capsys.readouterr().err
