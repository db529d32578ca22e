"""Metrics of a run while it goes on: a file of JSON lines, TensorBoard on request, and a line on the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from distsim.errors import ConfigError
from distsim.files import make_writable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Value = str | int | float | bool | None


class Metrics:
    """One JSON line for every step and every evaluation, in FOLDER/NAME.metrics.jsonl, written at once.

    Numbers that JSON does not have are written as in run records: "NaN", "Infinity" and "-Infinity", as strings.
    """

    def __init__(self, *, folder: Path | None, name: str, steps: int, tensorboard: bool, show: bool) -> None:
        """Start a run of `steps` steps; what an earlier one of this name has left is overwritten.

        folder: None writes nothing (ranks other than 0).
        tensorboard: write the same to FOLDER/NAME.tensorboard, too.
        show: keep a line on stderr, with the loss, tokens per second, MFU and the number of steps left out.

        Raises: ConfigError if the files cannot be written, or tensorboard is not installed.
        """
        self._skipped = 0
        self._evaluated = ""
        self._file: FileIO | None = None
        self._board: SummaryWriter | None = None
        if folder is not None:
            board = folder / f"{name}.tensorboard"
            writer = _writer(board) if tensorboard else None
            self._file = _open(folder / f"{name}.metrics.jsonl")
            self._board = writer(board) if writer is not None else None
        self._bar = tqdm(total=steps, desc=name, unit="step", disable=not show, file=sys.stderr)
        self._began = time.monotonic()

    def step(
        self,
        step: int,
        *,
        loss: float,
        count: int,
        learning_rate: float,
        grad_norm: float | None,
        step_s: float,
        exchange_s: float | None,
        exposed_s: float | None,
        messages: int | None,
        bytes: int | None,
        mfu: float | None,
        skipped: bool,
    ) -> None:
        """Report a step: in seconds what ends in _s; messages and bytes are those that this rank has sent.

        loss: the mean over the step's `count` tokens, of all ranks. exchange_s: the sum over the step's exchanges, of
        which two may run at once. exposed_s: how long the rank had nothing else to do. skipped: left out for a gradient
        that was not finite. None: not known.
        """
        self._skipped += skipped
        speed = count / step_s if step_s > 0 else math.nan
        self._write(
            "step",
            step=step,
            loss=loss,
            count=count,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            step_s=step_s,
            exchange_s=exchange_s,
            exposed_s=exposed_s,
            messages=messages,
            bytes=bytes,
            mfu=mfu,
            skipped=skipped,
            tokens_per_s=speed,
        )
        parts = [f"loss {loss:.4f}", f"{speed:,.0f} tokens/s", f"MFU {mfu:.1%}" if mfu is not None else ""]
        parts += [f"{self._skipped} skipped" if self._skipped else "", self._evaluated]
        self._bar.set_postfix_str(", ".join(part for part in parts if part), refresh=False)
        self._bar.update()

    def evaluation(self, step: int, *, loss: float, count: int) -> None:
        """Report an evaluation after a step: the mean loss over `count` tokens."""
        self._evaluated = f"evaluation {loss:.4f}"
        self._write("evaluation", step=step, loss=loss, count=count)

    def close(self) -> None:
        """Close the files, and leave the line as it is."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, event: str, *, step: int, **values: Value) -> None:
        if self._file is not None:
            row = {"event": event, "step": step, **values, "time_s": time.monotonic() - self._began}
            line = json.dumps({key: _json(value) for key, value in row.items()}, allow_nan=False)
            try:
                self._file.write(f"{line}\n".encode())
            except OSError as error:
                raise ConfigError(f"{self._file.name}: cannot write it: {error.strerror}") from error
        if self._board is not None:
            for key, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"{event}/{key}", value, step)


def _json(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _open(path: Path) -> FileIO:
    """Open a file of which every write is one of the system's: a killed run leaves whole lines."""
    make_writable(path.parent)
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error


def _writer(folder: Path) -> type[SummaryWriter]:
    """Return TensorBoard's writer, and make room for it in a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard needs a package; `pip install 'distsim[tensorboard]'` has it") from None
    make_writable(folder)
    for earlier in folder.glob("events.out.tfevents.*"):  # TensorBoard would show both runs as one
        earlier.unlink()
    return SummaryWriter
