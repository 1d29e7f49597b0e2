"""Every process of the default cell, killed at twenty points of a round of streams: nobody notices."""

import os
import statistics

import pytest

from tests.cluster.kills import Rounds
from tests.cluster.server import Server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_POINTS = int(os.environ.get("OCTAVO_SWEEP_POINTS", "20"))
ARGS = {"model": "demo", "layout": {"pp": 2, "dp": 2}, "worker": {"num_threads": 1, "kv_gib": 0.25}}
SEATS = ["0.0.0", "0.1.0", "1.0.0", "1.1.0"]


@pytest.fixture(scope="module")
def rounds(demo_folder, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("sweep"), ARGS) as server:
        yield Rounds(server, num_tokens=32)


def pids_of(rounds, target):
    if target in SEATS:
        return [p["pid"] for p in rounds.processes("worker") if p["name"].startswith(f"w{target}")]
    return [p["pid"] for role in target.split("+") for p in rounds.processes(role)]


@pytest.mark.parametrize("target", [*SEATS, "router", "engine", "router+engine"])
def test_a_kill_at_any_point_of_a_round_fails_no_stream_and_changes_no_token(rounds, target):
    """From the first moment of the prefills to the time between two rounds."""
    gaps, failed, differing = [], [], []
    for point in range(NUM_POINTS):
        pids = pids_of(rounds, target)
        assert pids, f"there is no {target} to kill"
        after_s = rounds.round_s * 1.05 * point / max(1, NUM_POINTS - 1)
        now_failed, now_differing, now_gaps = rounds.run(pids, after_s)
        failed += now_failed
        differing += now_differing
        gaps += now_gaps
        rounds.await_whole(4, pids)
    gaps.sort()
    p99 = gaps[min(len(gaps) - 1, round(0.99 * len(gaps)))] if gaps else 0.0
    print(
        f"\n{target}: {NUM_POINTS} kills, {len(gaps)} streams with tokens to come, failed {len(failed)}, differing"
        f" {len(differing)}, longest gap median {statistics.median(gaps or [0]):.2f} p99 {p99:.2f}"
        f" max {max(gaps, default=0):.2f} s; a round takes {rounds.round_s:.1f} s"
    )
    assert (failed, differing) == ([], [])
    rounds.server.wait_stats(lambda stats: stats["running"] == stats["waiting"] == stats["kv_usage"] == 0)
