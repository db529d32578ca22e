"""The parameter server counted against the kernel, with a Ray node for each process.

Each node has an object store of its own, so that every message crosses the loopback interface of a network namespace
where nobody else is. What Ray itself says on top is less than 2 % of messages of 10 MB.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from namespaces import PACKET_BYTES, needed
from processes import run, short_folder
from tensors import assert_counts

from distsim import exchanges

pytestmark = pytest.mark.timeout(180)

WORKERS, STEPS = 2, 3
SEGMENT_BYTES = 65536
"""The loopback's MTU: the most that TCP sends again at once when an acknowledgement comes late."""

PROGRAM = f"""
import json, time
import ray
from ray.cluster_utils import Cluster
from namespaces import loopback, segments_sent_again
from distsim.schedule import ITEMSIZE
from trainers import workload
from trainers.config import RunConfig
from trainers.plan import plan, trainable
from trainers.ray_trainer import collect, start_ranks

config = RunConfig(
    strategy="parameter-server", workers={WORKERS}, steps={STEPS}, batch_size=1, bucket_mb=100, overlap=False,
    options={{"layers": 3, "width": 256, "context": 16}},
)
model = workload.load(config.workload, config.options, config.seed, config.dtype).model
exchanged = plan(trainable(model), config.strategy, config.workers, config.bucket_mb)
ranks = exchanged.ranks
node = {{"node_ip_address": "127.0.0.1", "object_store_memory": 300_000_000, "num_cpus": 1}}
cluster = Cluster(shutdown_at_exit=True)
try:
    cluster.add_node(**node, include_dashboard=False)
    for rank in range(ranks):
        cluster.add_node(**node, resources={{f"rank{{rank}}": 1}})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    actors = start_ranks(ranks, [{{"resources": {{f"rank{{rank}}": 1}}}} for rank in range(ranks)])
    collect([actor.prepare.remote(config) for actor in actors])
    time.sleep(1)
    before, again, began = loopback(), segments_sent_again(), time.monotonic()
    results = collect([actor.train.remote("unused") for actor in actors])
    after, again, took = loopback(), segments_sent_again() - again, time.monotonic() - began
    time.sleep(took)
    idle = loopback().bytes - after.bytes
    nodes = {{entry["NodeID"]: entry for entry in ray.nodes()}}
    print(json.dumps({{
        "nodes": len(nodes),
        "stores": len({{entry["ObjectStoreSocketName"] for entry in nodes.values()}}),
        "exchanged": [
            (each.strategy, each.workers, each.params, ITEMSIZE[dtype])
            for each, dtype in zip(exchanged.exchanges, exchanged.dtypes)
        ],
        "counts": [entry for result in results for entry in result.log.counts.items()],
        "bytes": after.bytes - before.bytes,
        "packets": after.packets - before.packets,
        "again": again,
        "idle": idle,
    }}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_the_parameter_server_sends_what_is_counted_between_nodes() -> None:
    prefix = needed()
    with short_folder() as folder:
        script = folder / "script.py"
        script.write_text(PROGRAM)
        extra = {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(Path(__file__).parent)}
        ended = run([*prefix, sys.executable, "-W", "error", script], folder, timeout_s=150, extra=extra)
    assert (ended.code, ended.left) == (0, []), ended.err
    found = json.loads(ended.out)
    assert (found["nodes"], found["stores"]) == (WORKERS + 2, WORKERS + 2)  # with the one that Ray itself is on

    counts = Counter({tuple(key): count for key, count in found["counts"]})
    schedules = [
        (schedule, itemsize)
        for *what, itemsize in found["exchanged"]
        for schedule in exchanges.build(*what).schedules()
    ]
    assert all(count % STEPS == 0 for count in counts.values())
    for which, (schedule, itemsize) in enumerate(schedules):
        own = {key: count // STEPS for key, count in counts.items() if key[0] == which}
        assert_counts(Counter(own), schedule.traffic(itemsize))
    assert {key[0] for key in counts} == set(range(len(schedules)))

    large = Counter({key: count for key, count in counts.items() if 9e6 < key[3] < 11e6})
    assert large.total() == STEPS * 2 * WORKERS  # to the server, and back
    payload, measured = (sum(key[3] * count for key, count in counts.items()), found["bytes"])
    print(
        f"payload {payload} in {counts.total()} messages, measured {measured} in {found['packets']} packets, "
        f"{found['again']} segments sent again; on top {measured / payload - 1:.3%}, of it headers "
        f"{PACKET_BYTES * found['packets'] / payload:.3%}; Ray's own talk in as long a time: {found['idle']} bytes"
    )
    assert payload <= measured <= 1.02 * payload + SEGMENT_BYTES * found["again"]
