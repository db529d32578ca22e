"""The commands of `distsim`: one file each, with `add`, which says its flags, and `run`, which returns an exit code.

What takes long to import is imported by the commands that need it: `distsim --help` answers at once.
"""
