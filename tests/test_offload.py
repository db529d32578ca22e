"""Tensors go to disk or host memory and come back bit for bit, while the computation goes on."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distsim.errors import ConfigError
from trainers.offload import Handle, Store, disk_store, host_store, stored_bytes

PAGE = 4096
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


@pytest.fixture(params=["disk", "host"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with disk_store(tmp_path, 2**22) if request.param == "disk" else host_store() as made:
        yield made


def bits(tensor: Tensor) -> list[bytes]:
    """Return the bytes of each element, fetched from its address."""
    steps = [range(0, size * stride, stride) if stride else [0] * size for size, stride in _axes(tensor)]
    size = tensor.element_size()
    return [ctypes.string_at(tensor.data_ptr() + sum(at) * size, size) for at in itertools.product(*steps)]


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.shape, tensor.stride(), strict=True))


def addresses(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte and of the one after the last."""
    last = sum((size - 1) * stride for size, stride in _axes(tensor))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def assert_same(before: list[Tensor], bits_before: list[list[bytes]], after: list[Tensor]) -> None:
    assert [each.dtype for each in after] == [each.dtype for each in before]
    assert [each.shape for each in after] == [each.shape for each in before]
    assert [each.stride() for each in after] == [each.stride() for each in before]
    assert [bits(each) for each in after] == bits_before
    for (one, new_one), (two, new_two) in itertools.combinations(zip(before, after, strict=True), 2):
        (low, high), (begin, end) = (addresses(each) if each.numel() else (0, 0) for each in (one, two))
        if low < end and begin < high:
            assert new_one.data_ptr() - new_two.data_ptr() == low - begin, "they shared memory"


@st.composite
def several_tensors(draw: st.DrawFn) -> list[Tensor]:
    """Tensors of all sorts over one or two pieces of memory, so that some of them share it."""
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    memory = [torch.from_numpy(random.integers(0, 256, 1280, np.uint8)) for _ in range(2)]
    tensors = []
    for _ in range(draw(st.integers(0, 4))):
        whole = draw(st.sampled_from(memory)).view(draw(st.sampled_from(DTYPES)))
        size = draw(st.lists(st.sampled_from((4, 3, 2, 1, 0)), max_size=3))
        stride = [draw(st.integers(0, 4)) for _ in size]
        tensors.append(whole.as_strided(size, stride, draw(st.integers(0, 40))))
    return tensors


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 3), several_tensors()),
        st.tuples(st.sampled_from(["read", "read", "discard"]), st.integers(0, 3), st.just([])),
    ),
    max_size=12,
)


@pytest.mark.parametrize("disk", [True, False])
@given(steps=STEPS)
def test_whatever_is_written_comes_back_bit_for_bit(disk: bool, steps: list[tuple[str, int, list[Tensor]]]) -> None:
    stored: dict[int, tuple[list[Tensor], list[list[bytes]]]] = {}
    reading: list[tuple[int, Handle, tuple[list[Tensor], list[list[bytes]]]]] = []
    writing: list[Handle] = []
    written = read = 0
    with ExitStack() as stack:
        # Each write needs one page, and there are as many as keys: whatever is not given back is missing soon.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(disk_store(folder, 4 * PAGE) if disk else host_store())
        for what, key, tensors in steps:
            if what == "write" and key not in stored:
                stored[key] = tensors, [bits(each) for each in tensors]
                writing.append(store.write(key, tensors))
                written += stored_bytes(tensors)
            elif what == "read" and key in stored:
                reading.append((key, store.read(key), stored[key]))
                read += stored_bytes(stored[key][0])
            elif what == "discard" and key in stored:
                store.discard(key)
                del stored[key]
        assert [each.result() for each in writing] == [[]] * len(writing)
        for _, handle, (tensors, expected) in reading:
            assert_same(tensors, expected, handle.result())
        assert (store.writes, store.written_bytes) == (len(writing), written)
        assert (store.reads, store.read_bytes) == (len(reading), read)


def test_nothing_that_comes_back_is_still_the_memory_that_was_written(store: Store) -> None:
    tensor = torch.arange(6.0)
    store.write("a", [tensor]).wait()
    tensor.zero_()
    (first,), (second,) = (store.read("a").result() for _ in range(2))
    first.zero_()
    assert torch.equal(second, torch.arange(6.0))


