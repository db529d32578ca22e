"""The figure of fronts: what is read, what is drawn, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from analysis import fronts
from distsim.cli import main

CHAIN = {"fwd": [16, 21, 13, 26], "bwd": [32, 2, 58, 54], "size": [5, 3, 9, 4, 2]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A planned front, the same measured, and one in seconds."""
    monkeypatch.chdir(tmp_path)
    for name, values in (("plan", CHAIN), ("seconds", {**CHAIN, "unit": "SI"})):
        Path(f"{name}.chain").write_text(json.dumps(values))
        assert main(["memory", f"{name}.chain", "--pareto", "--json"]) == 0
        Path(f"{name}.json").write_text(capsys.readouterr().out)
    front = json.loads(Path("plan.json").read_text())
    for point in front["frontier"]:
        point |= {"measured_time": point["time"] + 1, "measured_peak_memory": point["peak_memory"] - 1}
    Path("measured.json").write_text(json.dumps({**front, "origin": "measured", "title": "seen"}))
    return tmp_path


def test_planned_fronts_are_lines_and_measured_ones_marks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *where: Any, **how: Any) -> None:
        drawn.append(figure)
        save(figure, *where, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert fronts.main(["plan.json", "measured.json", "--out", "front.png"]) == 0
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    lines = {str(line.get_label()): line for line in drawn[0].axes[0].get_lines()}
    points = json.loads((folder / "plan.json").read_text())["frontier"]
    budgets, times = [point["budget"] for point in points], [point["time"] for point in points]
    assert len(points) > 1
    assert list(lines["optimal"].get_xdata())[:-1] == budgets  # type: ignore[arg-type]
    assert list(lines["optimal"].get_ydata()) == [*times, times[-1]]  # type: ignore[arg-type]
    assert list(lines["seen"].get_ydata()) == [time + 1 for time in times]  # type: ignore[arg-type]
    assert lines["seen"].get_linestyle() == "None"


def test_what_is_no_front_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "chain.json").write_text(json.dumps(CHAIN))
    (folder / "text.json").write_text("front\n")
    for names, said in (
        ("none.json", "none.json: cannot read it"),
        ("text.json", "text.json:1: not JSON"),
        ("chain.json", "chain.json: not a front"),
        ("plan.json seconds.json", "cannot share a figure"),
    ):
        assert fronts.main([*names.split(), "--out", "front.png"]) == 2
        assert said in capsys.readouterr().err
    assert fronts.main(["plan.json", "--out", "plan.json/front.png"]) == 2
    assert not (folder / "front.png").exists()
