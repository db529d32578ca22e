"""Is gradient accumulation equivalent to the large batch? A test for any model, and who is to blame where it is not.

from trainers.accumulation import examine

report = examine(build())       # a Workload, as `python -m trainers.accumulation --factory` takes it
assert report.equivalent, report.text()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.accumulation.equivalence import examine
    from trainers.accumulation.report import Report

__all__ = ["Report", "examine"]


def __getattr__(name: str) -> object:
    # Only when asked for: importing torch takes seconds, which `python -m trainers.accumulation --help` need not.
    where = {"examine": "equivalence", "Report": "report"}
    if name not in where:
        raise AttributeError(f"module 'trainers.accumulation' has no attribute {name!r}")
    return getattr(import_module(f"trainers.accumulation.{where[name]}"), name)
