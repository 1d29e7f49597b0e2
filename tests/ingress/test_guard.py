"""One request may bring so much, so slowly, and there may be so many; the log says who came and nothing of what."""

import asyncio
import json
import logging

import httpx
import pytest
from fastapi import FastAPI

from serve_app.ingress import access_log
from serve_app.ingress.access_log import account
from serve_app.ingress.guard import MAX_HEADER_BYTES, Protection, protect
from serve_app.ingress.keys import make_key
from tests.ingress.conftest import client_of, open_world, serving
from tests.ingress.test_disconnect import cancelled, hang_up, send, soon

pytestmark = pytest.mark.anyio

SECRET_WORDS = "the launch is on Thursday"


def url_of(address):
    return "http://{}:{}".format(*address)


async def test_too_many_headers_or_too_much_of_them_is_431(world):
    for headers in ({f"x-{i}": "" for i in range(120)}, {"x-long": "a" * MAX_HEADER_BYTES}):
        answer = await world.client.get("/v1/models", headers=headers)
        assert answer.status_code == 431
        assert "the limit is" in answer.json()["error"]["message"]
    assert (await world.client.get("/v1/models", headers={f"x-{i}": "" for i in range(80)})).status_code == 200


async def test_beyond_the_limit_of_open_requests_others_are_refused_and_probes_are_not(tokenizer):
    async with open_world(tokenizer, protection=Protection(max_connections=2)) as world, serving(world) as address:
        world.engine.running.clear()
        held = [await send(address, {"text": f"Rome {i}"}) for i in range(2)]
        while len(world.engine.requests) < 2:
            world.engine.submitted.clear()
            await soon(world.engine.submitted.wait())
        async with httpx.AsyncClient(base_url=url_of(address)) as client:
            refused = await client.post("/generate", json={"text": "Norway"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["x-llm-d-request-dropped-reason"] == "connections"
            assert (await client.get("/readyz")).status_code == 200
            await hang_up(held[0][1])
            await cancelled(world.engine, 1)
            world.engine.running.set()
            assert b"200 OK" in await soon(held[1][0].readline())
            await hang_up(held[1][1])
            assert (await client.post("/generate", json={"text": "Norway"})).status_code == 200, "a place is free again"


@pytest.mark.parametrize("limits", [{"body_idle_s": 0.05}, {"body_s": 0.05}])
@pytest.mark.parametrize("sent", [b"", b'{"text": '])
async def test_a_body_that_does_not_come_is_408_and_the_request_is_over(tokenizer, limits, sent):
    async with open_world(tokenizer, protection=Protection(**limits)) as world, serving(world) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: octavo\r\ncontent-length: 100\r\n\r\n" + sent)
        answer = await soon(reader.read())  # to the end: the server closes
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["message"] == "the body has not come in time"
        assert world.engine.requests == {}
        await hang_up(writer)


async def test_a_stream_that_is_slow_for_other_reasons_is_not_cut(tokenizer):
    """The limits are of the body: an answer may take as long as it takes, and events come as they are made."""
    async with (
        open_world(tokenizer, protection=Protection(body_idle_s=0.05, body_s=0.05)) as world,
        serving(world) as address,
    ):
        world.engine.hold_after = 1
        reader, writer = await send(address, {"text": "Rome", "stream": True, "sampling_params": {"max_new_tokens": 8}})
        await soon(reader.readuntil(b"data: "))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"data: "), 0.2)
        world.engine.hold_after = None
        world.engine.running.set()
        await soon(reader.readuntil(b"data: [DONE]"))
        await hang_up(writer)


async def test_a_client_that_goes_is_noticed_through_all_guards(tokenizer, tmp_path):
    secret = make_key(tmp_path / "keys.toml", "alice", "user")
    protection = Protection(tmp_path / "keys.toml", ["https://a.example"], log_prompts=True)
    async with open_world(tokenizer, protection=protection) as world, serving(world) as address:
        world.engine.hold_after = 1
        reader, writer = await asyncio.open_connection(*address)
        body = json.dumps({"text": "Rome", "stream": True, "sampling_params": {"max_new_tokens": 400}}).encode()
        head = f"POST /generate HTTP/1.1\r\nhost: octavo\r\nauthorization: Bearer {secret}\r\norigin: https://a.example"
        writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        await soon(reader.readuntil(b"data: "))
        await hang_up(writer)
        await cancelled(world.engine, 1)


