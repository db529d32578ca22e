"""Real data-parallel training that runs the schedules which `distsim` checks and simulates."""
