"""Loops that arrays cannot express: interpreted for small inputs, the same code compiled by Numba for large ones.

A loop is a plain function at the top of a module; its arguments are numbers, NumPy arrays and named tuples of
arrays. It may call other functions of the same module, and nothing of other modules but what Numba knows
(`heapq`, `math`, NumPy).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np

COMPILE_FROM = 20_000
"""Below this much work, interpreting a loop takes less time than loading the compiled one (measured: about
0.5 million events a second interpreted, 0.3 s to load Numba and its cached code)."""


def call(loop: Callable[..., Any], work: int, *arguments: Any, compiled: bool | None = None) -> Any:
    """Call `loop(*arguments)`, compiled if `work` (rows, tasks, edges) is large; both give the same values.

    `compiled` overrides that choice. A loop that is interpreted is given lists in place of arrays: what it
    changes in them is lost, so it returns all of its results.
    """
    if compiled is None:
        compiled = work >= COMPILE_FROM
    if compiled:
        return _compile(loop)(*arguments)
    # Lists make the interpreted loop several times faster than NumPy scalars do.
    return loop(*map(_listed, arguments))


def _listed(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return argument.tolist()
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*map(_listed, argument))
    return argument


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function and those that it calls in its module; from Numba's cache where there is one."""
    import numba

    assert isinstance(function, FunctionType)
    helpers = {
        name: _compile(value)
        for name, value in function.__globals__.items()
        if name in function.__code__.co_names
        and isinstance(value, FunctionType)
        and value.__module__ == function.__module__
    }
    # The copy sees its helpers compiled; the original, which is interpreted, sees them as they stand.
    copy = FunctionType(function.__code__, {**function.__globals__, **helpers}, function.__name__)
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    try:
        result: Callable[..., Any] = numba.njit(cache=True)(copy)
    except RuntimeError:  # no folder that can be written: compile anew in each process
        result = numba.njit(copy)
    return result
