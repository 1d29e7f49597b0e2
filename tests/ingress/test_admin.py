"""`GET /admin/...` says what the engine and its router know, or why it is not known."""

import asyncio
import json

import msgspec
import pytest

from serve_app.config import parse_config
from serve_app.engine.pace import Observed, Paces, Work
from serve_app.ingress.door import Limits
from serve_app.runtime.paces import pace_of
from serve_app.runtime.snapshot import CellView, EventView, PaceView, ProcessView
from tests.ingress.conftest import open_world
from tests.test_cli import ENVIRONMENT, LIMIT_S, OCTAVO
from tests.views import make_view

pytestmark = pytest.mark.anyio

PATH = "/admin/placement"


async def test_the_view_comes_as_the_router_made_it(world):
    world.engine.view = make_view(4, 4, 2, empty={(2, 5)})
    response = await world.client.get(PATH)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert msgspec.json.decode(response.content, type=CellView) == world.engine.view


async def test_without_a_router_the_reason_is_given(world):
    world.engine.broken = "there is no router yet"
    response = await world.client.get(PATH)
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reason": "there is no router yet"}


async def test_a_router_that_does_not_answer_is_not_waited_for(tokenizer, monkeypatch):
    async with open_world(tokenizer, Limits(max_placement_wait_s=0.01)) as world:
        monkeypatch.setattr(world.engine, "placement", asyncio.Event().wait)
        response = await world.client.get(PATH)
    assert response.status_code == 503
    assert response.json()["reason"] == "neither the engine nor its router has answered within 0.01 s"


async def test_openapi_describes_the_view(world):
    document = (await world.client.get("/openapi.json")).json()
    responses = document["paths"][PATH]["get"]["responses"]
    assert "503" in responses
    schema = responses["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/CellView"}
    for name in ("CellView", "StageView", "WorkerView"):
        assert document["components"]["schemas"][name]["properties"]


async def test_the_command_draws_what_the_server_says(world, server):
    url = "http://{}:{}".format(*server)
    command = [OCTAVO, "status", "--url", url, "--json"]
    process = await asyncio.create_subprocess_exec(*command, env=ENVIRONMENT, stdout=asyncio.subprocess.PIPE)
    printed, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0
    said = json.loads(printed)
    assert msgspec.convert(said["placement"], CellView) == world.engine.view
    assert said["health"] == (await world.client.get("/health")).json()


async def test_events_come_in_the_cells_order_and_may_begin_later(world):
    world.engine.history = [
        EventView(10.5, "lost", 3, "w0.1.0#3: the process died", {}),
        EventView(11.0, "epoch", 4, "without w0.1.0", {"fence": 0.25, "first token": 0.5}),
    ]
    for query, expected in (("", 2), ("?after=10.4", 2), ("?after=10.5", 1), ("?after=11", 0)):
        response = await world.client.get("/admin/events" + query)
        assert response.status_code == 200
        events = msgspec.convert(response.json()["events"], list[EventView])
        assert events == world.engine.history[2 - expected :]


async def test_processes_are_listed(world):
    world.engine.family = [ProcessView("worker", "w0.0.0#1", 17, "ab" * 28, "serving")]
    response = await world.client.get("/admin/processes")
    assert msgspec.convert(response.json()["processes"], list[ProcessView]) == world.engine.family


async def test_the_pace_comes_as_the_engine_has_it(world):
    world.engine.pace_of_it = pace_of(parse_config({"model": "demo", "layout": {"dp": 2}}), learned().known())
    response = await world.client.get("/admin/pace")
    assert response.status_code == 200
    assert msgspec.json.decode(response.content, type=PaceView) == world.engine.pace_of_it
    assert response.json()["paces"][0]["observed"][0] == [[0, 1, 0.1], 0.01]


def test_a_pace_is_told_by_the_number_of_replicas():
    view = pace_of(parse_config({"model": "demo", "layout": {"pp": 2, "dp": 2}}), learned().known())
    assert (view.model, view.pp, view.dp, view.max_step_tokens) == ("demo", 2, 2, 512)
    assert [pace.num_replicas for pace in view.paces] == [1, 2]
    assert len(view.paces[1].costs) == 4
    assert len(view.paces[1].observed) == 8


def learned():
    paces = Paces()
    paces.seed(2, [Observed(Work(0, rows, rows / 10), 0.01 * rows) for rows in range(1, 9)])
    paces.seed(1, [Observed(Work(0, 1, 0.1), 0.01)])
    return paces


@pytest.mark.parametrize("name", ["events", "pace", "processes"])
async def test_without_an_engine_the_reason_is_given(tokenizer, monkeypatch, name):
    async with open_world(tokenizer, Limits(max_placement_wait_s=0.01)) as world:
        world.engine.broken = "the engine is gone"
        response = await world.client.get(f"/admin/{name}")
        assert response.status_code == 503
        assert response.json() == {"status": "unavailable", "reason": "the engine is gone"}
        monkeypatch.setattr(world.engine, name, asyncio.Event().wait)
        response = await world.client.get(f"/admin/{name}")
        assert response.status_code == 503
        assert response.json()["reason"] == "the engine has not answered within 0.01 s"


async def test_what_is_no_time_is_refused(world):
    assert (await world.client.get("/admin/events?after=yesterday")).status_code == 422


async def test_openapi_describes_events_and_processes(world):
    document = (await world.client.get("/openapi.json")).json()
    for name, item in (("events", "EventView"), ("processes", "ProcessView")):
        responses = document["paths"][f"/admin/{name}"]["get"]["responses"]
        assert "503" in responses
        schema = responses["200"]["content"]["application/json"]["schema"]
        assert schema["properties"][name]["items"] == {"$ref": f"#/components/schemas/{item}"}
        assert document["components"]["schemas"][item]["properties"]
