"""Counted against the kernel: the bytes that transports count are those that its loopback interface has seen.

Each measurement runs in a network namespace of its own, where nothing else uses the loopback. What may come on top
of the counted payload is derived: the headers of as many packets as the kernel counted, and gloo's own header of
each message; what the barriers around an exchange cost is measured without one, and what TCP has sent again, because
an acknowledgement came late on a busy machine, is counted by the kernel too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from processes import run, short_folder

from distsim import exchanges

pytestmark = pytest.mark.timeout(150)

HEADER_BYTES = 80
"""The largest headers of a packet: IPv4 20, TCP 60. Nearly all have 52, but late acknowledgements have more."""
GLOO_BYTES = 144
"""What gloo sends with every message: its header, and the receiver's notice that its buffer is ready."""

SEGMENT_BYTES = 65536
"""The loopback's MTU: the most that TCP sends again at once when an acknowledgement comes late."""

NAMESPACE = '''
"""Runs a command after switching the loopback interface on, which is off in a fresh network namespace."""
import fcntl, os, socket, struct, sys
with socket.socket() as some:
    SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
    request = struct.pack("16sH14x", b"lo", 0)
    flags = struct.unpack("16sH14x", fcntl.ioctl(some, SIOCGIFFLAGS, request))[1]
    fcntl.ioctl(some, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))
os.execv(sys.argv[1], sys.argv[1:])
'''

COUNTERS = '''
def loopback():
    """Bytes and packets that the loopback interface has received so far, and segments that TCP has sent again."""
    with open("/proc/net/dev") as file:
        lo = next(line for line in file if line.split(":")[0].strip() == "lo")
    with open("/proc/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Tcp:"))
    return [*map(int, lo.split(":")[1].split()[:2]), int(values[names.index("RetransSegs")])]
'''

GLOO = (
    COUNTERS
    + '''
import json, os, subprocess, sys, time
import torch
import torch.distributed as dist
from distsim import exchanges
from trainers.exchange import ScheduleRunner
from trainers.torch_trainer import ProcessGroup
from trainers.transport import TorchTransport

strategies, ranks, params, rounds = json.loads(sys.argv[1])
if "RANK" not in os.environ:  # start the ranks; torchrun would talk to them while they are measured
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    places = [os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [subprocess.Popen([sys.executable, *sys.argv], env=place) for place in places]
    sys.exit(max(abs(process.wait()) for process in processes))


def around(action):
    """What an action puts on the wire, and the barriers at its ends."""
    dist.barrier()
    time.sleep(0.2)  # for the last acknowledgements
    before = loopback()
    dist.barrier()
    action()
    dist.barrier()
    time.sleep(0.2)
    return [after - sooner for after, sooner in zip(loopback(), before)]


results = {}
with ProcessGroup(torch.device("cpu")) as group:
    group.agree({})
    group.start()
    rank = group.rank
    for strategy in strategies:
        schedule = exchanges.build(strategy, ranks, params).gradients
        transport = TorchTransport()
        runner = ScheduleRunner(schedule, [rank], transport)
        runner.run({rank: torch.ones(params)})  # connections are made
        values = torch.ones(params)
        transport.log.counts.clear()
        empty = around(lambda: None)
        full = around(lambda: [runner.run({rank: values}) for _ in range(rounds)])
        counts = group.gather([(count, size) for (_, _, size), count in transport.log.counts.items()])
        assert float(values[0]) == float(ranks) ** rounds
        if rank == 0:
            pairs = [pair for part in counts for pair in part]
            messages, payload = sum(n for n, _ in pairs), sum(n * size for n, size in pairs)
            results[strategy] = {"messages": messages, "payload": payload, "empty": empty, "full": full}
if rank == 0:
    print(json.dumps(results))
'''
)


@cache
def namespace() -> tuple[str, ...] | None:
    """The command that starts another one in a network namespace of its own; None if that is not allowed."""
    for unshare in (("unshare", "-n"), ("unshare", "-rn")):
        command = (*unshare, sys.executable, "-c", NAMESPACE)
        try:
            if subprocess.run((*command, "/bin/true"), capture_output=True, timeout=30).returncode == 0:
                return command
        except OSError:
            pass
    return None


