"""What users see when something is wrong: what, where, what was expected, the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistsimError(ValueError):
    """A user's mistake: one clear message, exit code 2, never a traceback.

    Our own broken invariants are `assert`; everything that a user can cause derives from this class.
    """


class ConfigError(DistsimError):
    """A file, flag or value that cannot be used."""


class TooFewDevices(ConfigError):
    """An exchange that has more ranks than the cluster has devices."""


class ScheduleError(DistsimError):
    """A schedule that is malformed or does not do what its postcondition promises."""


class DeadlockError(DistsimError):
    """A task graph that can never finish; the message shows who waits for whom."""


class RankFailed(DistsimError):
    """A rank that fails and is needed; the message names who waits for it."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `"; did you mean 'ring'?"` or, when nothing is near, the list of valid names."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(names)}" if names else ""
