"""The command line `distsim`. Tables on stdout, `--json` instead if asked, everything else on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from distsim.allocator import keep_freed_memory
from distsim.commands import algorithms, check, clusters, compare, diff, exchange, memory, sweep
from distsim.errors import ConfigError, DistsimError
from distsim.version import __version__


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others: one message, exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 1 where a comparison fails, 2 for a user's mistake."""
    if argv is None:  # a program of its own, and not a part of somebody else's
        keep_freed_memory()
    try:
        try:
            flags = _parser().parse_args(argv)
            code: int = flags.command(flags)
        finally:  # `--help` and `--version` leave by SystemExit
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()
        return code
    except DistsimError as error:
        print(f"distsim: error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("distsim: error: not enough memory for a schedule of that size; use fewer ranks", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk behind stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"distsim: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(prog="distsim", description="Plan, check and simulate gradient exchanges and memory.")
    parser.add_argument("--version", action="version", version=f"distsim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (exchange, compare, sweep, memory, check, algorithms, clusters, diff):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
