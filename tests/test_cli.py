"""The command line: every command, what --json prints, users' mistakes, and what is not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distsim import __version__, exchanges
from distsim.cli import main
from distsim.cluster import shipped
from distsim.record import read

KEYS_OF_THE_ISSUE = {
    *("strategy", "ranks", "params", "messages", "message_sizes", "bytes", "time_s"),
    *("latency_bound_s", "bandwidth_bound_s", "algbw_Bps", "busbw_Bps"),
}
KEYS = KEYS_OF_THE_ISSUE | {
    *("dtype", "cluster", "cluster_title", "any_algorithm_bound_s", "peak_staging_bytes"),
    *("size_bytes", "collective", "sharing", "posting"),
}
Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, command: str) -> str:
    """Run a command that must succeed and say nothing on stderr; return its stdout."""
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys: Capture, command: str) -> Any:
    """Run a command with --json; return the one value on stdout, which must be JSON by the standard."""
    text = run(capsys, f"{command} --json")
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def distsim(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "distsim.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_the_example_of_the_issue(capsys: Capture) -> None:
    values = as_json(capsys, "exchange ring --ranks 3 --params 12")
    assert values.keys() == KEYS | {"critical_path", "busiest"}
    assert values["messages"] == 12
    assert values["message_sizes"] == {"16": 12}
    assert (values["strategy"], values["ranks"], values["params"], values["bytes"]) == ("ring", 3, 12, 192)
    assert values["time_s"] == pytest.approx(4 * (5e-6 + 16 / 12.5e9), rel=1e-9)
    assert values["latency_bound_s"] == pytest.approx(20e-6, rel=1e-9)
    assert values["algbw_Bps"] == pytest.approx(48 / values["time_s"], rel=1e-9)
    assert values["busbw_Bps"] == pytest.approx(48 / values["time_s"] * 4 / 3, rel=1e-9)


@pytest.mark.parametrize("strategy", ["ring", "all-to-all"])
def test_one_rank_has_no_bandwidth(strategy: str, capsys: Capture) -> None:
    values = as_json(capsys, f"exchange {strategy} --ranks 1 --params 5")
    assert values.keys() == KEYS | {"critical_path", "busiest"}
    assert (values["messages"], values["message_sizes"], values["bytes"], values["time_s"]) == (0, {}, 0, 0)
    assert values["algbw_Bps"] is values["busbw_Bps"] is None
    assert "none: nothing is sent" in run(capsys, f"exchange {strategy} --ranks 1 --params 5")


def test_no_parameters_are_no_messages(capsys: Capture) -> None:
    for values in as_json(capsys, "compare --ranks 4 --params 0"):
        assert (values["messages"], values["time_s"], values["algbw_Bps"]) == (0, 0, None)
    assert "none" in run(capsys, "exchange ring --ranks 4 --params 0")


def test_exchange_prints_a_table(capsys: Capture) -> None:
    text = run(capsys, "exchange parameter-server --ranks 4 --params 1000000 --dtype float64 --cluster dgx_h100")
    assert text.startswith("parameter-server: 4 ranks, 1,000,000 parameters (float64) on dgx_h100: ")
    for part in ("messages", "8 x 8,000,000 B", "64,000,000", "chain of latencies", "busiest link", "algbw", "busbw"):
        assert part in text


def test_the_default_cluster_is_stated_and_takes_any_number_of_ranks(capsys: Capture) -> None:
    text = run(capsys, "exchange ring --ranks 100 --params 1000")
    assert "ideal switch: 100 Gbit/s per device each way, 5 us per message" in text
    assert as_json(capsys, "exchange parameter-server --ranks 300 --params 9")["messages"] == 600


def test_many_sizes_are_summed_up(capsys: Capture) -> None:
    assert "8 x 8 B, 4 x 12 B" in run(capsys, "exchange ring --ranks 3 --params 7")


def test_compare_puts_all_strategies_side_by_side(capsys: Capture) -> None:
    values = as_json(capsys, "compare --ranks 8 --params 1000 --cluster ethernet_16x10g")
    assert [value["strategy"] for value in values] == list(exchanges.STRATEGIES)
    assert all(value.keys() == KEYS and value["cluster"] == "ethernet_16x10g" for value in values)
    messages = {value["strategy"]: value["messages"] for value in values}
    assert (messages["all-to-all"], messages["parameter-server"], messages["ring"]) == (56, 16, 112)
    text = run(capsys, "compare --ranks 8 --params 1000 --cluster ethernet_16x10g")
    assert all(strategy in text for strategy in exchanges.STRATEGIES)
    assert "any algorithm on these 8 devices needs at least" in text
    assert "does not fit" not in text


def test_compare_says_what_does_not_fit(capsys: Capture) -> None:
    """8 GPUs take 8 workers, but not a server beside them: the other strategies are compared all the same."""
    reason = "cluster dgx_h100 has 8 devices, but parameter-server with 8 workers and 1 server needs 9"
    values = {value["strategy"]: value for value in as_json(capsys, "compare --ranks 8 --params 9 --cluster dgx_h100")}
    assert values.keys() == exchanges.STRATEGIES.keys()
    misfit = values.pop("parameter-server")
    assert misfit["error"].startswith(reason)
    assert (misfit["ranks"], "time_s" in misfit) == (8, False)
    assert all(value.keys() == KEYS for value in values.values())
    text = run(capsys, "compare --ranks 8 --params 9 --cluster dgx_h100")
    assert f"parameter-server: does not fit: {reason}" in text


@pytest.mark.parametrize("strategy", exchanges.STRATEGIES)
def test_check_proves(strategy: str, capsys: Capture) -> None:
    values = as_json(capsys, f"check {strategy} --ranks 5")
    exchange = exchanges.build(strategy, 5, 11)
    assert values == {
        "strategy": strategy,
        "ranks": 5,
        "params": 11,
        "messages": exchange.traffic(1).messages,
        "proven": True,
        "digest": exchange.digest(),
    }
    text = run(capsys, f"check {strategy} --ranks 5 --params 3")
    assert "proven" in text
    assert exchanges.build(strategy, 5, 3).digest() in text


def test_clusters_lists_the_shipped_ones(capsys: Capture) -> None:
    values = as_json(capsys, "clusters")
    assert [value["name"] for value in values] == shipped()
    assert {"laptop_loopback", "dgx_h100", "ethernet_16x10g", "h100_2x8_ndr"} <= set(shipped())
    lines = run(capsys, "clusters").splitlines()
    assert len(lines) == len(values)
    for line, value in zip(lines, values, strict=True):
        assert line.startswith(value["name"])
        assert f"{value['devices']:,} devices  {value['title']}" in line


def test_records_can_be_written_and_compared(capsys: Capture, tmp_path: Path) -> None:
    one, other, third = (tmp_path / name for name in ("one.json", "other.json", "third.json"))
    run(capsys, f"exchange ring --ranks 3 --params 12 --record {one}")
    values = as_json(capsys, f"exchange ring --ranks 3 --params 12 --cluster dgx_h100 --record {other}")
    assert read(other).time_s == values["time_s"]
    text = run(capsys, f"diff {one} {other}")
    assert "A (simulated)" in text
    assert "equal" in text
    assert "DIFFERENT" not in text
    assert as_json(capsys, f"diff {one} {other}")["agree"] is True

    content = json.loads(one.read_text())
    content["totals"]["messages"] += 1
    third.write_text(json.dumps(content))
    assert main(["diff", str(one), str(third)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    assert main(["diff", str(one), str(third), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["agree"] is False

    content["totals"] = "not observable"
    third.write_text(json.dumps(content))
    assert "not observable" in run(capsys, f"diff {one} {third}")


MISTAKES = [
    ("", "the following arguments are required: COMMAND"),
    ("exchnge ring", "invalid choice: 'exchnge'"),
    ("exchange", "the following arguments are required: --ranks"),
    ("exchange ring --ranks 3", "one of the arguments --params --sizes is required"),
    ("exchange ring --ranks 3 --params 1 --sizes 8B", "argument --sizes: not allowed with argument --params"),
    ("exchange --ranks 3 --params 1", "expected one strategy, as STRATEGY or as --algorithm STRATEGY; valid: auto"),
    ("exchange auto --ranks 9 --params 1 --cluster dgx_h100", "cluster dgx_h100 has 8 devices, but "),
    (
        "exchange ring --ranks 3 --params 1 --collective gather",
        "unknown collective 'gather'; did you mean 'all-gather'",
    ),
    (
        "exchange auto --ranks 3 --params 1 --collective gather",
        "unknown collective 'gather'; did you mean 'all-gather'",
    ),
    ("exchange ring --ranks 3 --params 1 --sharing fare", "argument --sharing: invalid choice: 'fare'"),
    ("exchange ring --ranks 3 --params 1 --csv /dev/null/x.csv", "/dev/null/x.csv: cannot write it"),
    ("compare --ranks 3", "one of the arguments --params --size is required"),
    ("compare --ranks 3 --size 8", "'8' has no unit"),
    ("sweep --strategies ring", "the following arguments are required: --ranks, --sizes, --out"),
    ("exchange rign --ranks 3 --params 12", "unknown strategy 'rign'; did you mean 'ring'?"),
    ("exchange all_to_all --ranks 3 --params 12", "did you mean 'all-to-all'?"),
    ("exchange parameter_server --ranks 3 --params 12", "did you mean 'parameter-server'?"),
    ("exchange qqq --ranks 3 --params 12", "valid: all-to-all, direct, "),
    ("check rings --ranks 3", "unknown strategy 'rings'; did you mean 'ring'?"),
    ("exchange ring --ranks 0 --params 12", "must be at least 1, not 0"),
    ("exchange ring --ranks -2 --params 12", "must be at least 1, not -2"),
    ("check ring --ranks 0", "must be at least 1, not 0"),
    ("compare --ranks 0 --params 1", "must be at least 1, not 0"),
    ("exchange ring --ranks 1000000 --params 12", "at most 4096 workers, not 1000000: tables for more do not fit"),
    ("check ring --ranks 4097", "at most 4096 workers, not 4097"),
    ("compare --ranks 99999999999999999999 --params 12", "workers, not 99999999999999999999"),
    (
        "exchange ring --ranks 4097 --params 12",
        "at most 4096 workers, not 4097: tables for more do not fit",
    ),
    ("exchange ring --ranks 3 --params -1", "the parameter count cannot be negative, but is -1"),
    ("exchange ring --ranks 3 --params 99999999999999999999", "at most 140737488355328 parameters"),
    ("exchange ring --ranks three --params 12", "argument --ranks: invalid int value: 'three'"),
    ("exchange ring --ranks 3.0 --params 12", "argument --ranks: invalid int value: '3.0'"),
    ("exchange ring --ranks 3 --params 1e6", "argument --params: invalid int value: '1e6'"),
    ("exchange ring --ranks 3 --params 12 --dtype float31", "argument --dtype: invalid choice: 'float31'"),
    ("exchange ring --ranks 3 --params 12 --colour", "unrecognized arguments: --colour"),
    ("exchange ring --ranks 3 --params 12 --cluster dgx_h10", "unknown cluster 'dgx_h10'; did you mean 'dgx_h100'?"),
    ("exchange ring --ranks 9 --params 12 --cluster dgx_h100", "8 devices, but ring with 9 workers needs 9"),
    ("compare --ranks 9 --params 12 --cluster dgx_h100", "cluster dgx_h100 has 8 devices, but "),
    ("exchange ring --ranks 3 --params 12 --cluster nowhere/c.yaml", "nowhere/c.yaml"),
    ("exchange ring --ranks 3 --params 12 --cluster /", "/"),
    ("exchange ring --ranks 3 --params 12 --record /dev/null/x.json", "/dev/null/x.json: cannot write it"),
    ("diff none.json none.json", "none.json: cannot read it: No such file or directory"),
    ("diff none.json", "the following arguments are required: B.json"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_mistakes_are_one_message_and_exit_code_2(command: str, message: str, capsys: Capture) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distsim: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err


def test_a_bad_file_names_its_line(capsys: Capture, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("title: t\nsource: s\ntopolgy: {}\n")
    assert main(["exchange", "ring", "--ranks", "2", "--params", "2", "--cluster", str(bad)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"distsim: error: {bad}:3: ")
    torn = tmp_path / "torn.json"
    torn.write_text('{\n"format":')
    assert main(["diff", str(torn), str(torn)]) == 2
    assert capsys.readouterr().err.startswith(f"distsim: error: {torn}:2: not a run record: ")


def test_lack_of_memory_and_ctrl_c_end_without_a_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for failure, code, message in (
        (MemoryError(), 2, "distsim: error: not enough memory for a schedule of that size; use fewer ranks\n"),
        (KeyboardInterrupt(), 130, ""),
    ):

        def fail(*_: object, failure: BaseException = failure) -> None:
            raise failure

        with monkeypatch.context() as context:
            context.setattr(exchanges, "build", fail)
            assert main(["check", "ring", "--ranks", "3"]) == code
        assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    "command", ["--help", "exchange --help", "compare --help", "sweep --help", "clusters --help", "--version"]
)
def test_help_is_printed_to_stdout(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith((f"usage: {' '.join(['distsim', *command.split()[:-1]])} ", f"distsim {__version__}"))


HEAVY = ("numba", "torch", "ray", "matplotlib", "networkx", "pydantic", "yaml", "tabulate", "scipy", "tqdm", "pyarrow")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import distsim", ("numpy", *HEAVY)),
        ("from distsim.cli import main; main(['--help'])", HEAVY),
        ("from distsim.cli import main; main(['exchange', '--help'])", HEAVY),
        ("from distsim.cli import main; main(['sweep', '--help'])", HEAVY),
        ("from distsim.cli import main; main(['check', 'ring', '--ranks', '4'])", HEAVY),
        (
            "from distsim.cli import main; main('exchange ring --ranks 4 --params 9 --cluster dgx_h100'.split())",
            ("numba", "torch", "ray", "matplotlib", "networkx", "scipy"),
        ),
    ],
)
def test_nothing_heavy_is_imported(code: str, absent: tuple[str, ...]) -> None:
    """What makes `--help` slow is imported by the commands that need it; a clock would not say so for sure."""
    lines = ["import sys", "try:", f"    {code}", "except SystemExit as end:", "    assert end.code == 0"]
    lines += [f"print(sorted(set({absent!r}) & set(sys.modules)), file=sys.stderr)"]
    result = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "[]\n")


def test_the_installed_command_works_from_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "title: mine\nsource: s\ntopology: {kind: switch, devices: 4, link: wire}\n"
        'links: {wire: {bandwidth: {value: "1 GB/s", source: s}, latency: {value: "1 us", source: s}}}\n'
    )
    common = ["exchange", "ring", "--ranks", "4", "--params", "8", "--json"]
    for name in ("h100_2x8_ndr", "mine.yaml", "./mine.yaml"):
        result = distsim(*common, "--cluster", name, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout)["messages"] == 24
    assert os.listdir(tmp_path) == ["mine.yaml"]


def test_mistakes_in_a_process_of_its_own() -> None:
    result = distsim("exchange", "rign", "--ranks", "3", "--params", "12")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "distsim: error: unknown strategy 'rign'; did you mean 'ring'?\n"


@pytest.mark.parametrize("command", ["clusters", "--help", "compare --ranks 3 --params 9"])
def test_a_reader_that_has_seen_enough_is_no_error(command: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "distsim.cli", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()  # before anything can have been written: Python takes longer than that to start
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 0


def test_a_large_simulation_says_what_it_does_on_stderr(capsys: Capture) -> None:
    assert main(["exchange", "ring", "--ranks", "1024", "--params", "1024", "--whole", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["messages"] == 1024 * 2 * 1023
    assert err == "distsim: ring: checking and simulating 2,095,104 transfers ...\n"


def test_a_crowd_is_announced_on_stderr(capsys: Capture) -> None:
    assert main(["exchange", "direct", "--ranks", "102", "--params", "102", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["messages"] == 2 * 102 * 101
    assert err == (
        "distsim: direct: 10,302 messages at once: where their links differ, sharing them can take minutes ...\n"
    )