def in_a_namespace(command: list[str], folder: Path) -> Any:
    """Run a command alone with its loopback; return the JSON that it prints."""
    prefix = namespace()
    if prefix is None:
        pytest.skip("this machine does not allow network namespaces: other traffic would be counted too")
    ended = run([*prefix, *command], folder, extra={"RAY_AUTH_MODE": "token"})
    assert (ended.code, ended.left) == (0, []), ended.err
    return json.loads(ended.out)


@pytest.mark.parametrize("ranks", (2, 4))
def test_gloo_sends_what_is_counted(ranks: int, tmp_path: Path) -> None:
    params, rounds = 1_500_001, 2
    script = tmp_path / "script.py"
    script.write_text(GLOO)
    strategies = ("ring", "all-to-all")
    plan = json.dumps([strategies, ranks, params, rounds])
    results = in_a_namespace([sys.executable, str(script), plan], tmp_path)
    for strategy in strategies:
        found = results[strategy]
        (barriers, _, _), (measured, packets, again) = found["empty"], found["full"]
        traffic = exchanges.build(strategy, ranks, params).traffic(4)
        assert found["payload"] == rounds * traffic.bytes
        assert found["messages"] == rounds * traffic.messages
        allowed = barriers + GLOO_BYTES * found["messages"] + HEADER_BYTES * packets + SEGMENT_BYTES * again
        print(
            f"{strategy}, {ranks} ranks: payload {found['payload']}, measured {measured} in {packets} packets, "
            f"{again} segments sent again; on top {measured - found['payload']} "
            f"({measured / found['payload'] - 1:.3%}), allowed {allowed}"
        )
        assert found["payload"] <= measured <= found["payload"] + allowed


RAY = (
    COUNTERS
    + """
import json, os, sys, time
import ray
from ray.cluster_utils import Cluster
from trainers.config import RunConfig
from trainers.ray_trainer import collect, start_ranks

config = RunConfig(strategy="parameter-server", workers=2, steps=3, layers=3, width=256, context=16, batch_size=1)
node = {"node_ip_address": "127.0.0.1", "object_store_memory": 300_000_000, "num_cpus": 1}
cluster = Cluster(shutdown_at_exit=True)
try:
    cluster.add_node(**node, include_dashboard=False)
    for rank in range(3):
        cluster.add_node(**node, resources={f"rank{rank}": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    actors = start_ranks(3, [{"resources": {f"rank{rank}": 1}} for rank in range(3)])
    collect([actor.prepare.remote(config) for actor in actors])
    time.sleep(1)
    before, began = loopback(), time.monotonic()
    results = collect([actor.train.remote() for actor in actors])
    after, took = loopback(), time.monotonic() - began
    time.sleep(took)
    idle = [later - sooner for later, sooner in zip(loopback(), after)]
    nodes = {entry["NodeID"]: entry for entry in ray.nodes()}
    counts = [(count, size) for result in results for (_, _, size), count in result.counts.items()]
    print(json.dumps({
        "nodes": len(nodes),
        "stores": len({entry["ObjectStoreSocketName"] for entry in nodes.values()}),
        "messages": sum(count for count, _ in counts),
        "sizes": sorted({size for _, size in counts}),
        "payload": sum(count * size for count, size in counts),
        "full": [later - sooner for later, sooner in zip(after, before)],
        "idle": idle,
        "took": took,
    }))
finally:
    ray.shutdown()
    cluster.shutdown()
"""
)


def test_the_parameter_server_sends_what_is_counted_between_nodes() -> None:
    """One Ray node for each rank, with an object store of its own, so that nothing goes through shared memory."""
    with short_folder() as folder:
        script = folder / "script.py"
        script.write_text(RAY)
        found = in_a_namespace([sys.executable, "-W", "error", str(script)], folder)
    payload, (measured, packets, again), (idle, _, _) = found["payload"], found["full"], found["idle"]
    (size,) = found["sizes"]
    assert (found["nodes"], found["stores"]) == (4, 4)
    assert 9e6 < size < 11e6
    assert found["messages"] == 3 * 2 * 2
    assert payload == found["messages"] * size
    print(
        f"parameter-server: payload {payload} in {found['messages']} messages, measured {measured} in {packets} "
        f"packets, {again} segments sent again; on top {measured - payload} ({measured / payload - 1:.3%}); "
        f"Ray's own talk in as long a time: {idle}"
    )
    assert payload <= measured <= 1.02 * payload + SEGMENT_BYTES * again
