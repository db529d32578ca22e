"""Real training: the schedules that distsim simulates, run on real tensors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.attached import Attached, attach
    from trainers.workload import Workload

__all__ = ["Attached", "Workload", "attach"]


def __getattr__(name: str) -> object:
    # Only when asked for: importing torch takes seconds, which `python -m trainers --help` need not.
    where = {"Attached": "attached", "attach": "attached", "Workload": "workload"}
    if name not in where:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    return getattr(import_module(f"trainers.{where[name]}"), name)
