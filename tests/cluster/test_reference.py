"""The whole reference layout, TP 4 x PP 4 x DP 2, as 32 Ray workers on this machine. Minutes long; run by name."""

import os
import signal
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml

from serve_app.config import parse_config
from serve_app.engine.request import Request, SamplingParams
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.cpu import cpu_has_bf16
from serve_app.model.tokenizer import Tokenizer
from serve_app.runtime.local import LocalEngine
from tests.cluster.prompts import QUESTIONS as PROMPTS
from tests.cluster.server import ROOT, Server
from tests.runtime.cell import collect_local

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

NUM_PROMPTS = 8
NUM_TOKENS = 32
READY_S = 240.0
ROUNDS = 5


def args_of(dtype):
    content = yaml.safe_load((ROOT / "deployments/reference-cpu.yaml").read_text())
    return content["applications"][0]["args"] | {"dtype": dtype}


def answers_of_one_process(dtype):
    """Greedy answers of the in-process executor with as many shards, each prompt alone."""
    folder = resolve("reference", silent, fetch=True)
    args = args_of(dtype)
    config = parse_config(args | {"worker": {"num_threads": 1, "kv_gib": 1.0}})
    tokenizer = Tokenizer.load(folder)
    engine = LocalEngine.load(Checkpoint.open(folder), config)
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [Request(f"r{i}", tokenizer.encode(text), sampling) for i, text in enumerate(PROMPTS[:NUM_PROMPTS])]
    return [collect_local(engine, [request])[0][request.rid] for request in requests]


def generate(server, text):
    sampling = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "sampling_params": sampling}
    return httpx.post(f"{server.url}/generate", json=body, timeout=300, trust_env=False).json()["output_ids"]


def step_s_beside_a_paused_router(server):
    """(seconds a token with the router running, and with it stopped): medians, taken in turns."""
    found = subprocess.run(["pgrep", "-f", "ray::RouterActor"], capture_output=True, text=True, check=True)
    (router,) = map(int, found.stdout.split())
    running, paused = [], []
    for _ in range(ROUNDS):
        for signals, times in (((), running), ((signal.SIGSTOP, signal.SIGCONT), paused)):
            if signals:
                os.kill(router, signals[0])
            begun_s = time.monotonic()
            generate(server, PROMPTS[0])
            times.append((time.monotonic() - begun_s) / NUM_TOKENS)
            if signals:
                os.kill(router, signals[1])
    return statistics.median(running), statistics.median(paused)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_32_workers_answer_as_one_process_with_as_many_shards_does(dtype, tmp_path):
    if dtype == "bfloat16" and not cpu_has_bf16():
        pytest.skip("the promise is for CPUs that multiply bf16 natively")
    expected = answers_of_one_process(dtype)
    begun_s = time.monotonic()
    with Server(tmp_path, args_of(dtype)) as server:
        print(f"\n{dtype}: ready after {time.monotonic() - begun_s:.0f} s")
        view = httpx.get(f"{server.url}/admin/placement", timeout=30, trust_env=False).json()
        workers = [worker for stage in view["stages"] for worker in stage["workers"]]
        assert len(workers) == 32
        assert all(len(worker["primary"]) == 8 and len(worker["standby"]) == 2 for worker in workers)
        assert [generate(server, text) for text in PROMPTS[:NUM_PROMPTS]] == expected
        if dtype == "bfloat16":  # in fp32 the bits of a row depend on what else is in the batch
            with ThreadPoolExecutor(NUM_PROMPTS) as pool:
                assert list(pool.map(lambda text: generate(server, text), PROMPTS[:NUM_PROMPTS])) == expected
            running_s, paused_s = step_s_beside_a_paused_router(server)
            print(f"a token takes {1e3 * running_s:.0f} ms, {1e3 * paused_s:.0f} ms with the router stopped")
        time.sleep(2)  # the workers report their memory once a second
        view = httpx.get(f"{server.url}/admin/placement", timeout=30, trust_env=False).json()
        resident = [worker["resident_bytes"] for stage in view["stages"] for worker in stage["workers"]]
        print(f"resident: {sum(resident) / 2**30:.1f} GiB, {min(resident) >> 20} to {max(resident) >> 20} MiB a worker")
        assert min(resident) > 0
