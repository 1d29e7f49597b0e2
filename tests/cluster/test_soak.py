"""64 streams at a time for two minutes: no error, every page free afterwards, memory flat. Half of them may leave."""

import asyncio
import random
import time

import pytest

from tests.cluster.server import Server
from tests.cluster.test_serve import ARGS, client_of, stream

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_STREAMS = 64
SOAK_S = 120.0
WARM_S = 60.0  # kernels, allocators and caches are filled by then; what grows after that goes on growing
OURS = ("ray::WorkerActor", "ray::ServeReplica", "ray::RouterActor")


@pytest.fixture(scope="module")
def server(demo_folder, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("soak"), ARGS) as running:
        yield running


def resident_bytes(server):
    return {process.pid: process.memory_info().rss for title in OURS for process in server.processes(title)}


async def soak(server, seed, leave):
    """(streams ended, streams left, resident bytes by process once warm). Any error of a stream is raised here."""
    draw = random.Random(seed)
    counts = {"ended": 0, "left": 0}
    stop_s = time.monotonic() + SOAK_S

    async def one(client, index):
        while time.monotonic() < stop_s:
            length = draw.randrange(16, 64)
            sampling = {"max_new_tokens": length, "temperature": 0.8, "sampling_seed": index, "ignore_eos": True}
            prompt = [draw.randrange(1000) for _ in range(draw.randrange(4, 64))]
            leaves_after = draw.randrange(1, length) if leave and index % 2 else None
            body = {"input_ids": prompt, "sampling_params": sampling}
            ids, ended = await stream(client, body, stop_after=leaves_after)
            assert ended or leaves_after
            assert len(ids) == length if ended else len(ids) >= leaves_after
            counts["ended" if ended else "left"] += 1

    async def watch():
        await asyncio.sleep(WARM_S)
        return resident_bytes(server)

    async with client_of(server) as client:
        warm, *_ = await asyncio.gather(watch(), *(one(client, index) for index in range(NUM_STREAMS)))
    return counts, warm


@pytest.mark.parametrize("leave", [False, True])
def test_streams_for_two_minutes_leave_nothing_behind(server, leave):
    seed = 20 + leave
    before = server.num_ended()
    counts, warm = asyncio.run(soak(server, seed, leave))
    server.wait_ended(before + sum(counts.values()))
    after = resident_bytes(server)
    growth = sum(after.values()) / sum(warm.values())
    print(f"seed {seed}: {counts}, resident {sum(warm.values()) / 2**20:.0f} MiB warm, x {growth:.3f} at the end")
    assert counts["ended"] > NUM_STREAMS
    assert bool(counts["left"]) == leave
    assert set(after) == set(warm), "a process was replaced"
    assert growth < 1.05
