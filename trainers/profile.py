"""A module measured into a chain file: times and bytes of each layer of an nn.Sequential, for `distsim memory`.

    python -m trainers.profile --workload resnet --batch-size 8 --out chain.json

Layers run in groups, forward and back, that save no more than 128 MiB, or alone: what does not fit into memory without
a plan can be measured for one. `fwd` and `fwd_tmp` are of the forward that records for backward. One that does not may
need more beside its output, `size`, but in all no more than the other does: `size_saved` and `fwd_tmp`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from distsim.cli import Parser
from distsim.errors import ConfigError, DistsimError
from distsim.files import make_writable, write_whole
from distsim.memory.chain import Chain
from distsim.tables import table
from distsim.units import format_bytes, format_time
from trainers.config import FIELDS, RunConfig, read
from trainers.meter import Meter
from trainers.offload import Store, disk_store, host_store, room_bytes
from trainers.precision import Precision
from trainers.transport import synchronize
from trainers.workload import Workload, load, sequence, to_device

ROUNDS = 5
GROUP_BYTES = 2**27
"""Saved by layers that are timed as a group. Layers timed alone find less of what they read in the caches: a fifth more
time for layers of half a millisecond, and nothing to speak of for those of ten."""
SMALL_COPY, LEAST_LARGE_COPY, MOST_LARGE_COPY = 2**12, 2**20, 2**26
"""Bytes that are copied to the store and back: what a copy costs at least, and the bandwidth, follow from two."""

Floats = npt.NDArray[np.float64]
Made = TypeVar("Made")


def profile(
    layers: nn.Sequential, example: Tensor, *, rounds: int = ROUNDS, folder: Path | None = None, progress: bool = False
) -> Chain:
    """Measure layers for an input such as `example`, and copies to a folder's disk, or to host memory without one.

    Autocast and the layers' mode are as they are around this call. Times, in seconds, are medians over `rounds`, each
    of which takes every layer once; a first one is not counted. Bytes are what was really allocated; `saved` is all
    that a recording forward leaves behind. Gradients are added to ones that are there already, as in accumulation.
    Parameters, their gradients, buffers and random numbers are afterwards what they were; hooks that parameters have
    do run: register those that send gradients later.

    Raises: ConfigError naming the layer that cannot be run by itself or does not make one tensor, and for a folder
    that cannot be written.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, not {rounds}")
    names = [f"{name} {type(layer).__name__}" for name, layer in layers.named_children()]
    bar = tqdm(
        total=2 + rounds,
        desc="measuring layers",
        unit="round",
        file=sys.stderr,
        delay=1,
        leave=False,
        disable=not progress,
    )
    with bar, _left_as_it_was(layers, example.device):
        _times(layers, example, [[number] for number in range(len(layers))])  # starts libraries, allocates what stays
        bar.update()
        needs = _needs(layers, example)
        bar.update()
        groups = _groups([each.saved for each in needs])
        times = []
        for _ in range(rounds):
            times.append(_times(layers, example, groups))
            bar.update()
    forward, backward = np.median(times, axis=0).T
    size = np.array([_bytes(example), *(each.size for each in needs)], np.float64)
    saved = np.array([each.saved for each in needs], np.float64)
    write, read_back = _copies(int(saved.max()), example.device, folder, rounds)
    return Chain(
        forward=forward,
        backward=backward,
        size=size,
        saved=saved,
        forward_tmp=np.array([each.forward_tmp for each in needs]),
        backward_tmp=np.array([each.backward_tmp for each in needs]),
        write=write(size[1:]),
        read=read_back(size[1:]),
        write_saved=write(saved),
        read_saved=read_back(saved),
        names=tuple(names),
        unit="SI",
    )


def example_of(workload: Workload, batch: Any) -> Tensor:
    """Return what a batch is when it reaches the workload's `sequence`; the model stays as it is.

    Raises: ConfigError if the loss never runs these layers, or gives them something else than one tensor.
    """
    found: list[Tensor] = []

    def seize(module: nn.Module, given: tuple[Any, ...]) -> None:
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise ConfigError("layers that memory plans apply to are given one tensor, and this workload's are not")
        found.append(given[0].detach().requires_grad_(given[0].requires_grad))
        raise _Reached

    handle = sequence(workload).register_forward_pre_hook(seize)
    try:
        with _left_as_it_was(workload.model, next(workload.model.parameters()).device):
            workload.loss(workload.model, batch)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ConfigError("the workload's loss does not run the layers that memory plans apply to")


class _Reached(Exception):
    """The rest of a forward is not needed."""


