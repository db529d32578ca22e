"""Numbers for rows, and for pairs of numbers, such as (rank, chunk), that columns name row by row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

_numbers: Ints = np.arange(0, dtype=np.int32)


def numbers(count: int) -> Ints:
    """Return 0, 1, ..., count - 1, read-only; long ones share their memory."""
    global _numbers
    if count > len(_numbers):
        _numbers = np.arange(count, dtype=np.int32)
        _numbers.flags.writeable = False
    return _numbers[:count]


def places(width: int, *pairs: tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]) -> tuple[list[Ints], int]:
    """Number the pairs (a, b), 0 <= b < width, that columns name, in ascending (a, b).

    The numbers are a * width + b; where that would be much more than there are rows, without gaps. Returns a
    column of numbers for each pair of columns, and a number that is greater than all of them.
    """
    high = 1 + max(int(first.max(initial=-1)) for first, _ in pairs)
    rows = max(len(first) for first, _ in pairs)
    if high * width > 4 * rows and high <= max(1 << 20, 4 * rows):  # leave out values of a that do not occur
        occurs = np.zeros(high, np.bool_)
        for first, _ in pairs:
            occurs[first] = True
        number = np.cumsum(occurs, dtype=np.int32) - np.int32(1)
        pairs = tuple((number[first], second) for first, second in pairs)
        high = int(occurs.sum())
    count = high * width
    if count <= max(1 << 20, 4 * rows) and count < 2**31:
        numbers = [first * np.int32(width) + second for first, second in pairs]
        return [np.asarray(column, dtype=np.int32) for column in numbers], count
    wide = [first.astype(np.int64) * width + second for first, second in pairs]
    named, where = np.unique(np.concatenate(wide), return_inverse=True)
    ends = np.cumsum([len(column) for column in wide])[:-1]
    return [part.astype(np.int32) for part in np.split(where, ends)], len(named)


def named(
    count: int, columns: list[Ints], *pairs: tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]
) -> tuple[npt.NDArray[np.int64], Ints, Ints]:
    """Return the numbers below `count` that `places` has given, ascending, and the pair (a, b) of each."""
    first, second = np.full(count, -1, np.int32), np.zeros(count, np.int32)
    for column, (a, b) in zip(columns, pairs, strict=True):
        row = np.full(count, -1, np.int32)
        row[column] = numbers(len(column))
        found = np.flatnonzero(row >= 0)
        first[found], second[found] = a[row[found]], b[row[found]]
    given = np.flatnonzero(first >= 0)
    return given, first[given], second[given]
