"""Loading a workload of one's own, with its options, and what is wrong with it in one message."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distsim.errors import ConfigError
from trainers.workload import Workload, data_digest, first_dimension, load, to_device

Own = Callable[[str], str]
names = itertools.count()

HEAD = """
from __future__ import annotations
from pathlib import Path
from typing import Literal, Optional
import torch
from torch import nn
from trainers.workload import Workload

def loss(model, batch):
    return model(batch).square().sum()

def made(**given):
    return Workload(**({"model": nn.Linear(3, 2), "data": torch.ones(5, 3), "loss": loss} | given))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """Writes a module into the current directory, which Python does not look into by itself; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])

    def write(source: str) -> str:
        name = f"own{next(names)}"
        Path(f"{name}.py").write_text(HEAD + textwrap.dedent(source))
        return name

    return write


def refused(workload: str, options: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        load(workload, options or {}, 0, "float32")
    return str(raised.value)


def line_of(module: str, text: str) -> str:
    """`file:line`, as messages name it, of the line with this text."""
    path = Path(f"{module}.py").absolute()
    (line,) = [number for number, each in enumerate(path.read_text().splitlines(), 1) if text in each]
    return f"({path}:{line})"


def test_a_module_in_the_current_directory_is_found_and_its_options_are_read(own: Own) -> None:
    name = own("""
    def build(*, width: int = 1, rate: float = 1, word: str = "", on: bool = False, at: Path | None = Path("."),
              kind: Literal["a", "b"] = "a", size: Optional[int] = 3, mixed: int | str = 0, free=None, **rest):
        return made(data_name=repr([width, rate, word, on, at, kind, size, mixed, free, rest]))
    """)
    assert load(f"{name}:build", {}, 0, "float32").data_name == (
        "[1, 1, '', False, PosixPath('.'), 'a', 3, 0, None, {}]"
    )
    options: dict[str, object] = {"width": 4, "rate": 2, "word": 7, "on": "true", "at": "a/b", "kind": "b"}
    options |= {"size": None, "mixed": "12", "free": "0.5", "other": "x"}
    assert load(f"{name}:build", options, 0, "float32").data_name == (
        "[4, 2.0, '7', True, PosixPath('a/b'), 'b', None, 12, 0.5, {'other': 'x'}]"
    )
    options = {"rate": "1e-3", "word": "none", "at": None, "mixed": "12a"}
    assert load(f"{name}:build", options, 0, "float32").data_name == (
        "[1, 0.001, 'none', False, None, 'a', 3, '12a', None, {}]"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 1}, " has no option 'widht'; did you mean 'width'?"),
        ({"zzz": 1}, " has no option 'zzz'; valid: width, rate, on, kind, at, odd, needed"),
        ({"width": "4.0"}, ": width must be a whole number, not '4.0'"),
        ({"width": True}, ": width must be a whole number, not 'true'"),
        ({"rate": "fast"}, ": rate must be a number, not 'fast'"),
        ({"on": 1}, ": on must be true or false, not '1'"),
        ({"kind": "c"}, ": kind must be a or b, not 'c'"),
        ({"at": "x"}, ": at must be a whole number or none, not 'x'"),
        ({"odd": "x"}, ": odd is annotated with list[int]; options can be int, float, str, bool, Path, Literal, and "),
        ({}, " needs the option 'needed', as in --options needed=..."),
    ],
)
def test_options_that_do_not_fit(own: Own, options: dict[str, object], message: str) -> None:
    name = own("""
    def build(*, width: int = 1, rate: float = 1, on: bool = False, kind: Literal["a", "b"] = "a",
              at: int | None = 1, odd: list[int] = (), needed: str):
        return made()
    """)
    assert refused(f"{name}:build", options).startswith(f"--workload {name}:build{message}")


def test_a_function_without_options_says_so(own: Own) -> None:
    name = own("def build(): return made()")
    assert refused(f"{name}:build", {"layers": 1}) == f"--workload {name}:build has no option 'layers'; it has none"


def test_an_annotation_that_cannot_be_read(own: Own) -> None:
    name = own("def build(*, width: Imt = 1): return made()")
    start = f"--workload {name}:build: reading the types of its options failed: NameError: name 'Imt' is not defined"
    assert refused(f"{name}:build").startswith(start)


def test_a_module_that_is_not_there(own: Own, tmp_path: Path) -> None:
    own("")
    assert refused("nowhere:build") == (
        "--workload nowhere:build: importing nowhere failed: there is no module 'nowhere', neither in "
        f"{tmp_path} nor installed"
    )
    assert "there is no module 'json.nowhere'" in refused("json.nowhere:build")


def test_a_module_that_fails_is_named_with_the_line(own: Own) -> None:
    inner = own("import no_such_library")
    wanted = "ModuleNotFoundError: No module named 'no_such_library'"
    assert refused(f"{inner}:build") == (
        f"--workload {inner}:build: importing {inner} failed: {wanted} {line_of(inner, 'import no_such_library')}"
    )
    syntax = own("def build(:")
    message = refused(f"{syntax}:build")
    assert message.startswith(f"--workload {syntax}:build: importing {syntax} failed: SyntaxError: ")
    assert message.endswith(line_of(syntax, "def build(:"))
    leaves = own("import sys; sys.exit(3)")
    assert f"failed: SystemExit: 3 {line_of(leaves, 'sys.exit')}" in refused(f"{leaves}:build")


def test_a_function_that_is_not_there(own: Own) -> None:
    name = own("""
    build = 3
    def built(): return made()
    """)
    assert refused(f"{name}:bulit") == (
        f"--workload {name}:bulit: bulit does not exist in {name}; did you mean 'built'?"
    )
    assert refused(f"{name}:build") == (
        f"--workload {name}:build: build is not a function in {name}; did you mean 'built'?"
    )


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("def build():\n    raise KeyError('gone')\n", "raise KeyError", "KeyError: 'gone' "),
        (
            "def build():\n    return inner()\ndef inner():\n    return 1 / 0\n",
            "1 / 0",
            "ZeroDivisionError: division by",
        ),
        ("def build():\n    return made(model=nn.Linear(2, -1))\n", "nn.Linear(2, -1)", "RuntimeError: "),  # in torch
        ("def build():\n    assert False\n", "assert False", "AssertionError "),
    ],
)
def test_a_function_that_fails_is_named_with_the_line(own: Own, source: str, line: str, message: str) -> None:
    name = own(source)
    said = refused(f"{name}:build")
    assert said.startswith(f"--workload {name}:build: {message}")
    assert said.endswith(line_of(name, line))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", " returned None; expected a trainers.workload.Workload(model=..., data=..., loss=...)"),
        ("nn.Linear(1, 1)", " returned a Linear; expected a trainers.workload.Workload("),
        ("made(model=nn.Linear)", ": a Workload's model must be a torch.nn.Module, not type"),
        ("made(model=nn.ReLU())", ": a Workload's model must have parameters that require a gradient; it has none"),
        ("made(data=[])", ": a Workload's data must have samples; this has none"),
        ("made(data=iter([1]))", ": a Workload's data must have a length and an index (a list, a map-style dataset), "),
        ("made(data=None)", ": a Workload's data must have a length and an index (a list, a map-style dataset), "),
        ("made(evaluation=[])", ": a Workload's evaluation must have samples; this has none"),
        ("made(loss=None)", ": a Workload's loss must be a function, not None"),
    ],
)
def test_what_is_no_workload_is_refused(own: Own, returned: str, message: str) -> None:
    name = own(f"def build():\n    return {returned}\n")
    assert refused(f"{name}:build").startswith(f"--workload {name}:build{message}")


def test_weights_depend_on_the_seed_alone_and_the_callers_random_numbers_go_on(own: Own) -> None:
    name = own("torch.rand(1)\ndef build(*, biased: bool = True): return made(model=nn.Linear(3, 2, biased))")
    torch.manual_seed(5)
    weights = [next(load(f"{name}:build", {}, seed, "float32").model.parameters()) for seed in (1, 1, 2)]
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(1)
    alone = nn.Linear(3, 2)
    assert torch.equal(weights[0], alone.weight)
    assert torch.equal(weights[1], alone.weight)
    assert not torch.equal(weights[2], alone.weight)
    wide = load(f"{name}:build", {}, 1, "float64")
    assert next(wide.model.parameters()).dtype == torch.float64
    assert wide.data_name == f"the data of {name}:build"


class Pair(NamedTuple):
    first: Any
    second: Any


def test_tensors_move_wherever_they_are() -> None:
    here = torch.ones(2, 3)
    there = to_device({"a": [here, 1], "b": (here, "x"), "c": Pair(here, None), 4: here}, torch.device("meta"))
    assert isinstance(there["c"], Pair) and isinstance(there["b"], tuple) and isinstance(there["a"], list)
    assert (there["a"][1], there["b"][1], there["c"].second) == (1, "x", None)
    for tensor in (there["a"][0], there["b"][0], there["c"].first, there[4]):
        assert tensor.device.type == "meta" and tensor.shape == (2, 3)
    assert here.device.type == "cpu"


def test_a_batch_counts_as_its_first_tensor_does() -> None:
    assert first_dimension(torch.ones(4, 2)) == 4
    assert first_dimension({"name": "x", "a": [torch.tensor(1.0), (torch.ones(3), torch.ones(5))]}) == 3
    with pytest.raises(ConfigError, match="give Workload a `count`"):
        first_dimension([torch.tensor(1.0), 3])


def of(data: Any, **more: Any) -> Workload:
    return Workload(model=nn.Linear(1, 1), data=data, loss=lambda model, batch: batch.sum(), **more)


def test_the_digest_tells_data_apart() -> None:
    """By their number, and by the first, middle and last sample, of whatever kinds those are."""
    same = [data_digest(of([{"x": torch.ones(2), "y": 1, "z": [None, "a", np.zeros(3)]}] * 5)) for _ in range(2)]
    assert same[0] == same[1]
    base = [torch.zeros(2) for _ in range(9)]
    variants: list[Any] = [base, base[:-1]]
    variants += [[*base[:at], torch.ones(2), *base[at + 1 :]] for at in (0, 4, 8)]
    variants += [
        [torch.zeros(1, 2)] * 9,
        [torch.zeros(2, dtype=torch.int32)] * 9,
        [np.zeros(2)] * 9,
        [np.zeros((1, 2))] * 9,
        [[0.0, 0.0]] * 9,
    ]
    variants += [[{"a": 0}] * 9, [{"b": 0}] * 9, [{"a": 1}] * 9, ["0"] * 9, [0] * 9, [torch.zeros(2).bfloat16()] * 9]
    found = [data_digest(of(each)) for each in variants] + [data_digest(of(base, evaluation=base))]
    assert len(set(found)) == len(found)


def test_data_that_draw_random_numbers_have_one_digest_and_draw_on() -> None:
    class Noisy(list[Tensor]):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index) + torch.rand(2)

    workload = of(Noisy([torch.zeros(2)] * 4))
    torch.manual_seed(3)
    drawn = [torch.rand(1), torch.rand(1)]
    torch.manual_seed(3)
    first = data_digest(workload)
    assert torch.equal(torch.rand(1), drawn[0])
    assert data_digest(workload) == first
    assert torch.equal(torch.rand(1), drawn[1])


def test_data_that_cannot_be_read(own: Own) -> None:
    name = own("""
    class Broken:
        def __len__(self): return 3
        def __getitem__(self, index): return [1, 2][index]
    def build(): return made(data=Broken())
    """)
    with pytest.raises(ConfigError) as raised:
        data_digest(load(f"{name}:build", {}, 0, "float32"))
    assert str(raised.value) == (
        f"reading sample 2 of the workload's data: IndexError: list index out of range {line_of(name, 'return [1, 2]')}"
    )
