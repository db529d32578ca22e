"""Exact symmetry: one representative of each class of transfers, against all transfers, and where only it can go."""

from __future__ import annotations

from typing import Any

from benchmarks import cases
from benchmarks.report import Table, against, in_turns, spread, table_of
from distsim.cluster import load
from distsim.step import simulate_strategy


def measure(runs: int, quick: bool = False) -> list[Table]:
    """Measure a ring of 1,024 ranks both ways, then one of 131,072 GPUs by symmetry."""
    few = 16 if quick else 1024
    cluster = cases.switch(few)
    sides = in_turns(
        {
            "whole": lambda: simulate_strategy("ring", few, cases.PARAMS, cluster, whole=True).time_s,
            "symmetry": lambda: simulate_strategy("ring", few, cases.PARAMS, cluster).time_s,
        },
        runs,
    )
    assert abs(sides.result["whole"] / sides.result["symmetry"] - 1) <= 1e-12, sides.result
    ratios = [whole / part for whole, part in zip(sides.seconds["whole"], sides.seconds["symmetry"], strict=True)]
    both: dict[str, Any] = {"what": f"ring, {few:,} ranks, one switch", "transfers": cases.rows(cases.ring(few))}
    for name in ("whole", "symmetry"):
        both |= spread(name, sides.seconds[name], "_s")
    both |= spread("ratio", ratios)

    many = 16 if quick else 131_072
    large = load("dgx_h100") if quick else load("h100_131072")
    many = len(large.devices)
    alone = in_turns({"symmetry": lambda: simulate_strategy("ring", many, many * 1000, large).time_s}, runs)
    transfers = many * 2 * (many - 1)
    seconds = alone.seconds["symmetry"]
    wanted = against(1 / 2.0, 1 / sorted(seconds)[len(seconds) // 2])
    huge = {"what": f"ring, {many:,} GPUs of {large.name}", "transfers": transfers, **spread("simulate", seconds, "_s")}
    return [
        table_of("Symmetry against the whole", "The same makespan: build, prove, check, lower, run, bounds.", [both]),
        table_of(
            "Only by symmetry",
            "Everything but loading the cluster: proof, engine, exact counts, bounds. Wanted: under 2 s.",
            [{**huge, "reached": wanted}],
        ),
    ]
