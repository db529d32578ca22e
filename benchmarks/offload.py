"""Tensors to disk and back: our store, torch.save, safetensors and NumPy; to host memory: ours and save_on_cpu.

First alone, then within steps of training, where our store copies while the step computes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchmarks.report import Table, against, table_of
from distsim.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.offload import Handle, Store

OURS = "our file"
PLAIN = "kept in memory"
WANTED = 1.03
"""How long a step that offloads to our file may take, over the same step that keeps all."""
MiB = 2**20
SIZES = {8 * MiB: 16, 64 * MiB: 4}
"""Bytes of a tensor -> how many are written and read in a round."""
LAYERS, ROWS, WIDTH = 8, 1024, 2048
"""Of the step: each layer multiplies ROWS x WIDTH by WIDTH x WIDTH, and offloads 8 MiB of float32."""


class Side(Protocol):
    """A way to put tensors aside."""

    def save(self, number: int, tensor: Tensor) -> None:
        """Put a tensor aside; it may go on after the call."""

    def settle(self) -> None:
        """Wait until all that was saved has been."""

    def load(self, number: int, following: int | None) -> Tensor:
        """Return a tensor; say which is wanted after it."""

    def files(self) -> list[Path | int]:
        """Return the files in which tensors are, by path or number."""


class Stored:
    """Our store: the next tensor is read while the one before is in use."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.saving: list[Handle] = []
        self.loading: dict[int, Handle] = {}

    def save(self, number: int, tensor: Tensor) -> None:
        if self.saving:
            self.saving.pop().wait()  # so that no more than two tensors are in memory
        self.saving.append(self.store.write(number, [tensor]))

    def settle(self) -> None:
        while self.saving:
            self.saving.pop().wait()

    def load(self, number: int, following: int | None) -> Tensor:
        handle = self.loading.pop(number, None) or self.store.read(number)
        if following is not None:
            self.loading[following] = self.store.read(following)
        (tensor,) = handle.result()
        self.store.discard(number)
        return tensor

    def files(self) -> list[Path | int]:
        fileno = getattr(self.store.medium, "fileno", None)
        return [fileno()] if fileno else []


class Separate:
    """One file for each tensor, written and read by functions of a library."""

    def __init__(self, folder: Path, write: Callable[[Tensor, Path], Any], read: Callable[[Path], Tensor]) -> None:
        self.folder, self.write, self.read = folder, write, read
        self.folder.mkdir()
        self.numbers: set[int] = set()

    def save(self, number: int, tensor: Tensor) -> None:
        self.write(tensor, self.folder / f"{number}")
        self.numbers.add(number)

    def settle(self) -> None:
        pass

    def load(self, number: int, following: int | None) -> Tensor:
        return self.read(self.folder / f"{number}")

    def files(self) -> list[Path | int]:
        return [self.folder / f"{number}" for number in self.numbers]


class Packed:
    """In host memory, by a pair of functions as autograd's hooks for saved tensors are."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        self.pack, self.unpack = pack, unpack
        self.packed: dict[int, Any] = {}

    def save(self, number: int, tensor: Tensor) -> None:
        self.packed[number] = self.pack(tensor)

    def settle(self) -> None:
        pass

    def load(self, number: int, following: int | None) -> Tensor:
        return self.unpack(self.packed.pop(number))

    def files(self) -> list[Path | int]:
        return []


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure all sides by turns: tensors alone, then a step of training."""
    try:
        import torch
    except ImportError:
        raise ConfigError(
            "the benchmark `offload` needs PyTorch; install it with `pip install 'distsim[train]'`"
        ) from None
    sizes = {4096: 2} if quick else SIZES
    layers, rows, width = (2, 16, 32) if quick else (LAYERS, ROWS, WIDTH)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _all_cores():
            alone = [row for size, count in sizes.items() for row in _alone(size, count, runs)]
            steps = _steps(layers, rows, width, runs)
    finally:
        torch.set_num_threads(before)
    dropped = (
        "Where the page cache is dropped, files are written through to the disk and forgotten by the system "
        "between writing and reading, which no time includes. Ratios are paired round by round; median, 10th and "
        "90th percentile."
    )
    return [
        table_of(
            "Tensors written and read",
            "Per tensor: all of a round are written, then all are read and one number of each page is looked at, by "
            f"each side in its turn. save_on_cpu leaves a tensor of the CPU where it is. Ratios to our file. {dropped}",
            alone,
        ),
        table_of(
            "A training step that offloads the input of each layer",
            f"{layers} layers, forward and backward, each a product of {rows} x {width} with {width} x {width} (two of "
            "them in backward), one thread of computation, on all cores of this machine. Ratios to the step that "
            f"keeps everything in memory. {dropped}",
            steps,
        ),
    ]


@contextmanager
def _sides(folder: Path, count: int, size: int) -> Iterator[dict[str, Side]]:
    """Make a side of each kind for `count` tensors of `size` bytes; safetensors only where it is installed."""
    import torch

    from trainers.offload import disk_store, host_store, room_bytes

    on_cpu = torch.autograd.graph.save_on_cpu()
    with ExitStack() as stack:
        sides: dict[str, Side] = {
            OURS: Stored(stack.enter_context(disk_store(folder, count * room_bytes(size)))),
            "NumPy tofile": Separate(folder / "numpy", _tofile, _fromfile),
            "torch.save": Separate(folder / "torch", torch.save, torch.load),
        }
        try:
            from safetensors.torch import load_file, save_file
        except ImportError:
            pass
        else:
            sides["safetensors"] = Separate(
                folder / "safetensors",
                lambda tensor, path: save_file({"": tensor}, path),
                lambda path: load_file(path)[""],
            )
        sides["our host store"] = Stored(stack.enter_context(host_store()))
        sides["save_on_cpu"] = Packed(on_cpu.pack_hook, on_cpu.unpack_hook)
        yield sides


