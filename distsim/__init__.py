"""Describe a gradient exchange once; check it, simulate it, and run it."""

__version__ = "0.1.0"
