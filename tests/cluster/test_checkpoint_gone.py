"""The checkpoint is removed from the disk, then a worker dies: its successor takes the weights from the living."""

import os
import shutil

import pytest

from tests.cluster.kills import Rounds
from tests.cluster.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.mark.parametrize("dp", [1, 2])
def test_a_worker_that_finds_no_checkpoint_takes_the_weights_of_its_peers(demo_folder, tmp_path, dp):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in demo_folder.iterdir():
        os.link(file, folder / file.name)
    args = {"model": str(folder), "layout": {"pp": 2, "dp": dp}, "worker": {"num_threads": 1, "kv_gib": 0.25}}
    with Server(tmp_path, args) as server:
        rounds = Rounds(server, num_streams=8, num_tokens=32)
        shutil.rmtree(folder)
        worker = rounds.processes("worker")[-1]
        failed, differing, _ = rounds.run([worker["pid"]], rounds.round_s / 3)
        assert (failed, differing) == ([], [])
        rounds.await_whole(2 * dp, [worker["pid"]])
        assert "takes its weights from" in server.log
        failed, differing, _ = rounds.run([], 0.0)
        assert (failed, differing) == ([], [])
