"""The whole reference layout, 32 workers on this machine, loses one, then two of one stage at once. Minutes long."""

import time

import pytest
import yaml

from tests.cluster.kills import Rounds
from tests.cluster.server import ROOT, Server

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

NUM_WORKERS = 32


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    content = yaml.safe_load((ROOT / "deployments/reference-cpu.yaml").read_text())
    with Server(tmp_path_factory.mktemp("reference"), content["applications"][0]["args"]) as server:
        yield Rounds(server, num_streams=8, num_tokens=32)


@pytest.mark.parametrize("victims", [["w1.0.2"], ["w2.1.0", "w2.0.3"]])
def test_killed_workers_of_the_reference_layout_change_no_token(rounds, victims):
    pids = [p["pid"] for p in rounds.processes("worker") if any(p["name"].startswith(f"{v}#") for v in victims)]
    assert len(pids) == len(victims)
    since_unix_s = time.time()
    failed, differing, gaps = rounds.run(pids, rounds.round_s / 3)
    rounds.await_whole(NUM_WORKERS, pids)
    seconds = [event["seconds"] for event in rounds.events(since_unix_s) if event["kind"] == "restored"]
    print(f"\n{victims}: longest gaps {[round(gap, 2) for gap in sorted(gaps)]}, a round takes {rounds.round_s:.1f} s")
    print(f"phases {seconds}")
    assert (failed, differing) == ([], [])
    rounds.server.wait_stats(lambda stats: stats["running"] == stats["waiting"] == stats["kv_usage"] == 0)