def test_shared_memory_is_written_once_and_comes_back_shared(store: Store) -> None:
    whole = torch.arange(3 * 4 * 8, dtype=torch.float32).reshape(4, 24)
    query, key, value = (whole[:, start : start + 8] for start in (0, 8, 16))
    store.write(0, [query, key, value, value.t(), whole]).wait()
    assert store.written_bytes == stored_bytes([query, key, value]) == 4 * 24 * 4
    *_, new_key, _, new_value, new_whole = store.read(0).result()
    new_whole.fill_(7)
    assert new_key.eq(7).all() and new_value.eq(7).all()


def test_memory_beside_the_tensors_is_not_written() -> None:
    whole = torch.zeros(64, 1024)
    assert stored_bytes([whole[2], whole[4:6]]) == 3 * 4096
    assert stored_bytes([whole[2:4], whole[3:5]]) == stored_bytes([whole[2:5], whole[3]]) == 3 * 4096
    assert stored_bytes([whole.expand(9, 64, 1024)]) == 64 * 4096
    assert stored_bytes([torch.empty(0, 5), torch.tensor(1.0)]) == 4


def test_conjugated_and_negated_tensors_are_so_again(store: Store) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j], requires_grad=True)
    written = [tensor.conj(), tensor.conj().imag, tensor]
    store.write(0, written).wait()
    read = store.read(0).result()
    assert [each.tolist() for each in read] == [each.tolist() for each in written]
    assert [each.is_conj() for each in read] == [True, False, False] and read[1].is_neg()
    assert not any(each.requires_grad for each in read)


def test_a_tensor_comes_back_as_aligned_as_it_was(store: Store) -> None:
    whole = torch.arange(100, dtype=torch.float32)
    tensors = [whole[start:] for start in range(0, 20, 3)]
    for number, tensor in enumerate(tensors):
        store.write(number, [tensor]).wait()
        (read,) = store.read(number).result()
        assert read.data_ptr() % 64 == (tensor.data_ptr() - whole.data_ptr()) % 64


def test_a_full_store_says_how_much_is_free_and_goes_on(tmp_path: Path) -> None:
    with disk_store(tmp_path, 3 * PAGE) as store:
        for key in range(3):
            store.write(key, [torch.full((5,), float(key))])
        store.discard(1)
        with pytest.raises(ConfigError) as error:
            store.write("large", [torch.zeros(1025)])
        assert str(tmp_path) in str(error.value) and "8192 bytes more" in str(error.value)
        assert "4096 are free" in str(error.value)
        store.write(3, [torch.full((5,), 3.0)])
        assert [store.read(key).result()[0][0].item() for key in (0, 2, 3)] == [0, 2, 3]


def gate(patch: pytest.MonkeyPatch, name: str) -> threading.Event:
    """Let the calls of a function of `os` begin only once the event is set."""
    event, real = threading.Event(), getattr(os, name)

    def gated(*arguments: Any) -> Any:
        assert event.wait(60)
        return real(*arguments)

    patch.setattr(os, name, gated)
    return event


def test_writing_goes_on_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_store(tmp_path, 4 * PAGE) as store:
        store.write("old", [torch.ones(3)]).wait()
        go = gate(monkeypatch, "pwrite")
        handle = store.write("new", [torch.ones(4)])
        assert store.read("old").result()[0].tolist() == [1, 1, 1], "a reader need not wait for the writer"
        too_early = store.read("new")
        assert not handle.done and not too_early.done and store.writes == 1
        go.set()
        assert too_early.result()[0].tolist() == [1] * 4
        assert handle.done


def test_room_is_not_given_away_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_store(tmp_path, PAGE) as store:
        store.write("old", [torch.ones(3)])
        go = gate(monkeypatch, "preadv")
        old = store.read("old")
        threading.Timer(0.05, go.set).start()
        store.discard("old")
        assert old.done
        store.write("new", [torch.zeros(3)]).wait()
        assert old.result()[0].tolist() == [1, 1, 1]


def test_large_tensors_go_in_several_blocks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.offload.BLOCK_BYTES", 1000)
    tensors = [torch.randn(2345), torch.randn(1), torch.randn(250)]
    store.write(0, tensors)
    assert_same(tensors, [bits(each) for each in tensors], store.read(0).result())


def test_memory_is_let_go_when_the_write_has_ended(store: Store) -> None:
    for key in range(20):
        array = np.ones(1000)
        gone = weakref.ref(array)
        tensor = torch.from_numpy(array)
        handle = store.write(key, [tensor, tensor[5:]])
        del array, tensor
        handle.wait()
        assert gone() is None


