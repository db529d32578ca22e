"""Describe a gradient exchange once; check it, simulate it, and run it.

`simulate`, `compare` and `sweep` do from Python what the commands of these names do; see docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distsim.version import __version__

if TYPE_CHECKING:
    from distsim.api import Result, compare, simulate
    from distsim.sweeps import sweep

__all__ = ["Result", "__version__", "compare", "simulate", "sweep"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import distsim` alone takes no time."""
    if name == "sweep":
        from distsim import sweeps

        return sweeps.sweep
    if name in __all__:
        from distsim import api

        return getattr(api, name)
    raise AttributeError(f"module 'distsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
