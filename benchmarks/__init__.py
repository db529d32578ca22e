"""How fast distsim is, beside others: both sides in one run, on one core, as ratios. `python -m benchmarks --help`."""
