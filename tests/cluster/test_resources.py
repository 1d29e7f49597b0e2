"""A cluster that has too little says what is missing, for as long as it waits, and gives up in time."""

import json
import os
import re
import signal
import time

import httpx
import pytest

from tests.cluster.server import READY_S, Server, free_port, run_to_its_end, write_config
from tests.model.families import make_tiny, make_tiny_tokenizer

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("mixtral", folder)
    make_tiny_tokenizer(folder, 512)
    return folder


def having(**amounts):
    """The environment that makes Ray believe in so many CPUs and GPUs."""
    return {"RAY_OVERRIDE_RESOURCES": json.dumps(amounts)}


class Waiting(Server):
    """Up, and short of something: inside it says so."""

    def _wait_ready(self):
        self.reason(lambda reason: "waiting for resources" in reason)

    def reason(self, wanted):
        """The reason at /readyz, once it is as `wanted(reason)`."""
        deadline = time.monotonic() + READY_S
        answer = None
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"ended:\n{self.log}"
            try:
                answer = self.get("/readyz")
                if answer.status_code == 503 and wanted(answer.json().get("reason", "")):
                    return answer.json()["reason"]
            except (httpx.HTTPError, ValueError):  # not up yet, or Serve's own words
                pass
            time.sleep(0.2)
        raise AssertionError(f"not so within {READY_S} s: {answer and answer.text}\n{self.log}")


def waited_s(reason):
    return int(re.search(r"; (\d+) s so far", reason)[1])


@pytest.fixture
def short_of_cpus(tiny, tmp_path):
    args = {"model": str(tiny), "layout": {"dp": 2}, "worker": {"num_cpus": 3}}
    with Waiting(tmp_path, args, **having(CPU=2)) as server:
        yield server


def test_what_is_missing_is_said_for_as_long_as_it_is_and_ctrl_c_ends_the_wait(short_of_cpus):
    first = short_of_cpus.reason(lambda reason: "missing" in reason)
    assert first.startswith(
        "waiting for resources: 0 of 2 replicas have their place; 4 CPU are missing (6 needed, the cluster has 2);"
        " a worker needs 3 CPU on one node, and the largest node has 2; "
    )
    second = short_of_cpus.reason(lambda reason: waited_s(reason) > waited_s(first))
    short_of_cpus.reason(lambda reason: waited_s(reason) > max(5, waited_s(second)))
    assert "4 CPU are missing" in short_of_cpus.log
    assert short_of_cpus.get("/livez").status_code == 200
    short_of_cpus.end_signal = signal.SIGINT  # which leaves nothing behind, as the context sees to


@pytest.mark.slow
def test_a_terminated_wait_leaves_nothing_behind(short_of_cpus):
    short_of_cpus.end_signal = signal.SIGTERM


@pytest.mark.slow
def test_a_wait_that_lasts_too_long_ends_the_command_with_what_was_missing(tiny, tmp_path):
    worker = {"num_gpus": 1, "ready_timeout_s": 3}
    config = write_config(tmp_path, {"model": str(tiny), "layout": {"tp": 2, "dp": 2}, "worker": worker}, free_port())
    status, printed = run_to_its_end(["octavo", "serve", config], **having(CPU=2, GPU=1))
    assert status != 0
    assert (
        "octavo ERROR the workers were not ready within 3 s (`worker.ready_timeout_s`): waiting for resources:"
        " 0 of 2 TP groups have their place; 3 GPU are missing (4 needed, the cluster has 1);"
        " a TP group needs 2 GPU on one node, and the largest node has 1; 3 s so far"
    ) in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_resources_of_an_engine_that_died_are_there_for_the_next_one(tiny, tmp_path):
    """Both cells would not fit beside each other."""
    args = {"model": str(tiny), "layout": {"dp": 2}, "worker": {"num_cpus": 1.5, "kv_gib": 0.01}}
    with Server(tmp_path, args, **having(CPU=4)) as server:
        (engine,) = server.processes("ServeReplica:octavo:Engine")
        os.kill(engine.pid, signal.SIGKILL)
        deadline = time.monotonic() + READY_S
        while server.log.count("ready: epoch 1 began with 2 workers") < 2:
            assert time.monotonic() < deadline, server.log
            time.sleep(0.5)