def _tofile(tensor: Tensor, path: Path) -> None:
    tensor.numpy().tofile(path)


def _fromfile(path: Path) -> Tensor:
    import torch

    return torch.from_numpy(np.fromfile(path, np.float32))


def _alone(size: int, count: int, runs: int) -> list[dict[str, Any]]:
    """Return a row for each side and state of the page cache: `count` float32 tensors of `size` bytes a round."""
    import torch

    tensors = [torch.full((size // 4,), float(number)) for number in range(count)]
    samples: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, _sides(Path(folder), count, size) as sides:
        for turn in range(runs + 1):
            for cache in ("kept", "dropped"):
                for name, side in sides.items():
                    begin = time.perf_counter()
                    for number, tensor in enumerate(tensors):
                        side.save(number, tensor)
                    side.settle()
                    middle = time.perf_counter()
                    if cache == "dropped" and not forgotten(side.files()):
                        for number in range(count):
                            side.load(number, None)
                        continue
                    again = time.perf_counter()
                    for number in range(count):
                        tensor = side.load(number, number + 1 if number + 1 < count else None)
                        seen = tensor.view(-1)[::1024].sum().item()
                        assert seen == number * -(-size // 4096), f"{name} returns other numbers"
                    seconds = middle - begin + time.perf_counter() - again
                    if turn:  # the first is the warm-up
                        samples.setdefault((name, cache), []).append(seconds / count)
    return [
        {"size_bytes": size, **_row(name, cache, seconds, samples[(OURS, cache)])}
        for (name, cache), seconds in samples.items()
    ]


def _steps(layers: int, rows: int, width: int, runs: int) -> list[dict[str, Any]]:
    """Return a row for each side and state of the page cache: the time of a step."""
    import torch

    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(width, width, generator=generator) / width**0.5 for _ in range(layers)]
    start = torch.randn(rows, width, generator=generator)
    samples: dict[tuple[str, str], list[float]] = {}
    results = set()
    with tempfile.TemporaryDirectory() as folder, _sides(Path(folder), layers, start.nbytes) as sides:
        kept: Mapping[str, Side] = {PLAIN: Packed(lambda tensor: tensor, lambda tensor: tensor), **sides}
        for turn in range(runs + 1):
            for cache in ("kept", "dropped"):
                for name, side in kept.items():
                    drop = cache == "dropped" and name != PLAIN
                    if drop and not side.files():
                        continue
                    seconds, result = _step(weights, start, side, drop)
                    results.add(result)
                    if turn and seconds is not None:
                        samples.setdefault((name, cache), []).append(seconds)
    assert len(results) == 1, f"the sides compute different gradients: {results}"
    found = []
    for (name, cache), seconds_each in samples.items():
        if name == PLAIN and cache == "dropped":  # only there to be compared with
            continue
        row = _row(name, cache, seconds_each, samples[(PLAIN, cache)])
        wanted = name == OURS and width == WIDTH
        row["wanted"] = f"{WANTED:g}x" if wanted else None
        row["reached"] = against(-WANTED, -row["ratio"]) if wanted else None
        found.append(row)
    return found


def _step(weights: Sequence[Tensor], start: Tensor, side: Side, drop: bool) -> tuple[float | None, float]:
    """Return how long forward and backward took, None if the page cache could not be dropped, and a sum of gradients.

    The inputs of layers are put aside in forward and fetched in backward.
    """
    import torch

    begin = time.perf_counter()
    value = start
    for number, weight in enumerate(weights):
        side.save(number, value)
        value = torch.relu(value @ weight)
    side.settle()
    middle = time.perf_counter()
    dropped = not drop or forgotten(side.files())
    again = time.perf_counter()
    gradient, total = torch.ones_like(value), 0.0
    for number in reversed(range(len(weights))):
        value = side.load(number, number - 1 if number else None).view_as(gradient)
        total += (value.T @ gradient).diagonal().sum().item()
        gradient = gradient @ weights[number].T
        if number:
            gradient *= value > 0
    seconds = middle - begin + time.perf_counter() - again
    return seconds if dropped else None, total


def forgotten(files: Sequence[Path | int]) -> bool:
    """Make the system write files to the disk and drop them from its page cache; False if that does not succeed."""
    gone = bool(files)
    for each in files:
        file = each if isinstance(each, int) else os.open(each, os.O_RDONLY)
        try:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            gone = gone and not _cached(file)
        finally:
            if not isinstance(each, int):
                os.close(file)
    return gone


def _cached(file: int) -> bool:
    """Return whether the file's first page is in memory: if so, it can be read without waiting for the disk."""
    try:
        return os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot tell
        return True


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let this thread and those that it starts run on every core: `python -m benchmarks` keeps itself to one."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _row(side: str, cache: str, seconds: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    ratios = np.array(seconds) / np.array(base[: len(seconds)])
    return {
        "side": side,
        "page_cache": cache,
        **_percentiles("time", seconds, "_s"),
        **_percentiles("ratio", ratios),
    }


def _percentiles(name: str, values: Any, unit: str = "") -> dict[str, float]:
    low, middle, high = np.percentile(values, (10, 50, 90)).tolist()
    return {f"{name}{unit}": middle, f"{name}_10th{unit}": low, f"{name}_90th{unit}": high}
