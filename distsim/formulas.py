"""Closed forms: messages, their size and the time of each strategy with default options, to hold tables against.

`n` workers exchange `p` elements, or `size` bytes. Times are those of an ideal switch that does not block: each
device has one link in and one out of `bandwidth` B (bytes a second), a message alone takes `latency` a plus its
bytes over B, simultaneous messages share links max-min fairly, those of an ordered pair of ranks go one after
another, and additions are free. A formula says with which `posting` it holds: most do with messages that go as soon
as what they carry is there, whatever step they stand in, some only with the rounds of the literature. Times hold for
sizes that the chunks divide; where n is no power of two, some strategies have no closed form, because messages of
different rounds meet on a link.

The cost model is that of Hockney ("The communication challenge for MPP", Parallel Computing 20, 1994); the formulas
of the algorithms follow Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
MPICH", Int. J. High Perform. Comput. Appl. 19, 2005, except where messages to several ranks share a link.

A formula is an expression, which is evaluated to be held against simulations and shown to be read, so that what is
shown is what holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, isqrt
from types import CodeType
from typing import Literal

Time = tuple[float, float] | None
"""Latencies, and times that the whole array crosses a link: (x, y) stands for x * a + y * size/B."""


@dataclass(frozen=True, slots=True)
class Formula:
    """One strategy for one collective: expressions in Python, of n and the names in `NAMES`."""

    messages_are: str
    """How many, where every chunk has elements."""
    largest_is: str
    """Elements of the largest message, of p; where the chunks divide p."""
    latencies: str
    """How many follow each other: the factor of a. For 2 workers and more, as the next one."""
    arrays: str
    """How often the bytes of the whole array cross a link one after another: the factor of S/B."""
    powers_only: bool = False
    """Whether the time holds only where n is a power of two."""
    posting: Literal["eager", "rounds"] = "eager"
    """When ranks hand over messages where the time holds: as soon as they can go, or in the textbooks' rounds."""

    def messages(self, n: int) -> int:
        """Number of messages that n workers send, where every chunk has elements."""
        return int(_value(self.messages_are, n))

    def largest_elements(self, n: int, p: int) -> int:
        """Elements of the largest message of n workers that exchange p elements, where the chunks divide p."""
        return ceil(_value(self.largest_is, n, p)) if self.messages(n) else 0

    def terms(self, n: int) -> Time:
        """Return (latencies, arrays) for 2 workers and more; None where no closed form is known."""
        if self.powers_only and n & (n - 1):
            return None
        return _value(self.latencies, n), _value(self.arrays, n)

    def time_s(self, n: int, size: float, latency_s: float, bandwidth_Bps: float) -> float | None:
        """Seconds that n workers need for `size` bytes on an ideal switch; None where no closed form is known."""
        if n == 1 and not self.messages(n):
            return 0.0
        terms = self.terms(n)
        return None if terms is None else terms[0] * latency_s + terms[1] * size / bandwidth_Bps

    def holds_for(self) -> str:
        """Return for which n the time holds, to be read: `"powers of two"`."""
        return "powers of two" if self.powers_only else "all n"

    def time_text(self) -> str:
        """Return the time to be read: `"2(n-1) a + 2(n-1)/n S/B"`."""
        return f"{_factor(self.latencies)}a + {_factor(self.arrays)}S/B"


def shown(expression: str) -> str:
    """Return an expression as it is read: `"2n(n-1)"` for `"2*n*(n-1)"`."""
    text = expression.replace("//", "/").replace("==", "=")
    return re.sub(r"(?<=\d)\*(?!log)|(?<=[\dA-Za-z])\*(?=\()", "", text).replace("*", " ")


def _factor(expression: str) -> str:
    """Return an expression as the factor of what follows."""
    outside = re.sub(r"\((?:[^()]|\([^()]*\))*\)", "", expression)  # brackets, and those in them
    text = f"({shown(expression)})" if re.search("[ +-]", outside) else shown(expression)
    return "" if text == "1" else text if text.isdigit() else f"{text} "


def _log2(n: int) -> int:
    """The logarithm of a power of two."""
    return n.bit_length() - 1


