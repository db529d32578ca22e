"""What describes a run: values, flags and YAML agree, and whatever is wrong is one message that says where."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distsim.errors import ConfigError
from trainers import runfile
from trainers.__main__ import described, main, parser
from trainers.config import FIELDS, Option, RunConfig, option_text, plain

WRONG: list[tuple[str, object, str]] = [
    ("strategy", "rign", "--strategy cannot be used: unknown strategy 'rign'; did you mean 'ring'?"),
    ("strategy", "ring:channel=2", "--strategy cannot be used: ring has no option 'channel'; did you mean 'channels'?"),
    ("strategy", "", "--strategy cannot be used: must be a name with options, as in NAME:KEY=VALUE,..., not ''"),
    ("workers", 0, "--workers must be at least 1, not 0"),
    ("steps", "many", "--steps must be a whole number, not 'many'"),
    ("steps", 2.0, "--steps must be a whole number, not 2.0"),
    ("steps", True, "--steps must be a whole number, not True"),
    ("batch_size", "0", "--batch-size must be at least 1, not 0"),
    ("accumulate", -1, "--accumulate must be at least 1, not -1"),
    ("uneven", "jion", "--uneven must be join or drop, not 'jion'; did you mean 'join'?"),
    ("optimizer", " ", "--optimizer must be a name with options, as in NAME:KEY=VALUE,..., not ' '"),
    ("schedule", None, "--schedule must be a name with options, as in NAME:KEY=VALUE,..., not None"),
    ("clip_norm", 0, "--clip-norm must be a positive number or none, not 0"),
    ("clip_norm", "nan", "--clip-norm must be a positive number or none, not 'nan'"),
    ("dtype", "bf16", "--dtype must be float32 or float64, not 'bf16'"),
    ("precision", "fp8", "--precision must be full or bf16 or fp16, not 'fp8'; did you mean 'fp16'?"),
    ("compile", "yes", "--compile must be true or false, not 'yes'"),
    ("compile", 1, "--compile must be true or false, not 1"),
    ("memory_budget", "2 GHz", "--memory-budget must be bytes, as in 2GiB or 20000000, or none, not '2 GHz'"),
    ("memory_budget", "0", "--memory-budget must be bytes, as in 2GiB or 20000000, or none, not '0'"),
    ("memory_budget", "0.1 B", "--memory-budget must be bytes, as in 2GiB or 20000000, or none, not '0.1 B'"),
    ("memory_budget", True, "--memory-budget must be bytes, as in 2GiB or 20000000, or none, not True"),
    ("batch_norm", "synch", "--batch-norm must be keep or sync or group, not 'synch'; did you mean 'sync'?"),
    ("offload", " ", "--offload must be none, host or a folder, not ' '"),
    ("offload", None, "--offload must be none, host or a folder, not None"),
    ("bucket_mb", "25 MB", "--bucket-mb must be a positive number, not '25 MB'"),
    ("bucket_mb", "inf", "--bucket-mb must be a positive number, not 'inf'"),
    ("bucket_mb", True, "--bucket-mb must be a positive number, not True"),
    ("overlap", "on", "--overlap must be true or false, not 'on'"),
    ("transport", "nccl", "--transport must be auto or tcp or torch or library, not 'nccl'"),
    ("evaluate_every", -1, "--evaluate-every must be at least 0, not -1"),
    ("profile", "-1", "--profile must be at least 0, not -1"),
    ("seed", -1, f"--seed must be a whole number from 0 to {2**63 - 1}, not -1"),
    ("seed", 2**63, f"--seed must be a whole number from 0 to {2**63 - 1}, not {2**63}"),
    (
        "workload",
        "digit",
        "--workload must be language-model, digits, mlp, resnet or MODULE:FUNCTION of your own, not 'digit'; "
        "did you mean 'digits'?",
    ),
    (
        "workload",
        "a b:c",
        "--workload must be language-model, digits, mlp, resnet or MODULE:FUNCTION of your own, not 'a b:c'",
    ),
    (
        "workload",
        "a:",
        "--workload must be language-model, digits, mlp, resnet or MODULE:FUNCTION of your own, not 'a:'",
    ),
    ("options", "layers", "--options must be KEY=VALUE,..., as in layers=4,width=128, not 'layers'"),
    ("options", "layers=4,", "--options must be KEY=VALUE,..., as in layers=4,width=128, not 'layers=4,'"),
    ("options", "a=1,b=2,a=3", "--options must have each key once, but a is there twice"),
    ("options", ["layers"], "--options must be a mapping, as in {layers: 4, width: 128}, not ['layers']"),
    ("options", {"a-b": 1}, "--options must have names of a function's arguments as keys, not 'a-b'"),
    ("options", {"a": [1]}, "--options must have one value for a, not [1]: a number, text, true or false"),
]


def ring(**values: Any) -> RunConfig:
    return RunConfig(**{"strategy": "ring", "workers": 2, **values})


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_value_names_its_flag_and_what_was_expected(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ring(**{name: value})
    assert str(raised.value) == message


def test_every_field_has_a_wrong_value_above() -> None:
    assert {name for name, _, _ in WRONG} == {each.name for each in fields(RunConfig)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"strategy": "all-to-all", "transport": "library"},
            "--transport library is the library's ring all-reduce; with --strategy all-to-all use --transport auto",
        ),
        (
            {"precision": "bf16", "dtype": "float64"},
            "--precision bf16 computes in less than the parameters have; use --dtype float32",
        ),
        (
            {"offload": "host"},
            "--offload host is for what does not fit into a --memory-budget; give one",
        ),
        (
            {"memory_budget": "2GiB", "compile": True},
            "--memory-budget runs layers one by one, some of them again, and --compile makes one function of them; "
            "leave one of the two out",
        ),
        (
            {"strategy": "parameter-server", "transport": "tcp"},
            "--transport tcp connects workers; dedicated servers are reached through Ray: leave it out",
        ),
        (
            {"strategy": "parameter-server:servers=3,placement=colocated"},
            "--strategy parameter-server:servers=3,placement=colocated cannot have 2 workers: "
            "servers=3: colocated servers are among the workers, so 2 at most",
        ),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ring(**values)
    assert str(raised.value) == message


def test_a_config_is_canonical_frozen_and_hashable_and_holds_a_copy() -> None:
    options: dict[str, object] = {"layers": 2, "rate": "1e-3", "text": Path("a/b"), "name": "007", "on": "true"}
    config = RunConfig(strategy="ring:segments=1,channels=2", workers=2, options=options, steps=7)
    options["layers"] = 3
    assert config.strategy == "ring:channels=2"
    assert asdict(config)["options"] == {"layers": 2, "rate": "1e-3", "text": "a/b", "name": "007", "on": True}
    assert hash(config) == hash(RunConfig(strategy="ring:channels=2", workers=2, steps=7))
    with pytest.raises(AttributeError):
        config.steps = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("strategy", "servers"),
    [
        ("ring", 0),
        ("parameter-server", 1),
        ("parameter-server:servers=2", 2),
        ("parameter-server:servers=2,placement=colocated", 0),
    ],
)
def test_servers_are_the_ranks_beyond_the_workers(strategy: str, servers: int) -> None:
    assert RunConfig(strategy=strategy, workers=4).servers == servers


@given(st.text() | st.integers().map(str) | st.floats().map(str) | st.sampled_from(("true", "none", "1_0", "1e400")))
def test_a_plain_option_is_still_the_text_it_was(text: str) -> None:
    value = plain(text)
    assert option_text(value) == text
    assert plain(option_text(value)) == value


def test_plain_options_are_numbers_where_one_would_think_so() -> None:
    texts = ("4", "-1", "0.1", "1e-05", "true", "none", "007", "1e-3", "nan", "4 GB", "True")
    values: list[Option] = [4, -1, 0.1, 1e-05, True, None, "007", "1e-3", "nan", "4 GB", "True"]
    assert [plain(text) for text in texts] == values
    assert [type(plain(text)) for text in texts] == [type(value) for value in values]


values_of_options = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.from_regex(r"[0-9e.:_~+-]*")
)
keys = st.from_regex("[a-z_][a-zA-Z_0-9]{0,9}", fullmatch=True)
specs = st.text(min_size=1).filter(str.strip)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
together = st.sampled_from(
    (
        {"memory_budget": None, "offload": "none", "compile": True},
        {"memory_budget": None, "offload": "none", "compile": False},
        {"memory_budget": 1, "offload": "none", "compile": False},
        {"memory_budget": "2GiB", "offload": "host", "compile": False},
        {"memory_budget": 2**53, "offload": "a/ größer folder", "compile": False},
    )
)
configs = st.builds(
    lambda together, **others: RunConfig(**together, **others),
    together=together,
    strategy=st.sampled_from(("ring", "ring:channels=2,bidirectional=true", "hierarchical:node=1", "double-tree")),
    workers=st.integers(1, 64),
    workload=st.sampled_from(("language-model", "digits", "package.module:build", "größe:bauen")),
    options=st.dictionaries(keys, values_of_options, max_size=4),
    steps=st.integers(11, 10**12),
    batch_size=st.integers(1, 99),
    accumulate=st.integers(1, 99),
    uneven=st.sampled_from(("join", "drop")),
    optimizer=specs,
    schedule=specs,
    clip_norm=st.none() | positive,
    bucket_mb=positive,
    overlap=st.booleans(),
    precision=st.sampled_from(("full", "bf16", "fp16")),
    transport=st.sampled_from(("auto", "tcp", "torch")),
    evaluate_every=st.integers(0, 99),
    profile=st.integers(0, 9),
    seed=st.integers(0, 2**63 - 1),
)


def test_a_profile_must_fit_into_the_run() -> None:
    """Two steps of warm-up go before it."""
    RunConfig(strategy="ring", workers=1, steps=5, profile=3)
    with pytest.raises(ConfigError, match="--profile 4: with 2 steps of warm-up that takes 6 steps, and --steps is 5"):
        RunConfig(strategy="ring", workers=1, steps=5, profile=4)


@given(config=configs)
def test_a_run_written_as_yaml_is_read_as_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    path.write_text(runfile.text(config), "utf-8")
    values = runfile.read(str(path))
    assert list(values) == list(FIELDS)
    assert RunConfig(**values) == config
    assert yaml.safe_load(path.read_text("utf-8"))["steps"] == config.steps  # and it is YAML to others, too


def test_a_file_need_not_give_all(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("strategy: tree:segments=2  # as always\noptions: {layers: 1, text: a file.txt}\noverlap: false\n")
    options = {"layers": 1, "text": "a file.txt"}
    assert runfile.read(str(path)) == {"strategy": "tree:segments=2", "options": options, "overlap": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strategy: ring\nstepz: 3\n", ":2: stepz: unknown key; expected one of: strategy, workers, workload, options"),
        ("strategy: ring\nstepz: 3\n", "; did you mean 'steps'?"),
        ("strategy: ring\nsteps: 0\n", ":2: steps: must be at least 1, not 0"),
        ("strategy: ring\n\nsteps: [3]\n", ":3: steps: must be a whole number, not ['3']"),
        ("steps:\n", ":1: steps: must be a whole number, not ''"),
        ("strategy: rign\n", ":1: strategy: cannot be used: unknown strategy 'rign'; did you mean 'ring'?"),
        ("strategy: [ring]\n", ":1: strategy: cannot be used: must be a name with options"),
        (
            "workload: {a: b}\n",
            ":1: workload: must be language-model, digits, mlp, resnet or MODULE:FUNCTION of your own, not {",
        ),
        ("uneven: {a: b}\n", ":1: uneven: must be join or drop, not {'a': 'b'}"),
        ("seed: 1\noptions:\n  layers: 1\n  width: [2]\n", ":2: options: must have one value for width, not ['2']"),
        ("options: [a]\n", ":1: options: must be a mapping, as in {layers: 4, width: 128}, not ['a']"),
        ("clip_norm: null\n", ":1: clip_norm: must be a positive number or none, not 'null'"),
        ("steps: 1\nsteps: 2\n", ":2: duplicate key 'steps'"),
        ("- steps\n", ":1: expected `key: value` lines, as in `strategy: ring`"),
        ("steps: 'a\n", ": not YAML: "),
        ("", ":1: the file is empty"),
    ],
)
def test_a_wrong_file_is_named_with_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        runfile.read(str(path))
    assert str(raised.value).startswith(f"{path}:")
    assert message in str(raised.value)


def values_of(*argv: str) -> dict[str, Any]:
    return described(parser().parse_args(list(argv)))


@given(config=configs)
def test_flags_and_values_are_two_spellings_of_one_run(config: RunConfig) -> None:
    argv = []
    for name, value in asdict(config).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-"))
        elif name != "options":
            argv.append(f"{flag}={option_text(value)}")
    assert RunConfig(**values_of(*argv)) == RunConfig(**{**asdict(config), "options": {}})


def test_flags_replace_a_files_values_and_of_its_options_those_that_they_give(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("strategy: ring\nsteps: 9\nseed: 3\noverlap: false\noptions: {layers: 1, width: 64}\n")
    values = values_of(str(path), "--steps", "5", "--options", "layers=2,context=16", "--overlap")
    assert values == {
        "strategy": "ring",
        "steps": 5,
        "seed": 3,
        "overlap": True,
        "options": {"layers": 2, "width": 64, "context": 16},
    }


def test_without_a_strategy_the_valid_ones_are_listed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 9\n")
    for argv in ([], [str(tmp_path / "run.yaml")]):
        with pytest.raises(ConfigError, match=r"Give --strategy, or `strategy:` in a file; valid: all-to-all, .*ring"):
            values_of(*argv)


@pytest.mark.parametrize("flag", ("--layers", "--learning-rate", "--stepz", "--step"))
def test_flags_that_do_not_exist(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--strategy", "ring", flag, "4"]) == 2
    assert capsys.readouterr().err.startswith("trainers: error: unrecognized arguments: " + flag)


def test_help_names_every_field_and_takes_no_torch() -> None:
    code = "import sys; from trainers.__main__ import parser; print(parser().format_help(), 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown.endswith(" False\n")
    for name in FIELDS:
        assert f" --{name.replace('_', '-')}" in shown
