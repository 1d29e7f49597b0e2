"""Processes of a served cell die, one kind after the other, under streams: no stream fails, no token changes."""

import signal
import time

import psutil
import pytest

from tests.cluster.kills import Rounds
from tests.cluster.server import Server

pytestmark = pytest.mark.cluster

ARGS = {
    "model": "demo",
    "num_ingress": 2,
    "layout": {"pp": 2, "dp": 2},
    "worker": {"num_threads": 1, "kv_gib": 0.25},
}


@pytest.fixture(scope="module")
def rounds(demo_folder, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("failover"), ARGS) as server:
        yield Rounds(server, num_streams=8, num_tokens=32)


def strike(rounds, pids, sig=signal.SIGKILL):
    """A third into a round of streams."""
    assert pids
    failed, differing, _ = rounds.run(pids, rounds.round_s / 3, sig)
    assert (failed, differing) == ([], [])


def test_killed_worker_changes_no_token(rounds):
    since_unix_s = time.time()
    victim = rounds.processes("worker")[0]
    strike(rounds, [victim["pid"]])
    health = rounds.await_whole(4, [victim["pid"]])
    assert health["cell"]["lost_total"] >= 1
    events = rounds.events(since_unix_s)
    assert any(event["kind"] == "lost" and victim["name"] in event["text"] for event in events)
    (restored,) = [event for event in events if event["kind"] == "restored"]
    assert {"notice", "repair", "fence", "load", "restored"} <= set(restored["seconds"])


def test_killed_engine_and_router_change_no_token_and_no_worker(rounds):
    workers = {worker["pid"] for worker in rounds.processes("worker")}
    pids = [rounds.processes(role)[0]["pid"] for role in ("engine", "router")]
    strike(rounds, pids)
    rounds.await_whole(4, pids)
    assert {worker["pid"] for worker in rounds.processes("worker")} == workers, "a worker was started anew"
    assert any(event["kind"] == "adopted" for event in rounds.events(0))


def test_killed_ingress_loses_no_stream_of_clients_that_come_back(rounds):
    victim = rounds.processes("ingress")[0]
    strike(rounds, [victim["pid"]])
    rounds.await_whole(4)


def test_frozen_worker_is_replaced_and_commits_nothing_when_it_thaws(rounds):
    since_unix_s = time.time()
    victim = rounds.processes("worker")[-1]
    strike(rounds, [victim["pid"]], signal.SIGSTOP)
    rounds.await_whole(4, [victim["pid"]])
    assert any("no sign of life" in event["text"] for event in rounds.events(since_unix_s))
    try:
        process = psutil.Process(victim["pid"])
        process.send_signal(signal.SIGCONT)
        process.wait(30)
    except psutil.NoSuchProcess:
        pass  # Ray has ended it already
    failed, differing, _ = rounds.run([], 0.0)
    assert (failed, differing) == ([], [])


def test_all_pages_are_free_after_all_that(rounds):
    rounds.server.wait_stats(lambda stats: stats["running"] == stats["waiting"] == stats["kv_usage"] == 0)


def test_metrics_tell_what_happened(rounds):
    text = rounds.server.get("/metrics").text
    for name in ("octavo:epoch", "octavo:workers{", "octavo:experts_uncovered", "octavo:requests_replayed_total"):
        assert name in text
    assert 'octavo:failover_phase_seconds_count{model_name="demo",phase="restored"}' in text
