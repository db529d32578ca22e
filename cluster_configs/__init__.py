"""Shipped clusters: one YAML file each, with the source of every number (format: distsim/cluster.py)."""
