"""The journal of a sweep: one writer, and files that are something else stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distsim.errors import ConfigError
from distsim.journal import Journal


def test_two_sweeps_do_not_write_one_file(tmp_path: Path) -> None:
    with Journal(tmp_path / "x.journal"), pytest.raises(ConfigError, match="another sweep is writing it"):
        Journal(tmp_path / "x.journal")
    Journal(tmp_path / "x.journal").__exit__()  # free again


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"format": "distsim sweep journal 2"}\n', 1),
        ("a,b\n1,2\n", 1),
        ("x", 1),
        ('{"format": "distsim sweep journal 1"}\n{"key": "k", "row": {}}\ntorn\n{"key": "k", "row": {}}\n', 3),
        ('{"format": "distsim sweep journal 1"}\n{"row": {}}\n', 2),
        ('{"format": "distsim sweep journal 1"}\n7\n', 2),
    ],
)
def test_a_file_that_is_no_journal_is_left_alone(content: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "x.journal"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"x.journal:{line}: not a line of a sweep's journal; delete the file"):
        Journal(file)
    assert file.read_text() == content


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "a": {"time_s": 0.1 + 0.2, "error": None},
        "b": {"time_s": 5e-324, "error": "zu groß\n"},
    }
    with Journal(tmp_path / "x.journal") as journal:
        for key, row in rows.items():
            journal.add(key, row)
    with Journal(tmp_path / "x.journal") as journal:
        assert journal.rows == rows


def test_a_journal_is_on_the_disk_within_a_second_and_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = [100.0], []
    monkeypatch.setattr("distsim.journal.time.monotonic", lambda: now[0])
    with Journal(tmp_path / "x.journal") as journal:
        monkeypatch.setattr("distsim.journal.os.fsync", lambda file: synced.append(now[0]))
        for seconds in (0.0, 0.9, 0.1, 0.5, 0.6):
            now[0] += seconds
            journal.add(f"{now[0]}", {})
    assert synced == [101.0, 102.1, 102.1]
