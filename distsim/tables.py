"""Tables: for a terminal, for a notebook, and columns as CSV and Parquet files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distsim.errors import ConfigError
from distsim.files import write_whole

Columns = Mapping[str, Sequence[Any]]
"""Name -> values; all equally long."""


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], form: str = "simple") -> str:
    """Lay out rows under headers: the first column to the left, all others to the right.

    `form` is one of tabulate's formats: "simple" for a terminal, "html" for a notebook (escaped).
    """
    from tabulate import tabulate

    align = ["left"] + ["right"] * (len(headers) - 1)
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt=form, colalign=align, disable_numparse=True)


def csv_line(values: Sequence[object]) -> str:
    """Return one line of CSV with its newline; None is empty, and floats keep every digit."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if value is None else value for value in values])
    return text.getvalue()


def csv_text(columns: Columns) -> str:
    """Return columns as CSV with a line of headers."""
    return csv_line(list(columns)) + "".join(map(csv_line, zip(*columns.values(), strict=True)))


def check_writable(path: Path) -> None:
    """Make sure that `write` knows the file's ending and has what it needs for it.

    Raises: ConfigError naming the file.
    """
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"{path}: Parquet needs pyarrow, which is not installed; install it with "
                "`pip install 'distsim[parquet]'`, or write .csv"
            ) from None
    elif path.suffix != ".csv":
        raise ConfigError(f"{path}: unknown ending {path.suffix!r}; expected a file that ends in .csv or .parquet")


def write(path: Path, columns: Columns, types: Mapping[str, type]) -> None:
    """Write columns to a .csv or .parquet file, whole or not at all; the same columns give the same bytes.

    `types` has int, float or str for each column; all of them may hold None.

    Raises: ConfigError naming the file.
    """
    check_writable(path)
    if path.suffix == ".csv":
        write_whole(path, csv_text(columns))
        return
    import pyarrow
    import pyarrow.parquet

    kinds = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, kinds[types[name]]) for name in columns])
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        data = pyarrow.table({name: list(values) for name, values in columns.items()}, schema=schema)
        pyarrow.parquet.write_table(data, partial)
        partial.replace(path)
    except (OverflowError, pyarrow.ArrowInvalid) as error:  # counts beyond 63 bits
        raise ConfigError(f"{path}: cannot write it: {error}; expected numbers of 64 bits; .csv takes any") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
