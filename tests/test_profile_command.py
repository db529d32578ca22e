"""`python -m trainers.profile`: the file it writes, what it shows, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distsim.memory.chain import read as read_chain
from trainers.profile import main

SMALL = ["--workload", "mlp", "--options", "widths=8-4,samples=16", "--batch-size", "4", "--rounds", "1"]


def test_the_command_writes_a_chain_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "chain.json"
    assert main([*SMALL, "--out", str(path), "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    chain = read_chain(str(path))
    assert (chain.layers, chain.unit) == (3, "SI")
    assert chain.size.tolist() == [4 * 256 * 4, 4 * 8 * 4, 4 * 4 * 4, 4 * 10 * 4]
    lines = shown.out.splitlines()
    assert lines[0].split() == ["layer", "forward", "backward", "activation", "saved", "write", "read"]
    assert [line.split("  ")[0] for line in lines[2:6]] == ["0 Sequential", "1 Sequential", "2 Linear", "all"]
    assert lines[5].split()[5:9] == ["352", "B", "544", "B"]  # 128 + 64 + 160; GELU's inputs of 128 + 64 beside
    assert "input 4.096 kB" in shown.out and str(tmp_path) in shown.out and str(path) in lines[-1]
    assert shown.err == ""


def test_the_command_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chain.json"
    assert main([*SMALL, "--out", str(path), "--json", "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert out == path.read_text()
    assert json.loads(out)["size"] == [4 * 256 * 4, 4 * 8 * 2, 4 * 4 * 2, 4 * 10 * 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload", "mpl"], "--workload must be"),
        (["--options", "width=8"], "--workload mlp has no option 'width'; did you mean 'widths'?"),
        (["--batch-size", "17"], "--batch-size 17: the workload has 16 samples"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--rounds", "0"], "rounds must be at least 1, not 0"),
        (["--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--dtype", "float64", "--precision", "bf16"], "--precision bf16 computes in less than the parameters have"),
        (["--workload", "digits", "--options", "width=8"], "a memory plan needs an nn.Sequential, and the model is"),
        (["--out", "/dev/null/chain.json"], "/dev/null: cannot write there"),
        (["--folder", "/dev/null"], "/dev/null"),
    ],
)
def test_the_commands_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "chain.json"), *flags]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("trainers.profile: error: ") and message in shown.err
    assert shown.out == "" and not (tmp_path / "chain.json").exists()