@contextmanager
def _left_as_it_was(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Let parameters have gradients, zero at first; afterwards restore theirs, buffers and random numbers."""
    gradients = [(each, each.grad) for each in module.parameters()]
    owned = [(part, name, each) for part in module.modules() for name, each in part.named_buffers(recurse=False)]
    values = [each.clone() for _, _, each in owned]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for parameter, _ in gradients:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for (part, name, buffer), value in zip(owned, values, strict=True):
                setattr(part, name, buffer)  # some layers replace theirs
                with torch.no_grad():
                    buffer.copy_(value)


def _forget_casts(device: torch.device) -> None:
    """Let autocast cast weights again: of a training step's forwards, each has its own to cast, too."""
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()


def _forward(number: int, layer: nn.Module, given: Tensor) -> Tensor:
    """Run a layer; ConfigError naming it if a memory plan could not."""
    what, version = f"layer {number + 1}, {type(layer).__name__},", given._version
    try:
        out: Tensor = layer(given)
    except (RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{what} cannot be run by itself: {type(error).__name__}: {said}") from error
    if not isinstance(out, Tensor):
        raise ConfigError(f"{what} makes {type(out).__name__}; expected one tensor, which a memory plan can keep")
    if given._version != version:
        raise ConfigError(f"{what} changes its input in place; expected one that leaves it to others")
    return out


def _backward(out: Tensor, gradient: Tensor | None) -> None:
    if out.requires_grad and gradient is not None:
        with torch.autocast(out.device.type, enabled=False):
            torch.autograd.backward(out, gradient)


def _input(tensor: Tensor) -> Tensor:
    """Return what a layer is given: the same data, at the beginning of a graph."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _groups(saved: list[int]) -> list[list[int]]:
    """Return layers, by number from 0, in groups that save no more than is allowed, or of one layer."""
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(saved):
        if size > room or not groups:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(number)
        room -= size
    return groups


def _times(layers: nn.Sequential, example: Tensor, groups: list[list[int]]) -> Floats:
    """Return the seconds of every layer's forward and backward, shape (L, 2)."""
    device = example.device
    times = np.empty((len(layers), 2))

    def timed(place: tuple[int, int], run: Callable[[], Made]) -> Made:
        synchronize(device)
        began = perf_counter()
        made = run()
        synchronize(device)
        times[place] = perf_counter() - began
        return made

    given = _input(example)
    for group in groups:
        passes = []
        for number in group:
            _forget_casts(device)
            out = timed((number, 0), partial(_forward, number, layers[number], given))
            passes.append((given, out))
            given = _input(out)
        gradient: Tensor | None = torch.ones_like(out)
        del out  # held by `passes` alone, until its backward is over
        for number in reversed(group):
            begin, end = passes.pop()
            timed((number, 1), partial(_backward, end, gradient))
            gradient = begin.grad
            del begin, end
    return times


class Needs(NamedTuple):
    """What a layer needs, in bytes."""

    size: int
    """Its output's."""
    saved: int
    """All that a recording forward leaves behind, the output among it."""
    forward_tmp: int
    backward_tmp: int
    """Beside what is left in the end; in backward beside the gradients of output and input."""


def _needs(layers: nn.Sequential, example: Tensor) -> list[Needs]:
    """Run every layer, forward and backward, and see what they allocate."""
    device = example.device
    sizes, shared = [_bytes(example)], list[bool]()

    given = _input(example)
    _forget_casts(device)
    with Meter(device) as meter:
        for number, layer in enumerate(layers):
            with meter.span(f"recording {number}"):
                out = _forward(number, layer, given)
                _forget_casts(device)  # all but those that backward needs
            sizes.append(_bytes(out))
            shared.append(out.untyped_storage().data_ptr() == given.untyped_storage().data_ptr())
            loss = -out  # whose backward makes a gradient that nobody holds on to, as layers' are
            gradient = torch.ones((), dtype=out.dtype, device=device).expand_as(out)
            with meter.span(f"backward {number}"):
                _backward(loss, gradient)
            given = _input(out)
            del out, loss, gradient
    found = []
    for number, (before, size) in enumerate(pairwise(sizes)):
        recording, backward = (meter.used[f"{what} {number}"] for what in ("recording", "backward"))
        found.append(
            Needs(
                size=size,
                saved=recording.left + (size if shared[number] else 0),  # a view of the input is not allocated
                forward_tmp=recording.most - recording.left,
                backward_tmp=max(0, backward.most - size - before),
            )
        )
    return found


def _bytes(tensor: Tensor) -> int:
    """Return how much memory a tensor keeps, which for a part of another one is more than its own."""
    return tensor.untyped_storage().nbytes()


def _copies(
    largest: int, device: torch.device, folder: Path | None, rounds: int
) -> tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]:
    """Time copies to the store and back; return what n bytes take: as much as hardly any, and n over a bandwidth."""
    sizes = (SMALL_COPY, min(max(largest, LEAST_LARGE_COPY), MOST_LARGE_COPY))
    tensors = [torch.ones(size, dtype=torch.uint8, device=device) for size in sizes]
    room = sum(map(room_bytes, sizes))
    with host_store() if folder is None else disk_store(folder, room) as store:
        times = np.array([_copied(store, tensors) for _ in range(1 + rounds)])[1:]
    medians = np.median(times, axis=0)  # (small or large, write or read)

    def line(column: int) -> Callable[[Floats], Floats]:
        small, large = medians[:, column]
        per_byte = max(0.0, (large - small) / (sizes[1] - sizes[0]))
        return lambda count: np.maximum(0.0, small + (count - sizes[0]) * per_byte)

    return line(0), line(1)


def _copied(store: Store, tensors: list[Tensor]) -> list[list[float]]:
    """Copy each tensor to the store and back; return the seconds of both."""
    times = []
    for key, tensor in enumerate(tensors):
        synchronize(tensor.device)
        began = perf_counter()
        store.write(key, [tensor]).wait()
        written = perf_counter()
        store.read(key).result()
        times.append([written - began, perf_counter() - written])
        store.discard(key)
    return times


LAYERS_DEPEND_ON = ("workload", "options", "batch_size", "dtype", "precision", "seed")
"""Of a run's description; the flags are those of `python -m trainers`."""


def main(argv: list[str] | None = None) -> int:
    """Measure a workload's layers and write the chain file; return the exit code."""
    try:
        _run(_parser().parse_args(argv))
    except DistsimError as error:
        print(f"trainers.profile: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> Parser:
    flags = Parser(prog="trainers.profile", description="Measure a workload's layers into a file for distsim memory.")
    for name in LAYERS_DEPEND_ON:
        each = FIELDS[name]
        default = "" if name == "options" else f" (default {each.default})"
        metavar = "KEY=VALUE,..." if name == "options" else name.rpartition("_")[2].upper()
        flags.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=each.metadata["help"] + default)
    flags.add_argument("--out", metavar="FILE", type=Path, required=True, help="chain file to write, NAME.json")
    flags.add_argument("--folder", metavar="DIR", type=Path, help="on the disk to offload to (default: host memory)")
    flags.add_argument(
        "--rounds", metavar="N", type=int, default=ROUNDS, help=f"how often layers are timed (default {ROUNDS})"
    )
    flags.add_argument("--json", action="store_true", help="print the chain file, not a table of it, on stdout")
    return flags


def _run(flags: argparse.Namespace) -> None:
    given = {name: read(name, getattr(flags, name)) for name in LAYERS_DEPEND_ON if getattr(flags, name) is not None}
    config = RunConfig(strategy="ring", workers=1, **given)  # checks the values, and knows those that are not given
    make_writable(flags.out.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = load(config.workload, config.options, config.seed, config.dtype)
    if len(workload.data) < config.batch_size:
        raise ConfigError(f"--batch-size {config.batch_size}: the workload has {len(workload.data)} samples")
    batch = workload.collate([workload.data[index] for index in range(config.batch_size)])
    workload.model.to(device).train()
    with Precision(config.precision, device).autocast():
        example = example_of(workload, to_device(batch, device))
        layers = sequence(workload)
        chain = profile(layers, example, rounds=flags.rounds, folder=flags.folder, progress=True)
    write_whole(flags.out, chain.to_json())
    if flags.json:
        print(chain.to_json(), end="")
    else:
        print(f"{_text(chain, flags.folder)}\n\nWrote {flags.out}: `distsim memory {flags.out}` plans it.")


def _text(chain: Chain, folder: Path | None) -> str:
    """Return a measured chain for a terminal: a table of its layers, and what it does not show."""

    def column(values: Floats | None, show: Callable[[float], str]) -> list[str]:
        assert values is not None, "all columns are measured"
        return [show(float(value)) for value in [*values, values.sum()]]

    columns = {
        "layer": [*chain.names, "all"],
        "forward": column(chain.forward, format_time),
        "backward": column(chain.backward, format_time),
        "activation": column(chain.size[1:], format_bytes),
        "saved": column(chain.saved, format_bytes),
        "write": column(chain.write, format_time),
        "read": column(chain.read, format_time),
    }
    where = "host memory" if folder is None else f"{folder}"
    return (
        f"{table(list(columns), list(zip(*columns.values(), strict=True)))}\n\n"
        f"input {format_bytes(chain.size[0])}; write, read: of the activation, to {where} and back"
    )


if __name__ == "__main__":
    sys.exit(main())
