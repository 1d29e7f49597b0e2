"""A client that goes away takes its requests with it; one that stays gets its events as they are made."""

import asyncio
import json

import httpx
import pytest

pytestmark = pytest.mark.anyio

PATIENCE_S = 20  # how long a test waits for what must come; never how long it usually takes
LONG = {"sampling_params": {"max_new_tokens": 400}}


async def soon(awaitable):
    return await asyncio.wait_for(awaitable, PATIENCE_S)


async def send(server, body):
    """POST on a raw socket; returns its reader and writer with the answer still to come."""
    reader, writer = await asyncio.open_connection(*server)
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: octavo\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


async def hang_up(writer):
    writer.transport.abort()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def cancelled(engine, num):
    """Wait until so many requests have been cancelled."""
    while len(engine.cancelled) < num:
        engine.was_cancelled.clear()
        await soon(engine.was_cancelled.wait())


@pytest.mark.parametrize(
    ("body", "num"),
    [
        ({"text": "Rome", "stream": False}, 1),
        ({"text": "Rome", "stream": True}, 1),
        ({"text": ["Rome", "Norway", "Spain"], "stream": False}, 3),
        ({"text": ["Rome", "Norway", "Spain"], "stream": True}, 3),
    ],
)
async def test_a_client_that_goes_while_it_waits_cancels_its_requests(world, server, body, num):
    world.engine.running.clear()
    _, writer = await send(server, {**body, **LONG})
    while len(world.engine.requests) < num:
        world.engine.submitted.clear()
        await soon(world.engine.submitted.wait())
    await hang_up(writer)
    await cancelled(world.engine, num)
    assert sorted(world.engine.cancelled) == sorted(world.engine.requests)
    world.engine.running.set()
    await world.post({"text": "Rome"})  # the step that was held is done by the time this is answered
    world.engine.assert_idle()


@pytest.mark.parametrize("prompt", [{"text": "Rome"}, {"text": ["Rome", "Spain"]}, {"inputs": "Rome"}])
async def test_a_client_that_goes_amid_its_stream_cancels_its_requests(world, server, prompt):
    params = LONG if "text" in prompt else {"parameters": {"max_new_tokens": 400}}
    world.engine.hold_after = 3
    reader, writer = await send(server, {**prompt, **params, "stream": True})
    await soon(reader.readuntil(b"data: "))
    await hang_up(writer)
    num = len(world.engine.requests)
    assert num >= 1
    await cancelled(world.engine, num)
    world.engine.hold_after = None
    world.engine.running.set()
    await world.post({"text": "Rome"})
    world.engine.assert_idle()
    metrics = (await world.client.get("/metrics")).text
    assert f'finished_reason="abort",model_name="tiny"}} {num}.0' in metrics


async def test_a_client_that_goes_while_it_sends_its_body_harms_nobody(world, server):
    _, writer = await asyncio.open_connection(*server)
    writer.write(b'POST /generate HTTP/1.1\r\nhost: octavo\r\ncontent-length: 100\r\n\r\n{"text": ')
    await writer.drain()
    await hang_up(writer)
    async with httpx.AsyncClient(base_url=f"http://{server[0]}:{server[1]}") as client:
        assert (await client.post("/generate", json={"text": "Rome"})).status_code == 200
    assert len(world.engine.requests) == 1


async def test_events_arrive_one_by_one_as_they_are_made(world, server):
    world.engine.hold_after = 1
    async with (
        httpx.AsyncClient(base_url=f"http://{server[0]}:{server[1]}", timeout=PATIENCE_S) as client,
        client.stream("POST", "/generate", json={"text": "Rome", "stream": True, **LONG}) as response,
    ):
        lines = response.aiter_lines()
        for num_tokens in (1, 2, 3):
            assert await soon(anext(lines)) == f"id: {num_tokens}"
            line = await soon(anext(lines))
            event = json.loads(line.removeprefix("data: "))
            assert event["meta_info"]["completion_tokens"] == num_tokens
            assert await soon(anext(lines)) == ""
            assert not world.engine.running.is_set()  # the next token is not computed before the last has been read
            world.engine.running.set()
    await cancelled(world.engine, 1)


async def test_a_connection_is_used_again_after_an_answer_a_refusal_and_a_stream(world, server):
    async with httpx.AsyncClient(base_url=f"http://{server[0]}:{server[1]}", timeout=PATIENCE_S) as client:
        for body in ({"text": "Rome"}, {"text": ""}, {"text": "Rome", "stream": True}, {"inputs": "Rome"}):
            response = await client.post("/generate", json=body)
            assert response.status_code in {200, 400}
    world.engine.assert_idle()
    assert world.engine.cancelled == []