def names() -> set[str]:
    return {each.name.partition("_")[0] for each in threading.enumerate()}


def test_closing_ends_the_threads_and_gives_up_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.offload.BLOCK_BYTES", PAGE)
    begun, real = threading.Event(), os.pwrite

    def slow(*arguments: Any) -> int:
        begun.set()
        time.sleep(0.02)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    with disk_store(tmp_path, 2**24) as store:
        under_way = store.write(0, [torch.zeros(2**20)])  # 1024 blocks: 20 seconds
        waiting = store.write(1, [torch.zeros(2**20)])
        reading = store.read(1)
        assert begun.wait(60) and {"offload-write", "offload-read"} <= names()
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert not {"offload-write", "offload-read"} & names()
    for handle in (under_way, waiting, reading):
        with pytest.raises(ConfigError, match="closed"):
            handle.result()
    with pytest.raises(ConfigError, match="closed"):
        store.write(2, [torch.zeros(1)])


def test_the_file_stays_open_until_a_write_under_way_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, ended, real = gate(monkeypatch, "pwrite"), [], os.pwrite

    def noted(*arguments: Any) -> int:
        moved: int = real(*arguments)
        ended.append(moved)
        return moved

    monkeypatch.setattr(os, "pwrite", noted)
    with disk_store(tmp_path, PAGE) as store:
        store.write(0, [torch.zeros(2)])
        threading.Timer(0.05, go.set).start()
    assert ended == [8]


def test_a_wait_for_a_slow_disk_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = gate(monkeypatch, "pwrite")
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with disk_store(tmp_path, PAGE) as store:
            handle = store.write(0, [torch.zeros(1)])
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                handle.wait()
            assert not handle.done
            go.set()
            handle.wait()
    finally:
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize(
    ("name", "verb", "reason"), [("pwrite", "write", "No space left"), ("preadv", "read", "Input/output")]
)
def test_a_failed_copy_is_one_error_in_every_later_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, verb: str, reason: str
) -> None:
    number = {"pwrite": errno.ENOSPC, "preadv": errno.EIO}[name]
    go = threading.Event()

    def fails(*_: object) -> int:
        assert go.wait(60)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fails)
    with disk_store(tmp_path, 8 * PAGE) as store:
        fine = store.write(0, [torch.zeros(4, 8)])
        handle = store.read(0)
        go.set()
        calls: list[Callable[[], object]] = [
            handle.wait,
            handle.result,
            lambda: store.write(1, [torch.zeros(1)]),
            lambda: store.read(0),
            lambda: store.discard(0),
        ]
        messages = set()
        for call in calls:
            with pytest.raises(ConfigError) as error:
                call()
            messages.add(str(error.value))
        (message,) = messages
        assert message.startswith(f"{tmp_path}: cannot {verb} 128 bytes") and reason in message
        if name == "preadv":
            fine.wait()
    assert not {"offload-write", "offload-read"} & names()


def test_mistakes_are_named(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ConfigError, match=r"missing: cannot make a file .* No such file"):
        disk_store(tmp_path / "missing", 10)
    with pytest.raises(ConfigError, match="capacity, not 0 bytes"):
        disk_store(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"torch\.sparse_coo"):
        store.write(0, [torch.eye(2).to_sparse()])
    with pytest.raises(ConfigError, match="on meta"):
        store.write(0, [torch.empty(3, device="meta")])
    store.write(0, [])
    with pytest.raises(KeyError, match="stored already"):
        store.write(0, [])
    for call in (store.read, store.discard):
        with pytest.raises(KeyError):
            call(1)
    assert store.read(0).result() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device, and this machine has none")
@pytest.mark.parametrize("disk", [True, False])
def test_tensors_of_a_gpu_wait_for_its_stream(tmp_path: Path, disk: bool) -> None:
    with disk_store(tmp_path, 2**26) if disk else host_store() as store:
        tensor = torch.zeros(2**22, device="cuda")
        torch.cuda._sleep(10**8)  # type: ignore[no-untyped-call]
        tensor += 1
        store.write(0, [tensor[3:], tensor[::2]]).wait()
        tensor += 1
        first, second = store.read(0).result()
        assert first.device == tensor.device and first.eq(1).all() and second.stride() == (2,)
        first.fill_(5)
        assert second[2:].eq(5).all()
