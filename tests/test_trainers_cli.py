"""The command lines of the trainers, as a user types them: what they print, write and refuse, and what is left.

Torchrun prints a report of its own when a process fails, with a traceback of its own code; none may be of ours.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from processes import IMPATIENT_S, TINY, TRAINERS, Run, Seen, batch, environment, run, torchrun

from distsim import cli, record
from distsim.record import RunRecord, Totals
from trainers.__main__ import main

pytestmark = pytest.mark.timeout(120)

NOT_FINITE = r"step [12]: the (loss|gradient) is not finite; lower the learning rate or set --clip-norm"

ROOT = Path(__file__).resolve().parent.parent
MODEL = (*TINY, "--steps", "3")
MODEL_OPTIONS = TINY[1]
DOUBLE = ("--dtype", "float64")
SIMULATED = ("--cluster", "laptop_loopback")
SMALL = "recursive-doubling"


def errors(ended: Run) -> list[str]:
    """Our own messages on stderr; fails if there is a traceback of our own code."""
    assert not re.search('File ".*/trainers/', ended.err), ended.err
    return re.findall(r"^.*trainers: error: .*$", ended.err, flags=re.MULTILINE)


def assert_simulated_as_measured(folder: Path, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`distsim diff` finds every count and every single message equal; `distsim exchange` says the same."""
    simulated, measured = (folder / f"{strategy}.{origin}.json" for origin in ("simulated", "measured"))
    assert cli.main(["diff", str(simulated), str(measured), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    verdicts = {line["name"]: line["verdict"] for line in compared["lines"]}
    assert compared["agree"] is True
    assert {name for name, verdict in verdicts.items() if verdict == "equal"} == {
        *("schedule digest", "messages", "bytes", "message sizes", "links", "message by message"),
        *(part.name for part in record.read(measured).parts),
    }
    assert_counts_of_distsim_exchange(record.read(measured), capsys)


def assert_counts_of_distsim_exchange(measured: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    """Part by part, and all of them together."""
    totals, sizes = [0, 0], Counter[str]()
    for part in measured.parts:
        of_gradients = part.name.startswith(record.BUCKET)
        # Numbers are summed over all ranks, servers too, in the fewest steps.
        strategy, ranks = (measured.strategy, measured.workers) if of_gradients else (SMALL, measured.ranks)
        flags = ["--ranks", str(ranks), "--params", str(part.params), "--dtype", part.dtype]
        assert cli.main(["exchange", strategy, *flags, "--json"]) == 0
        predicted = json.loads(capsys.readouterr().out)
        assert (part.messages, part.bytes) == (predicted["messages"], predicted["bytes"])
        totals = [totals[0] + part.messages, totals[1] + part.bytes]
        sizes.update(predicted["message_sizes"])
    assert isinstance(measured.totals, Totals)
    steps = measured.exchanges
    assert (measured.totals.messages, measured.totals.bytes) == (steps * totals[0], steps * totals[1])
    counted = {str(size): count for size, count in measured.totals.message_sizes.items()}
    assert counted == {size: count * steps for size, count in sizes.items()}


def test_ring_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = run(torchrun(4, "-m", "trainers", "--strategy", "ring", *MODEL, *SIMULATED), tmp_path)
    assert (ended.code, ended.left, errors(ended)) == (0, [], []), ended.err
    shown = ended.out.splitlines()
    assert shown[0].startswith("ring: 4 workers, ")
    assert "96 messages" in ended.out  # 3 steps of 4 * 2 * 3 with gradients, and of 4 * 2 with numbers
    assert shown[-1].split() == ["compare", "distsim", "diff", "runs/ring.simulated.json", "runs/ring.measured.json"]
    assert sorted(file.name for file in (tmp_path / "runs").iterdir()) == [
        *("ring.measured.json", "ring.metrics.jsonl", "ring.simulated.json"),
    ]
    assert_simulated_as_measured(tmp_path / "runs", "ring", capsys)


def test_json_prints_one_record_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All-to-all, on a text of the user's own, into a folder of the user's own."""
    text = tmp_path / "text.bin"
    text.write_bytes(bytes(range(256)) * 4)
    flags = ("--json", "--options", f"{MODEL_OPTIONS},text={text}", "--out", tmp_path / "new" / "folder")
    ended = run(
        torchrun(2, "-m", "trainers", "--strategy", "all-to-all", *MODEL, *SIMULATED, *flags, *DOUBLE), tmp_path
    )
    assert (ended.code, ended.left, errors(ended)) == (0, [], []), ended.err
    printed = RunRecord.model_validate(json.loads(ended.out))
    assert printed == record.read(tmp_path / "new" / "folder" / "all-to-all.measured.json")
    assert printed.origin == "measured"
    assert (printed.workers, printed.ranks, printed.exchanges, len(printed.losses)) == (2, 2, 3, 3)
    assert printed.configuration["data_name"] == printed.configuration["options"]["text"] == str(text)
    assert printed.environment["device"] == "cpu"
    assert_simulated_as_measured(tmp_path / "new" / "folder", "all-to-all", capsys)


def test_a_wrong_flag_under_torchrun_is_one_message_and_no_traceback_of_ours(tmp_path: Path) -> None:
    ended = run(torchrun(2, "-m", "trainers", "--strategy", "ring", *MODEL, "--options", "width=33"), tmp_path)
    assert (ended.code != 0, ended.out, ended.left) == (True, "", [])
    (message,) = errors(ended)
    reason = "--workload language-model: width must be a multiple of 32 (the width of a head), not 33"
    assert message == f"trainers: error: {reason}"
    assert "exitcode  : 2" in ended.err


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    """What two ranks under torchrun say of many commands."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "short.txt").write_text("?")
    (folder / "few.txt").write_text("forty bytes, three pieces, two of 16 byte")
    (folder / "small.yaml").write_text((ROOT / "cluster_configs" / "laptop_loopback.yaml").read_text())
    text = (folder / "small.yaml").read_text()
    (folder / "small.yaml").write_text(re.sub(r"devices: \d+", "devices: 1", text))
    ring = ["--strategy", "ring", *MODEL, "--out", str(folder / "out")]
    commands: dict[str, list[str] | list[list[str]]] = {
        "library": [*ring, *SIMULATED, "--transport", "library", "--out", str(folder / "library")],
        "schedule": [*ring, *SIMULATED, "--out", str(folder / "schedule")],
        "server": ["--strategy", "parameter-server", "--steps", "7"],
        "unknown": ["--strategy", "rign"],
        "library all-to-all": ["--strategy", "all-to-all", "--transport", "library"],
        "workers": [*ring, "--workers", "2"],
        "address": [*ring, "--ray-address", "127.0.0.1:1"],
        "no text": [*ring, "--options", f"text={folder / 'none.txt'}"],
        "folder": [*ring, "--options", f"text={folder}"],
        "short text": [*ring, "--options", f"text={folder / 'short.txt'}"],
        "small cluster": [*ring, "--cluster", str(folder / "small.yaml")],
        "no steps": [*ring, "--steps", "0"],
        "rate": [*ring, "--optimizer", "SGD:lr=nan"],
        "optimizer": [*ring, "--optimizer", "AdmW"],
        "rates": [*ring, "--schedule", "cosin"],
        "option": [*ring, "--options", "layres=2"],
        "transport": [*ring, "--transport", "schedule"],
        "few": [*ring, "--uneven", "drop", "--options", f"text={folder / 'few.txt'}"],
        "diverges": [*ring, "--optimizer", "SGD:lr=1e30"],
        "out": [*ring, "--out", str(folder / "short.txt")],
        "seed": [ring, [*ring, "--seed", "1"]],
        "layers": [ring, [*ring, "--options", "layers=2,width=32,context=16"]],
        "steps": [ring, [*ring, "--steps", "4"]],
        "strategy": [ring, ["--strategy", "all-to-all", *MODEL]],
        "text": [ring, [*ring, "--options", f"{MODEL_OPTIONS},text={ROOT / 'README.md'}"]],
        "rank 1 missing": [ring, []],
        "rank 0 missing": [[], ring],
    }
    impatient = [list(commands).index(name) for name in ("small cluster", "out", "rank 1 missing", "rank 0 missing")]
    return dict(zip(commands, batch(2, folder, list(commands.values()), impatient), strict=True))


REFUSED = {
    "server": "the parameter server runs on Ray actors, not under torchrun; use\n"
    "  python -m trainers --strategy parameter-server --steps 7 --workers 2",
    "unknown": "unknown strategy 'rign'; did you mean 'ring'?",
    "library all-to-all": "--transport library is the library's ring all-reduce; with --strategy all-to-all use "
    "--transport auto",
    "workers": "--workers is for the parameter server; torchrun's --nproc-per-node",
    "address": "--ray-address is for the parameter server",
    "no text": "none.txt: cannot read it: No such file or directory",
    "folder": ": cannot read it: Is a directory",
    "short text": "short.txt: there is nothing to learn from fewer than 2 bytes",
    "no steps": "--steps must be at least 1, not 0",
    "rate": "optimizer SGD: lr cannot be 'nan'; expected a number",
    "optimizer": "unknown optimizer 'AdmW'; did you mean 'Adam",
    "rates": "unknown schedule 'cosin'; did you mean 'cosine'?",
    "option": "--workload language-model has no option 'layres'; did you mean 'layers'?",
    "transport": "--transport must be auto or tcp or torch or library, not 'schedule'",
    "few": "--uneven drop: a step takes 4 samples",
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_use_is_one_message_and_exit_code_2(two_ranks: dict[str, list[Seen]], case: str) -> None:
    first, second = two_ranks[case]
    assert (first.code, second.code) == (2, 2)
    assert not first.connected and not second.connected
    assert (first.out, second.out, second.err) == ("", "", "")  # one rank speaks for all
    assert first.err.startswith("trainers: error: ")
    assert first.err.count("error") == 1
    assert REFUSED[case] in first.err


def test_a_cluster_with_too_few_devices(two_ranks: dict[str, list[Seen]]) -> None:
    """Rank 0 simulates and so finds out; the other one waits for it in vain."""
    first, _ = two_ranks["small cluster"]
    assert (first.code, first.connected, first.out) == (2, False, "")
    assert "has 1 devices, but ring with 2 workers needs 2" in first.err
    assert first.err.count("error:") == 1


def test_a_training_that_diverges_stops_with_the_step_and_a_remedy(two_ranks: dict[str, list[Seen]]) -> None:
    """One for all: every rank has seen it at the same time."""
    first, second = two_ranks["diverges"]
    assert (first.code, second.code, first.out, second.out, second.err) == (2, 2, "", "", "")
    assert "Traceback" not in first.err
    (message,) = re.findall("trainers: error: .*", first.err)
    assert re.fullmatch(f"trainers: error: {NOT_FINITE}", message)


def test_a_record_that_cannot_be_written(two_ranks: dict[str, list[Seen]]) -> None:
    first, _ = two_ranks["out"]
    assert first.code == 2
    assert "Traceback" not in first.err
    (message,) = re.findall("trainers: error: .*", first.err)
    assert "short.txt: cannot write there: " in message


DIFFERENT = {
    "seed": ["configuration: seed is 1, on rank 0 it is 0", "model (digest) is "],
    "layers": ["configuration: options is ", "schedule (digest) is ", "model (digest) is "],
    "steps": ["configuration: steps is 4, on rank 0 it is 3"],
    "strategy": ["configuration: strategy is all-to-all, on rank 0 it is ring", "schedule (digest) is "],
    "text": ["configuration: options is ", "data (digest) is "],
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ_stop_before_any_tensor_moves(two_ranks: dict[str, list[Seen]], case: str) -> None:
    for seen in two_ranks[case]:
        assert (seen.code, seen.connected, seen.out, seen.parameters) == (2, False, "", None)
    first, second = two_ranks[case]
    head, *lines = first.err.splitlines()
    assert head == "trainers: error: ranks disagree; nothing has been exchanged:"
    assert second.err == ""
    assert len(lines) == len(DIFFERENT[case])
    for line, expected in zip(lines, DIFFERENT[case], strict=True):
        assert line.startswith(f"  rank 1: {expected}")


@pytest.mark.parametrize(("case", "present", "missing"), (("rank 1 missing", 0, 1), ("rank 0 missing", 1, 0)))
def test_a_rank_that_never_comes_is_named(
    two_ranks: dict[str, list[Seen]], case: str, present: int, missing: int
) -> None:
    seen = two_ranks[case][present]
    assert (seen.code, seen.connected, seen.out) == (2, False, "")
    assert seen.err == f"trainers: error: rank {missing} of 2 has not come within {IMPATIENT_S} s\n"


def test_the_librarys_all_reduce(two_ranks: dict[str, list[Seen]], capsys: pytest.CaptureFixture[str]) -> None:
    """Its record counts nothing, `distsim diff` says so, and the losses are those of the schedule."""
    (library, _), (schedule, _) = two_ranks["library"], two_ranks["schedule"]
    assert (library.code, schedule.code) == (0, 0)
    assert "not observable: the library hides its messages" in library.out
    paths = {}
    for name, seen in (("library", library), ("schedule", schedule)):
        (compare,) = re.findall("distsim diff (.*) (.*)", seen.out)
        paths[name] = compare
    measured, counted = (record.read(Path(paths[name][1])) for name in ("library", "schedule"))
    assert measured.totals == record.NOT_OBSERVABLE
    assert isinstance(counted.totals, Totals)
    assert measured.losses == pytest.approx(counted.losses, rel=1e-5)
    assert cli.main(["diff", *paths["library"]]) == 0
    shown = capsys.readouterr().out
    for name in ("messages", "bytes", "message sizes", "links"):
        assert re.search(rf"^ *{name} .* not observable *$", shown, flags=re.MULTILINE), shown


@pytest.mark.parametrize("strategy", ("ring", "all-to-all"))
def test_without_torchrun_the_message_holds_the_right_command(
    strategy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert main(["--strategy", strategy, "--steps", "9", "--workers", "3"]) == 2
    assert capsys.readouterr().err == (
        f"trainers: error: {strategy} runs under torchrun, one process a rank; use\n"
        f"  torchrun --nproc-per-node 3 -m trainers --strategy {strategy} --steps 9\n"
    )


def test_the_process_of_a_wrong_command_ends_with_code_2(tmp_path: Path) -> None:
    ended = run([*TRAINERS, "--strategy", "ring"], tmp_path)
    assert (ended.code, ended.out, ended.left) == (2, "", [])
    assert ended.err.startswith("trainers: error: ring runs under torchrun")
    assert "Traceback" not in ended.err


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    command = torchrun(2, "-m", "trainers", "--strategy", "ring", *TINY, "--steps", "1000000")
    ended = run(command, tmp_path, interrupt_when="loss")
    assert ended.code != 0
    assert ended.left == []
    assert len(errors(ended)) <= 1  # the rank that is told last may see the others go first


BROKEN = """
import os, sys
from distsim.errors import DistsimError
from trainers.__main__ import main
from trainers.workloads import language_model

loss, calls = language_model.loss, []


def broken(model, batch):
    calls.append(1)
    if len(calls) == 4:
        {what}
    return loss(model, batch)


if os.environ["RANK"] == "1":
    language_model.loss = broken
sys.exit(main())
"""


def broken_on_rank_1(folder: Path, what: str) -> Run:
    """Train on three ranks; at its third step, after a count of its operations, rank 1 does `what`."""
    script = folder / "script.py"
    script.write_text(BROKEN.replace("{what}", what))
    return run(torchrun(3, script, "--strategy", "ring", *TINY, "--steps", "20"), folder)


def test_a_rank_that_fails_alone_is_the_one_that_says_why(tmp_path: Path) -> None:
    """The others lose their connection, and say no more than that."""
    ended = broken_on_rank_1(tmp_path, 'raise DistsimError("the disk is full")')
    assert (ended.code != 0, ended.out, ended.left) == (True, "", [])
    errors(ended)
    said = re.findall("trainers: error: (.*)", ended.err)
    assert said.count("the disk is full") == 1
    lost = "the connection to (another rank|rank [012]) is lost; that rank's own message says why"
    assert all(re.fullmatch(f"the disk is full|{lost}", each) for each in said), said


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_one_message(tmp_path: Path) -> None:
    ended = broken_on_rank_1(tmp_path, "return loss(model, batch) * float('nan')")
    assert (ended.code != 0, ended.out, ended.left) == (True, "", [])
    (message,) = errors(ended)
    assert re.fullmatch("trainers: error: step [23]: the loss is not finite; .* --clip-norm", message)
    assert "exitcode  : 2" in ended.err


def test_runs_see_this_checkout_and_no_settings_of_the_callers_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    assert "RAY_ADDRESS" not in environment(tmp_path)
    assert environment(tmp_path)["TMPDIR"] == str(tmp_path)
