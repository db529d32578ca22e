"""What all tests share: the same examples in every run, and no test that a slow machine could fail."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("distsim", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("distsim")