async def test_browsers_of_listed_origins_only_may_call(tokenizer, tmp_path):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with open_world(tokenizer) as world:
        assert "access-control-allow-origin" not in (await world.client.get("/v1/models", headers=ask)).headers
        assert (await world.client.options("/generate", headers=ask)).status_code == 405
    make_key(tmp_path / "keys.toml", "alice", "user")
    protection = Protection(tmp_path / "keys.toml", cors_origins=["https://a.example"])
    async with open_world(tokenizer, protection=protection) as world:
        preflight = await world.client.options(
            "/generate", headers={**ask, "access-control-request-headers": "authorization, x-stainless-os"}
        )
        assert preflight.status_code == 200, "a browser asks without a key"
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        refused = await world.client.get("/v1/models", headers=ask)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example", "so that the page can read why"
        other = await world.client.get("/v1/models", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


# -- the log ----------------------------------------------------------------------------------------------------------


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == access_log.__name__]


async def test_each_request_is_one_line_without_a_word_of_it(tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    secret = make_key(tmp_path / "keys.toml", "alice", "user")
    async with open_world(tokenizer, protection=Protection(tmp_path / "keys.toml")) as world:
        headers = {"authorization": f"Bearer {secret}", "x-request-id": "r1"}
        await world.post({"text": SECRET_WORDS}, **headers)
        await world.post({"text": SECRET_WORDS, "stream": True}, **headers)
        await world.post({"text": SECRET_WORDS, "wrong": SECRET_WORDS}, **headers)
        await world.post({"text": SECRET_WORDS})
        await world.client.get("/readyz")
    said = lines(caplog)
    assert [line.split(" ms=")[0] for line in said] == [
        "rid=r1 tenant=alice POST /generate status=200",
        "rid=r1 tenant=alice POST /generate status=200",
        "rid=r1 tenant=alice POST /generate status=400",
        "rid=- tenant=- POST /generate status=401",
    ]
    assert SECRET_WORDS not in caplog.text
    assert secret not in caplog.text


async def test_prompts_are_logged_where_that_is_asked_for(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    async with open_world(tokenizer, protection=Protection(log_prompts=True)) as world:
        await world.post({"text": SECRET_WORDS})
    assert SECRET_WORDS in lines(caplog)[0]


async def test_nobody_can_forge_a_line(world, caplog):
    caplog.set_level(logging.INFO)
    await world.client.get("/x%0Arid=evil%20tenant=root", headers={"x-request-id": "a tenant=root"})
    (line,) = lines(caplog)
    assert "\n" not in line
    assert line.count(" tenant=") == 1
    assert line.startswith("rid=a\\x20tenant=root tenant=- GET /x\\nrid=evil\\x20tenant=root status=404")


async def test_what_routes_learn_of_a_request_is_in_its_line_and_in_no_other(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    async with open_world(tokenizer) as world:

        @world.app.get("/count/{number}")
        async def count(number: int) -> int:
            account().rid = f"r{number}"
            await asyncio.sleep(0)
            account().prompt_tokens += number
            account().answer_tokens += 1
            return number

        client = client_of(world.app)
        await asyncio.gather(*(client.get(f"/count/{i}") for i in range(1, 5)))
        await client.aclose()
    counts = sorted((line.split()[0], line.split("prompt_tokens=")[1]) for line in lines(caplog))
    assert counts == [(f"rid=r{i}", f"{i} answer_tokens=1") for i in range(1, 5)]


async def test_a_fault_of_ours_is_a_500_in_the_log(caplog):
    caplog.set_level(logging.INFO)
    app = FastAPI()
    protect(app, Protection())

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError

    client = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://x")
    assert (await client.get("/broken")).status_code == 500
    await client.aclose()
    assert "GET /broken status=500" in lines(caplog)[0]
