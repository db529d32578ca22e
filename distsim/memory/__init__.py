"""Memory plans: which activations to keep, recompute or offload, and when; checked, simulated, and run by `trainers`.

A `Chain` is what there is to plan, a `MemoryPlan` a table of operations, and `replay` the one checker of all plans.
"""
