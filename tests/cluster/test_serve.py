"""`serve run deployments/config.yaml`, started for real: four workers, a router, an engine, an ingress, HAProxy."""

import asyncio
import json

import httpx
import msgspec
import pytest

from serve_app.config import OctavoConfig
from serve_app.engine.request import Request, SamplingParams
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.tokenizer import Tokenizer
from serve_app.runtime.local import LocalEngine
from serve_app.runtime.snapshot import CellView
from tests.cluster.prompts import QUESTIONS
from tests.cluster.server import Server
from tests.runtime.cell import collect_local

pytestmark = pytest.mark.cluster

ARGS = {"model": "demo", "layout": {"pp": 2, "dp": 2}, "worker": {"num_threads": 1, "kv_gib": 0.25}}


@pytest.fixture(scope="module")
def server(demo_folder, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("serve"), ARGS) as running:
        yield running


def body_of(question, **sampling):
    return {"messages": [{"role": "user", "content": question}], "sampling_params": {"temperature": 0} | sampling}


async def stream(client, body, stop_after=None):
    """Token ids of a stream, read to its end, or left in the middle."""
    ids = []
    async with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return ids, True
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                ids = event["output_ids"] if len(event["output_ids"]) > len(ids) else ids + event["output_ids"]
                if stop_after and len(ids) >= stop_after:
                    return ids, False
    return ids, False


def client_of(server):
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, trust_env=False)


def test_the_first_request_of_the_readme_is_answered(server):
    answer = server.generate(body_of("What is the capital of France?", max_new_tokens=40))
    assert answer.status_code == 200
    assert "Paris" in answer.json()["text"]


def test_the_placement_page_says_who_holds_every_expert(server):
    view = msgspec.json.decode(server.get("/admin/placement").content, type=CellView)
    assert (view.epoch, view.tp, view.pp, view.dp) == (1, 1, 2, 2)
    for stage in view.stages:
        assert all(worker.name and worker.node for worker in stage.workers)
        held = sorted(pair for worker in stage.workers for pair in worker.primary)
        assert held == [(layer, expert) for layer in range(stage.first_layer, stage.end_layer) for expert in range(8)]


def ask_all(server, **sampling):
    """Token ids by question, all asked at once."""

    async def run():
        async with client_of(server) as client:
            answers = await asyncio.gather(
                *(client.post("/generate", json=body_of(question, **sampling)) for question in QUESTIONS)
            )
        return [answer.json()["output_ids"] for answer in answers]

    return dict(zip(QUESTIONS, asyncio.run(run()), strict=True))


def ask_local(demo_folder, max_new_tokens, **config):
    """The same of one process."""
    tokenizer = Tokenizer.load(demo_folder)
    settings = OctavoConfig.model_validate({"worker": {"kv_gib": 1.0}} | config)
    engine = LocalEngine.load(Checkpoint.open(demo_folder), settings)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    prompts = {question: tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS}
    tokens, _ = collect_local(engine, [Request(question, prompt, sampling) for question, prompt in prompts.items()])
    return tokens


def test_the_cluster_emits_what_one_process_emits(server, demo_folder):
    assert ask_all(server, max_new_tokens=32) == ask_local(demo_folder, 32)


def test_clients_that_go_away_leave_no_page_held(server):
    async def run():
        async with client_of(server) as client:
            bodies = [body_of(f"Count to {i} slowly.", max_new_tokens=200, ignore_eos=True) for i in range(16)]
            await asyncio.gather(*(stream(client, body, stop_after=3) for body in bodies))

    before = server.num_ended()
    asyncio.run(run())
    after = server.wait_ended(before + 16)
    assert after["finished_total"]["abort"] >= 16


def test_metrics_are_there_and_count(server):
    text = server.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
    ):
        assert name in text
