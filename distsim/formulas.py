"""Closed forms: messages, their size and the time of each strategy with default options, to hold tables against.

`n` workers exchange `p` elements, or `size` bytes. Times are those of an ideal switch that does not block: each
device has one link in and one out of `bandwidth` B (bytes a second), a message alone takes `latency` a plus its
bytes over B, simultaneous messages share links max-min fairly, and additions are free. Messages go as soon as
what they carry is there, whatever step they stand in. Times hold for sizes that the chunks divide; a formula
is None where there is no closed form: for many strategies where n is no power of two, and where the phases of a
strategy overlap.

The cost model is that of Hockney; the formulas of the algorithms follow Thakur, Rabenseifner and Gropp, "Optimization
of collective communication operations in MPICH", Int. J. High Perform. Comput. Appl. 19, 2005, except where
messages that could follow each other share a link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, isqrt

Time = tuple[float, float] | None
"""Latencies, and times that the whole array crosses a link: (x, y) stands for x * a + y * size/B."""


@dataclass(frozen=True, slots=True)
class Formula:
    """One strategy for one collective; the texts are what the functions compute, to be printed."""

    messages_text: str
    messages: Callable[[int], int]
    """n -> messages, where every chunk has elements."""
    parts_text: str
    parts: Callable[[int], int]
    """n -> into how many parts the array is cut."""
    time_text: str
    terms: Callable[[int], Time]
    """n -> (latencies, arrays); for 2 workers and more."""

    def largest_elements(self, n: int, p: int) -> int:
        """Elements of the largest message of n workers that exchange p elements, where the chunks divide p."""
        return ceil(p / self.parts(n)) if self.messages(n) else 0

    def time_s(self, n: int, size: float, latency_s: float, bandwidth_Bps: float) -> float | None:
        """Seconds that n workers need for `size` bytes on an ideal switch; None where no closed form is known."""
        if n == 1 and not self.messages(n):
            return 0.0
        terms = self.terms(n)
        return None if terms is None else terms[0] * latency_s + terms[1] * size / bandwidth_Bps


def _log2(n: int) -> int | None:
    """The logarithm of a power of two, None of other numbers."""
    return None if n & (n - 1) else n.bit_length() - 1


def _for_powers(terms: Callable[[int, int], Time]) -> Callable[[int], Time]:
    """Terms of n and log2 n, for powers of two alone."""

    def only(n: int) -> Time:
        power = _log2(n)
        return None if power is None else terms(n, power)

    return only


def _node(n: int) -> int:
    """Ranks of a node where `hierarchical` is not told: the largest divisor up to 8."""
    return max(size for size in range(1, 9) if n % size == 0)


def _columns(n: int) -> int:
    """Length of a row of `torus` where it is not told: n over its largest divisor up to the square root."""
    return n // max(rows for rows in range(1, isqrt(n) + 1) if n % rows == 0)


def _hierarchical_scatter(n: int) -> Time:
    node = _node(n)
    return (node > 1) + n // node - 1, (node - 1) / node + (n // node - 1) / n


def _hierarchical_gather(n: int) -> Time:
    return _hierarchical_scatter(n) if _node(n) in (1, n) else None


def _torus_scatter(n: int) -> Time:
    columns = _columns(n)
    return columns - 1 + n // columns - 1, (columns - 1) / columns + (n // columns - 1) / n


def _torus_gather(n: int) -> Time:
    return _torus_scatter(n) if _columns(n) == n else None


def _twice(half: Callable[[int], Time]) -> Callable[[int], Time]:
    """Terms of an all-reduce whose two halves take the same time."""

    def both(n: int) -> Time:
        terms = half(n)
        return None if terms is None else (2 * terms[0], 2 * terms[1])

    return both


def _beyond(n: int) -> int:
    """Ranks beyond the largest power of two."""
    return n - (1 << (n.bit_length() - 1))


def _rounds(n: int) -> int:
    """Messages of as many rounds as the largest power of two q has factors, q in each: q log2 q."""
    actors = n - _beyond(n)
    return actors * (actors.bit_length() - 1)


def _ones(n: int) -> int:
    """Ones among the binary digits of 0..n-1."""
    return sum(number.bit_count() for number in range(n))


def _whole(n: int) -> int:
    return 1


def _nth(n: int) -> int:
    return n


FORMULAS: dict[str, dict[str, Formula]] = {
    "all-reduce": {
        "all-to-all": Formula("n(n-1)", lambda n: n * (n - 1), "p", _whole, "a + (n-1) S/B", lambda n: (1, n - 1)),
        "direct": Formula(
            "2n(n-1)", lambda n: 2 * n * (n - 1), "p/n", _nth, "2a + 2(n-1)/n S/B", lambda n: (2, 2 * (n - 1) / n)
        ),
        "double-tree": Formula(
            "4(n-1)",
            lambda n: 4 * (n - 1),
            "p/2",
            lambda n: 2,
            "2 log2 n a + (2 log2 n - 1) S/B, n a power of two",
            _for_powers(lambda n, power: (2 * power, 2 * power - 1)),
        ),
        "halving-doubling": Formula(
            "2q log2 q + 2(n-q), q the largest power of two up to n",
            lambda n: 2 * _rounds(n) + 2 * _beyond(n),
            "p/2, p where n is no power of two",
            lambda n: 1 if _beyond(n) else 2,
            "2 log2 n a + 2(n-1)/n S/B, n a power of two",
            _for_powers(lambda n, power: (2 * power, 2 * (n - 1) / n)),
        ),
        "hierarchical": Formula(
            "2n(g-1) + 2n(n/g-1), nodes of g",
            lambda n: 2 * n * (_node(n) - 1 + n // _node(n) - 1),
            "p/g (p/n where g = 1)",
            lambda n: n if _node(n) == 1 else _node(n),
            "2 (a + (g-1)/g S/B) + 2(n/g-1) (a + S/n/B), nodes of g (no first a where g = 1)",
            _twice(_hierarchical_scatter),
        ),
        "parameter-server": Formula("2n", lambda n: 2 * n, "p", _whole, "2a + 2n S/B", lambda n: (2, 2 * n)),
        "recursive-doubling": Formula(
            "q log2 q + 2(n-q), q the largest power of two up to n",
            lambda n: _rounds(n) + 2 * _beyond(n),
            "p",
            _whole,
            "log2 n (a + S/B), n a power of two",
            _for_powers(lambda n, power: (power, power)),
        ),
        "ring": Formula(
            "2n(n-1)",
            lambda n: 2 * n * (n - 1),
            "p/n",
            _nth,
            "2(n-1) (a + S/n/B)",
            lambda n: (2 * (n - 1), 2 * (n - 1) / n),
        ),
        "torus": Formula(
            "2n(C-1) + 2n(n/C-1), rows of C",
            lambda n: 2 * n * (_columns(n) - 1 + n // _columns(n) - 1),
            "p/C",
            _columns,
            "2(C-1) (a + S/C/B) + 2(n/C-1) (a + S/n/B), rows of C",
            _twice(_torus_scatter),
        ),
        "tree": Formula(
            "2(n-1)",
            lambda n: 2 * (n - 1),
            "p",
            _whole,
            "2 log2 n a + log2 n (log2 n + 3)/2 S/B, n a power of two",
            _for_powers(lambda n, power: (2 * power, power * (power + 3) / 2)),
        ),
    },
    "reduce-scatter": {
        "direct": Formula("n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "a + (n-1)/n S/B", lambda n: (1, (n - 1) / n)),
        "halving-doubling": Formula(
            "q log2 q + 2(n-q), q the largest power of two up to n",
            lambda n: _rounds(n) + 2 * _beyond(n),
            "p/2, p where n is no power of two",
            lambda n: 1 if _beyond(n) else 2,
            "log2 n a + (n-1)/n S/B, n a power of two",
            _for_powers(lambda n, power: (power, (n - 1) / n)),
        ),
        "hierarchical": Formula(
            "n(n-1)",
            lambda n: n * (n - 1),
            "p/n",
            _nth,
            "a + (g-1)/g S/B + (n/g-1) (a + S/n/B), nodes of g (no first a where g = 1)",
            _hierarchical_scatter,
        ),
        "ring": Formula(
            "n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "(n-1) (a + S/n/B)", lambda n: (n - 1, (n - 1) / n)
        ),
        "torus": Formula(
            "n(n-1)",
            lambda n: n * (n - 1),
            "p/n",
            _nth,
            "(C-1) (a + S/C/B) + (n/C-1) (a + S/n/B), rows of C",
            _torus_scatter,
        ),
    },
    "all-gather": {
        "direct": Formula("n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "a + (n-1)/n S/B", lambda n: (1, (n - 1) / n)),
        "halving-doubling": Formula(
            "q log2 q + 2(n-q), q the largest power of two up to n",
            lambda n: _rounds(n) + 2 * _beyond(n),
            "p/2, p where n is no power of two",
            lambda n: 1 if _beyond(n) else 2,
            "log2 n a + (n-1)/n S/B, n a power of two",
            _for_powers(lambda n, power: (power, (n - 1) / n)),
        ),
        "hierarchical": Formula("n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "phases overlap", _hierarchical_gather),
        "ring": Formula(
            "n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "(n-1) (a + S/n/B)", lambda n: (n - 1, (n - 1) / n)
        ),
        "torus": Formula("n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "phases overlap", _torus_gather),
    },
    "broadcast": {
        "chain": Formula("n-1", lambda n: n - 1, "p", _whole, "(n-1) (a + S/B)", lambda n: (n - 1, n - 1)),
        "direct": Formula(
            "n(n-1)",
            lambda n: n * (n - 1),
            "p/n",
            _nth,
            "2a + (3n-4)/n S/B (a + S/B for n = 2)",
            lambda n: (1 + (n > 2), (3 * n - 4) / n),
        ),
        "tree": Formula(
            "n-1",
            lambda n: n - 1,
            "p",
            _whole,
            "log2 n a + log2 n (log2 n + 1)/2 S/B, n a power of two",
            _for_powers(lambda n, power: (power, power * (power + 1) / 2)),
        ),
    },
    "reduce": {
        "chain": Formula("n-1", lambda n: n - 1, "p", _whole, "(n-1) (a + S/B)", lambda n: (n - 1, n - 1)),
        "direct": Formula(
            "(n+1)(n-1)",
            lambda n: (n + 1) * (n - 1),
            "p/n",
            _nth,
            "2a + 2(n-1)/n S/B",
            lambda n: (2, 2 * (n - 1) / n),
        ),
        "tree": Formula(
            "n-1",
            lambda n: n - 1,
            "p",
            _whole,
            "log2 n (a + S/B), n a power of two",
            _for_powers(lambda n, power: (power, power)),
        ),
    },
    "personalised-all-to-all": {
        "bruck": Formula(
            "n times the ones in the binary digits of 0..n-1",
            lambda n: n * _ones(n),
            "p/n",
            _nth,
            "rounds overlap",
            lambda n: None,
        ),
        "direct": Formula("n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "a + (n-1)/n S/B", lambda n: (1, (n - 1) / n)),
        "pairwise": Formula(
            "n(n-1)", lambda n: n * (n - 1), "p/n", _nth, "a + (n-1)/n S/B", lambda n: (1, (n - 1) / n)
        ),
    },
}
"""By collective and strategy. In the texts S is the size in bytes, p/2 a message of half of the elements."""