def _power(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def _node(n: int) -> int:
    return max(size for size in range(1, 9) if n % size == 0)


def _row(n: int) -> int:
    return n // max(rows for rows in range(1, isqrt(n) + 1) if n % rows == 0)


def _ones(n: int) -> int:
    return sum(number.bit_count() for number in range(n))


def _last_served(n: int) -> tuple[int, int]:
    """Hops to the rank that a binomial broadcast serves last, and the copies that those on the way send.

    Rank 0 sends to L = ceil(log2 n) children at once. Of their subtrees, the first has n - 2^(L - 1) ranks and the
    second, which is full, 2^(L - 2); whichever has more goes on longest, since the one then contains the other.
    """
    if n == 1:
        return 0, 0
    children = (n - 1).bit_length()
    hops, copies = _last_served(max(n - (1 << (children - 1)), (1 << children) // 4))
    return hops + 1, copies + children


NAMES: dict[str, tuple[Callable[[int], int], str]] = {
    "q": (_power, "the largest power of two up to n"),
    "g": (_node, "the ranks of a node, option `node`; by default the largest divisor of n up to 8"),
    "C": (_row, "the ranks of a row, n over the option `rows`, by default the largest divisor of n up to its root"),
    "d": (lambda n: (n - 1).bit_length(), "the binary digits of n-1; log2(n) for a power of two"),
    "w": (_ones, "the ones among the binary digits of 0, 1, ..., n-1; n log2(n)/2 for a power of two"),
    "h": (lambda n: _last_served(n)[0], "the hops to the rank that is served last; log2(n) for a power of two"),
    "c": (
        lambda n: _last_served(n)[1],
        "the copies that the ranks on the way to it send; log2(n) (log2(n)+1)/2 for a power of two",
    ),
}
"""What expressions may name besides n and p: a function of n, and what it means."""


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, expression, "eval")


def _value(expression: str, n: int, p: int = 0) -> float:
    """Evaluate one of the expressions below; `eval` sees no text but these."""
    code = _compiled(expression)
    names = {name: NAMES[name][0](n) for name in code.co_names if name in NAMES}
    value: float = eval(code, {"__builtins__": {}, "log2": _log2, "n": n, "p": p, **names})
    return value


_EVERYBODY = Formula("n*(n-1)", "p/n", "1", "(n-1)/n")
_AROUND = Formula("n*(n-1)", "p/n", "n-1", "(n-1)/n")
_HALVING = Formula("2*(n-q) + q*log2(q)", "p/2 if n == q else p", "log2(n)", "(n-1)/n", powers_only=True)
_NODES = Formula("n*(n-1)", "p/n", "n//g if g > 1 else n-1", "(n-1)/n", posting="rounds")
_GRID = Formula("n*(n-1)", "p/n", "C + n//C - 2", "(n-1)/n", posting="rounds")
_CHAIN = Formula("n-1", "p", "n-1", "n-1")

FORMULAS: dict[str, dict[str, Formula]] = {
    "all-reduce": {
        "all-to-all": Formula("n*(n-1)", "p", "1", "n-1"),
        "direct": Formula("2*n*(n-1)", "p/n", "2", "2*(n-1)/n"),
        "double-tree": Formula("4*(n-1)", "p/2", "2*log2(n)", "2*log2(n) - 1", powers_only=True),
        "halving-doubling": Formula(
            "2*(n-q) + 2*q*log2(q)", "p/2 if n == q else p", "2*log2(n)", "2*(n-1)/n", powers_only=True
        ),
        "hierarchical": Formula(
            "2*n*(g + n//g - 2)", "p/g if g > 1 else p/n", "2*n//g if g > 1 else 2*(n-1)", "2*(n-1)/n"
        ),
        "parameter-server": Formula("2*n", "p", "2", "2*n"),
        "recursive-doubling": Formula("2*(n-q) + q*log2(q)", "p", "log2(n)", "log2(n)", powers_only=True),
        "ring": Formula("2*n*(n-1)", "p/n", "2*(n-1)", "2*(n-1)/n"),
        "torus": Formula("2*n*(C + n//C - 2)", "p/C", "2*(C + n//C - 2)", "2*(n-1)/n"),
        "tree": Formula("2*(n-1)", "p", "2*log2(n)", "log2(n)*(log2(n)+3)/2", powers_only=True),
    },
    "reduce-scatter": {
        "direct": _EVERYBODY,
        "halving-doubling": _HALVING,
        "hierarchical": _NODES,
        "ring": _AROUND,
        "torus": _GRID,
    },
    "all-gather": {
        "direct": _EVERYBODY,
        "halving-doubling": _HALVING,
        "hierarchical": _NODES,
        "ring": _AROUND,
        "torus": _GRID,
    },
    "broadcast": {
        "chain": _CHAIN,
        "direct": Formula("n*(n-1)", "p/n", "2", "2*(n-1)/n", posting="rounds"),
        "tree": Formula("n-1", "p", "h", "c"),
    },
    "reduce": {
        "chain": _CHAIN,
        "direct": Formula("(n+1)*(n-1)", "p/n", "2", "2*(n-1)/n"),
        "tree": Formula("n-1", "p", "log2(n)", "log2(n)", powers_only=True),
    },
    "personalised-all-to-all": {
        # In round k a rank sends one other all parts whose distance has digit k: in line, so with one latency.
        "bruck": Formula("n*w", "p/n", "d", "w/n", posting="rounds"),
        "direct": _EVERYBODY,
        "pairwise": _EVERYBODY,
    },
}
"""By collective and strategy."""
