"""The door of a served cell: the clients that people have, a schema that outlives a worker, a crowd, strangers."""

import asyncio
import json
import os
import signal
import time

import httpx
import openai
import pytest

from serve_app.drill.load import draw_asks
from tests.cluster.server import Server
from tests.ingress import abuse

pytestmark = pytest.mark.cluster

ARGS = {"model": "demo", "layout": {"pp": 2, "dp": 2}, "worker": {"num_threads": 1, "kv_gib": 0.5}}
NUM_GENERATIONS = int(os.environ.get("OCTAVO_GENERATIONS", "8"))
NUM_AT_ONCE = 8
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["calm", "quick", "odd"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(demo_folder, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("door"), ARGS) as server:
        yield server


def workers(server):
    listed = server.get("/admin/processes").json()["processes"]
    return [process for process in listed if process["role"] == "worker"]


def whole(server):
    """Wait until every seat is filled and nothing is held."""
    server.wait_stats(lambda stats: stats["running"] == stats["waiting"] == stats["kv_usage"] == 0, 120)
    deadline_s = time.monotonic() + 120
    while server.get("/health").json()["cell"]["workers"]["serving"] < 4:
        assert time.monotonic() < deadline_s, server.get("/health").json()
        time.sleep(0.2)


def test_the_openai_client_is_served(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=16, temperature=0, logprobs=True
    )
    text = answer.choices[0].message.content
    assert "Paris" in text
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens - (
        answer.choices[0].finish_reason == "stop"
    )
    stream = client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=messages)


def test_a_schema_holds_in_every_sampled_answer_also_across_a_killed_worker(server):
    """At temperature 1, several at a time; a worker of the last stage, which keeps the grammars, dies under them."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Invent a person, as JSON."}],
        "temperature": 1.0,
        "max_tokens": 120,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}},
    }
    victim = next(w for w in workers(server) if w["name"].startswith("w1.0"))

    async def ask(client, gate, seed):
        async with gate:
            answer = await client.post("/v1/chat/completions", json=body | {"seed": seed})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    async def run():
        gate = asyncio.Semaphore(NUM_AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, trust_env=False) as client:
            asked = [asyncio.create_task(ask(client, gate, seed)) for seed in range(NUM_GENERATIONS)]
            await asyncio.to_thread(server.wait_stats, lambda stats: stats["running"] >= NUM_AT_ONCE / 2)
            os.kill(victim["pid"], signal.SIGKILL)
            return await asyncio.gather(*asked)

    choices = asyncio.run(run())
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    for choice in choices:
        person = json.loads(choice["message"]["content"])
        assert set(person) == {"name", "age", "tags"}
        assert 0 <= person["age"] <= 120
        assert len(person["name"]) <= 12
        assert len(person["tags"]) <= 3
        assert set(person["tags"]) <= {"calm", "quick", "odd"}
    assert victim["pid"] not in {w["pid"] for w in workers(server)}, "the worker did not die under the answers"
    whole(server)


def test_an_aborted_request_ends_and_frees_its_pages(server):
    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client:
            body = {
                "text": "On and on",
                "rid": "endless",
                "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
            }
            asked = asyncio.create_task(client.post("/generate", json=body))
            await asyncio.to_thread(server.wait_stats, lambda stats: stats["running"] > 0)
            assert (await client.post("/abort_request", json={"rid": "endless"})).status_code == 200
            return await asked

    answer = asyncio.run(run())
    assert answer.status_code == 409
    assert "abort" in answer.text
    whole(server)


def test_a_drained_cell_refuses_until_it_is_resumed(server):
    def order(kind):
        answer = httpx.post(f"{server.url}/admin/operations", json={"kind": kind}, trust_env=False)
        assert answer.status_code in {200, 202}, answer.text

    body = {"text": "Hello", "sampling_params": {"max_new_tokens": 2}}
    order("drain")
    server.wait_stats(lambda _: server.get("/readyz").status_code == 503)
    refused = server.generate(body)
    assert refused.status_code == 503
    assert refused.headers["x-llm-d-request-dropped-reason"] == "draining"
    assert int(refused.headers["retry-after"]) >= 1
    order("resume")
    server.wait_stats(lambda _: server.get("/readyz").status_code == 200)
    assert server.generate(body).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["broken", "slow", "half", "crowd"])
async def test_strangers_at_the_port_harm_nobody(server, what):
    where = ("127.0.0.1", server.port)
    async with abuse.a_stream_beside(*where):
        if what == "broken":
            for name in abuse.BROKEN:
                status = await abuse.send_broken(*where, name)
                assert status is None or status == 200 or 400 <= status < 500 or status == 501, (name, status)
        elif what == "half":
            for name in abuse.HALVES:
                await abuse.half_close(*where, abuse.HALVES[name])
        elif what == "slow":
            async with abuse.slow_headers(*where, 100):
                await abuse.assert_served(*where)
        else:
            async with abuse.idle_connections(*where, 1000) as count:
                assert count == 1000
                await abuse.assert_served(*where)
        await abuse.assert_served(*where)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.slow
def test_a_thousand_at_once_are_all_answered_or_refused(server):
    """At a cell for a few dozen: memory stays bounded, and nobody is left without a word."""
    asks = draw_asks(1000, 16, 7)

    def resident_mib(title):
        return sum(p.memory_info().rss for p in server.processes(title)) / 2**20

    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, trust_env=False) as client:
            bodies = [{"input_ids": a.prompt, "sampling_params": {"max_new_tokens": 16}} for a in asks]
            return await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))

    before_mib = resident_mib("ServeReplica")
    answers = asyncio.run(run())
    after_mib = resident_mib("ServeReplica")
    statuses = {status: sum(a.status_code == status for a in answers) for status in {a.status_code for a in answers}}
    print(f"\nstatuses {statuses}; engine and ingress {before_mib:.0f} MiB before, {after_mib:.0f} after")
    assert set(statuses) <= {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
    assert after_mib < before_mib + 200
    whole(server)
