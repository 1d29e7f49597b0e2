"""A cell on several nodes, which are processes of this machine that claim to have GPUs: no Serve, the keeper alone."""

import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from serve_app.cluster.cell import Cell
from serve_app.cluster.node import choose_network
from serve_app.config import OctavoConfig
from serve_app.engine.members import Stop
from serve_app.runtime.engine_loop import EngineLoop, cell_core
from serve_app.runtime.names import ENGINE
from serve_app.runtime.settings import check
from tests.model.families import make_tiny, make_tiny_tokenizer

pytestmark = pytest.mark.cluster

WAIT_S = 120.0
NOTICE_SOON = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a dead node, in 2 s instead of 15


@pytest.fixture
def nodes():
    """A cluster whose head has no GPU."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": NOTICE_SOON})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class KeptCell:
    """An engine's two threads. Use as a context."""

    def __init__(self, config):
        spec = check(config)
        network = choose_network("cluster")
        self._mesh = network.mesh()
        self.cell = Cell("test", config, spec, network, self._mesh.address)
        self.loop = EngineLoop(cell_core(config, spec), self._mesh, self.cell.order)
        self._threads = [
            threading.Thread(target=self.loop.run, daemon=True),
            threading.Thread(target=self.cell.run, args=(self.loop,), daemon=True),
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self._mesh.send(ENGINE, Stop())
        self.cell.stop()
        for thread in self._threads:
            thread.join(WAIT_S)
        self._mesh.close()

    def wait(self, wanted):
        deadline = time.monotonic() + WAIT_S
        while not wanted():
            assert time.monotonic() < deadline, f"epoch {self.loop.epoch}: {self.loop.reason}"
            time.sleep(0.1)

    def is_whole(self):
        return self.loop.epoch > 0 and not self.loop.reason

    def nodes_by_replica(self):
        """As the router was told."""
        view = ray.get(self.cell.router.snapshot.remote())
        return [{worker.node for worker in view.stages[0].workers if worker.replica == i} for i in range(view.dp)]


def nodes_of_workers():
    """Where Ray says that they live."""
    actors = ray._private.state.actors().values()
    return {
        actor["Address"]["NodeID"]
        for actor in actors
        if actor["ActorClassName"] == "WorkerActor" and actor["State"] == "ALIVE"
    }


@pytest.mark.slow
def test_tp_groups_take_nodes_as_they_come_and_go(nodes, tmp_path):
    make_tiny("mixtral", tmp_path)
    make_tiny_tokenizer(tmp_path, 512)
    layout, worker = {"tp": 2, "dp": 2}, {"num_cpus": 0, "num_gpus": 1, "kv_gib": 0.01}
    config = OctavoConfig.model_validate({"model": str(tmp_path), "layout": layout, "worker": worker})
    two_gpus = {"num_cpus": 1, "num_gpus": 2}
    first = nodes.add_node(**two_gpus)
    short = "1 of 2 TP groups have their place; 2 GPU are missing (4 needed, the cluster has 2)"
    with KeptCell(config) as kept:
        kept.wait(lambda: short in kept.loop.reason)
        second = nodes.add_node(**two_gpus)
        kept.wait(kept.is_whole)
        assert sorted(map(list, kept.nodes_by_replica())) == sorted([[first.node_id], [second.node_id]])
        assert nodes_of_workers() == {first.node_id, second.node_id}

        nodes.remove_node(second, allow_graceful=False)
        kept.wait(lambda: short in kept.loop.reason)
        third = nodes.add_node(**two_gpus)
        kept.wait(kept.is_whole)
        assert nodes_of_workers() == {first.node_id, third.node_id} == set.union(*kept.nodes_by_replica())
    kept.wait(lambda: ray.available_resources().get("GPU") == 4)  # all given back
