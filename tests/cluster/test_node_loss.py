"""A served cell on two nodes, which are two raylets of this machine: one is killed whole, under streams."""

import asyncio
import contextlib
import os
import signal
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.cluster.kills import Rounds
from tests.cluster.server import Server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ARGS = {
    "model": "demo",
    "num_ingress": 2,
    "network": "cluster",
    "layout": {"pp": 2, "dp": 2},
    "worker": {"num_threads": 1, "num_cpus": 1, "kv_gib": 0.25},
}


@pytest.fixture
def nodes():
    """The head, with room for one replica, and another node with as much."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def fell(node, pids):
    """As a machine's death would: the raylet and all it has started, and whoever was listed as being there, at once."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    doomed = {raylet.pid, *(child.pid for child in raylet.children(recursive=True)), *pids}
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_node_fails_no_stream_and_changes_no_token(nodes, demo_folder, tmp_path):
    (second,) = nodes.worker_nodes
    with Server(tmp_path, ARGS, RAY_ADDRESS=nodes.address) as server:
        rounds = Rounds(server, num_streams=8, num_tokens=48)
        listed = [p for role in ("worker", "engine", "router", "ingress") for p in rounds.processes(role)]
        there = [p for p in listed if p["node"] == second.node_id]
        print("\non the node:", [p["name"] for p in there])
        assert any(p["role"] == "worker" for p in there), "no worker is on the node that is going to fall"

        async def disturbed():
            load = asyncio.create_task(rounds.load.run(rounds.asks))
            await asyncio.sleep(rounds.round_s / 3)
            fell(second, [p["pid"] for p in there])
            return await load

        begun_s = time.monotonic()
        records = asyncio.run(disturbed())
        assert [r.error or r.changed for r in records if r.error or r.changed] == []
        assert rounds.differing(records) == []
        print(f"longest gap {max(rounds.gaps(records)):.1f} s of {time.monotonic() - begun_s:.1f} s")
        nodes.remove_node(second, allow_graceful=False)
        nodes.add_node(num_cpus=2)
        rounds.await_whole(4)
        server.wait_stats(lambda stats: stats["running"] == stats["waiting"] == stats["kv_usage"] == 0)
