"""`distsim clusters`: the configurations that are shipped."""

from __future__ import annotations

import argparse
import json
from typing import Any

from distsim.commands import options


def add(commands: Any) -> None:
    """Add the command."""
    options.command(commands, "clusters", run, "list the shipped cluster configurations")


def run(flags: argparse.Namespace) -> int:
    """Print name, devices and title of each."""
    from distsim.cluster import shipped, summary

    clusters = [summary(name) for name in shipped()]
    if flags.json:
        values = [{"name": one.name, "devices": one.devices, "title": one.title} for one in clusters]
        print(json.dumps(values, indent=1))
        return 0
    width = max(len(one.name) for one in clusters)
    for one in clusters:
        print(f"{one.name:<{width}} {one.devices:>7,} devices  {one.title}")
    return 0
