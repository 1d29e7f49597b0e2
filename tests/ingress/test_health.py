"""Health tells the truth, and what describes the server is there."""

import asyncio

import pytest

from serve_app.ingress.client import EngineStatus
from serve_app.ingress.door import Limits
from tests.ingress.conftest import open_world

pytestmark = pytest.mark.anyio


async def get(world, path):
    response = await world.client.get(path)
    return response.status_code, response.json()


async def test_a_ready_engine_is_ready_everywhere(world):
    assert await get(world, "/livez") == (200, {"status": "live"})
    assert await get(world, "/readyz") == (200, {"status": "ready"})
    status, health = await get(world, "/health")
    assert (status, health["status"], health["ready"]) == (200, "ready", True)
    assert health["stats"]["num_pages"] == 4096


async def test_an_engine_that_is_starting_is_live_but_not_ready(world, monkeypatch):
    async def status():
        return EngineStatus(live=True, ready=False, reason="3 of 4 workers have loaded")

    monkeypatch.setattr(world.engine, "status", status)
    assert await get(world, "/livez") == (200, {"status": "live"})
    assert await get(world, "/readyz") == (503, {"status": "not ready", "reason": "3 of 4 workers have loaded"})
    status, health = await get(world, "/health")
    assert (status, health["status"], health["reason"]) == (200, "not ready", "3 of 4 workers have loaded")


async def test_an_engine_that_misses_something_is_degraded(world, monkeypatch):
    async def status():
        return EngineStatus(live=True, ready=True, reason="worker w1.0.0#3 was lost: its seat is being refilled")

    monkeypatch.setattr(world.engine, "status", status)
    assert await get(world, "/readyz") == (200, {"status": "ready"})
    status, health = await get(world, "/health")
    assert (status, health["status"], health["reason"][:9]) == (200, "degraded", "worker w1")


async def test_an_engine_that_is_awaited_is_degraded_and_new_traffic_still_welcome(world, monkeypatch):
    async def status():
        return EngineStatus(live=False, ready=True, reason="the engine is being replaced")

    monkeypatch.setattr(world.engine, "status", status)
    assert await get(world, "/readyz") == (200, {"status": "ready"})
    status, health = await get(world, "/health")
    assert (status, health["status"], health["live"]) == (200, "degraded", False)


async def test_an_engine_that_is_gone_is_not_healthy(world):
    world.engine.broken = "the engine has been silent for 7 s"
    assert (await get(world, "/livez"))[0] == 200
    assert await get(world, "/readyz") == (503, {"status": "not ready", "reason": world.engine.broken})
    status, health = await get(world, "/health")
    assert (status, health["status"], health["reason"]) == (503, "unreachable", world.engine.broken)


async def test_an_engine_that_does_not_answer_is_not_waited_for(tokenizer, monkeypatch):
    async with open_world(tokenizer, Limits(max_status_wait_s=0.01)) as world:
        monkeypatch.setattr(world.engine, "status", asyncio.Event().wait)
        status, body = await get(world, "/readyz")
        assert (status, body["reason"]) == (503, "the engine has not answered within 0.01 s")
        assert (await get(world, "/health"))[0] == 503
        assert (await world.client.get("/metrics")).status_code == 200


async def test_models_lists_the_model(world):
    status, models = await get(world, "/v1/models")
    assert (status, models["object"]) == (200, "list")
    [card] = models["data"]
    assert card == {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "octavo",
        "max_model_len": 512,
    }


async def test_openapi_describes_both_dialects(world):
    status, document = await get(world, "/openapi.json")
    assert status == 200
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    schemas = document["components"]["schemas"]
    names = [root["$ref"].removeprefix("#/components/schemas/") for root in body["schema"]["anyOf"]]
    fields = {field for name in names for field in schemas[name]["properties"]}
    assert {"text", "input_ids", "messages", "inputs", "sampling_params", "parameters"} <= fields
    for example in body["examples"].values():
        assert (await world.post(example["value"])).status_code == 200
