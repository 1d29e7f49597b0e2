"""One replica, and no other to go on at: streams wait for a new worker, or for a spare, and go on as they were."""

import statistics
import time

import pytest

from tests.cluster.kills import Rounds
from tests.cluster.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

NUM_KILLS = 6


@pytest.fixture(params=[0, 1])
def spares(request):
    return request.param


@pytest.fixture
def rounds(spares, demo_folder, tmp_path_factory):
    args = {
        "model": "demo",
        "layout": {"pp": 2, "dp": 1},
        "worker": {"num_threads": 1, "kv_gib": 0.25},
        "resilience": {"spares": spares},
    }
    with Server(tmp_path_factory.mktemp("lonely"), args) as server:
        yield Rounds(server, num_tokens=32)


def test_killed_worker_of_a_lone_replica_changes_no_token(rounds, spares):
    gaps, phases = [], []
    for kill in range(NUM_KILLS):
        rounds.server.wait_stats(lambda stats: stats["running"] == 0)
        wait_spares(rounds, spares)
        worker = rounds.processes("worker")[kill % 2]
        since_unix_s = time.time()
        failed, differing, now_gaps = rounds.run([worker["pid"]], rounds.round_s * (kill + 1) / (NUM_KILLS + 2))
        assert (failed, differing) == ([], [])
        gaps += now_gaps
        rounds.await_whole(2, [worker["pid"]])
        phases += [event["seconds"] for event in rounds.events(since_unix_s) if event["kind"] == "restored"]
    gaps.sort()
    print(
        f"\n{spares} spares: {NUM_KILLS} kills, {len(gaps)} streams, longest gap median {statistics.median(gaps):.2f}"
        f" p99 {gaps[round(0.99 * (len(gaps) - 1))]:.2f} max {gaps[-1]:.2f} s"
    )
    for phase in ("notice", "repair", "fence", "load", "restored"):
        print(f"  {phase}: median {statistics.median(seconds[phase] for seconds in phases):.3f} s")
    rounds.server.wait_stats(lambda stats: stats["running"] == stats["waiting"] == stats["kv_usage"] == 0)


def wait_spares(rounds, num):
    deadline_s = time.monotonic() + 60
    while len(rounds.processes("spare")) < num:
        assert time.monotonic() < deadline_s, "the spare is not replaced"
        time.sleep(0.5)
