"""The version of distsim, for every layer to read."""

__version__ = "0.1.0"
