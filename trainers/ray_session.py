"""A Ray to run on: a local one that comes and goes with the command, or one that is there already."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private import ray_constants

from distsim.errors import ConfigError

STORE_LEAST_BYTES = 200_000_000


@contextmanager
def session(address: str | None, exchange_bytes: int) -> Iterator[None]:
    """A Ray that ends with the block: a local one, gone with all its files, or a connection to `address`.

    A local object store holds several exchanges, and its pages are touched beforehand: `put` into fresh pages
    takes up to six times as long.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_preallocate_plasma_memory", "1")
    folder = _session_folder() if address is None else None
    print("starting Ray ..." if folder else f"joining Ray at {address} ...", file=sys.stderr)
    try:
        if folder is None:
            _join(str(address))
        else:
            with _loopback_only():
                ray.init(
                    address="local",
                    num_cpus=os.cpu_count(),
                    object_store_memory=_store_bytes(exchange_bytes),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder),
                )
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _join(address: str) -> None:
    """Connect to a running Ray.

    Raises: ConfigError if none answers.
    """
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster answers there ({error}); if it has one that wants a token, "
            "set RAY_AUTH_MODE=token, which Ray does by itself only for clusters that it starts"
        ) from error


def _knock(address: str) -> None:
    """Make sure that somebody listens at HOST:PORT; Ray itself would wait for minutes.

    Raises: ConfigError if that is no address; ConnectionError if nobody answers.
    """
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--ray-address {address}: expected HOST:PORT, or auto for the cluster on this machine")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(error) from error


def _store_bytes(exchange_bytes: int) -> int:
    """Room for three exchanges, within Ray's own limit of 30 % of this machine's memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(STORE_LEAST_BYTES, min(3 * exchange_bytes, int(0.3 * memory_bytes)))


def _session_folder() -> Path:
    """Make a folder for a session's files: its sockets' paths, some 70 characters longer, must stay below 107."""
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ray-", dir=usual if len(usual) < 25 else "/tmp"))


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let a Ray that is started here listen on the loopback interface alone.

    Given 127.0.0.1, Ray looks up an address that others can reach, and its servers then listen on all
    interfaces, unless it is told that it cannot form clusters, as it is by default on macOS and Windows.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR  # for the processes that it starts
    before, here = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = here
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
