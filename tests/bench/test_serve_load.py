"""The generator against real servers on loopback: Octavo's own over the echo engine, and small ones that misbehave."""

import asyncio
import itertools
import socket
from contextlib import asynccontextmanager

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import Arrival, Pattern, Range, draw_arrivals, draw_lengths
from serve_app.bench.serve.client import Client, find, read_retry_after
from serve_app.bench.serve.idle import await_idle
from serve_app.bench.serve.load import Asks, ClosedLoad, OpenLoad
from serve_app.bench.serve.record import Clock, Record

pytestmark = pytest.mark.anyio

VOCABULARY = Range(10, 400)
PATIENCE_S = 60.0
NUM = 20


def url_of(address):
    host, port = address
    return f"http://{host}:{port}"


@asynccontextmanager
async def serving(app):
    """URL of an application behind a real server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        task = asyncio.ensure_future(served.serve(sockets=[listener]))
        yield url_of(listener.getsockname())
        served.should_exit = True
        await task


async def client_of(url, patience_s=PATIENCE_S, key=None):
    clock = Clock()
    return Client(await find(url), clock, patience_s, key), clock


async def send_one(url, patience_s=PATIENCE_S, output_tokens=3):
    client, _ = await client_of(url, patience_s)
    record = Record(Arrival(0.0, 8, output_tokens))
    await client.send(record, *Asks(VOCABULARY).make(record.arrival))
    return record


def drawn(num=NUM):
    lengths = draw_lengths(Range(4, 100), Range(1, 8), 0)
    return draw_arrivals(Pattern.UNIFORM, 500.0, 60.0, lengths, 0, num)


async def until_submitted(engine, num):
    while len(engine.requests) < num:
        engine.submitted.clear()
        await engine.submitted.wait()


async def test_every_request_gets_the_tokens_it_asked_for(world, server):
    client, clock = await client_of(url_of(server))
    load = OpenLoad(client, clock, Asks(VOCABULARY), retry=False)
    await load.run(drawn())
    assert [record.error for record in load.records] == [""] * NUM
    assert all(record.is_whole and record.tries[0].status == 200 for record in load.records)
    asked = sorted((len(request.prompt), request.sampling.max_new_tokens) for request in world.engine.requests.values())
    assert asked == sorted((arrival.prompt_tokens, arrival.output_tokens) for arrival in drawn())
    world.engine.assert_idle()


async def test_requests_come_at_their_time_to_a_server_that_stands_still(world, server):
    """Open loop: none waits for the answer to another."""
    world.engine.running.clear()
    client, clock = await client_of(url_of(server))
    load = OpenLoad(client, clock, Asks(VOCABULARY), retry=False)
    running = asyncio.ensure_future(load.run(drawn()))
    await until_submitted(world.engine, NUM)
    assert not any(record.token_s for record in load.records)
    world.engine.running.set()
    await running
    assert all(record.is_whole for record in load.records)
    assert all(record.tries[0].sent_s >= record.arrival.at_s for record in load.records)


async def test_no_two_prompts_are_alike_even_for_the_same_seed(world, server):
    for _ in range(2):
        client, clock = await client_of(url_of(server))
        await OpenLoad(client, clock, Asks(VOCABULARY), retry=False).run(drawn())
    prompts = {tuple(request.prompt) for request in world.engine.requests.values()}
    assert len(prompts) == 2 * NUM
    assert all(VOCABULARY.low <= token <= VOCABULARY.high for prompt in prompts for token in prompt)


async def test_a_client_that_got_nothing_hangs_up_and_the_server_notices(world, server):
    world.engine.running.clear()
    record = await send_one(url_of(server), patience_s=0.2)
    assert (record.gave_up, record.error, record.token_s) == (True, "", [])
    await world.engine.was_cancelled.wait()
    world.engine.running.set()


async def test_a_request_that_cannot_be_served_is_an_error_with_what_was_said(server):
    record = await send_one(url_of(server), output_tokens=100_000)
    assert record.error.startswith("status 400: ")
    assert not record.is_refused


async def test_a_stream_that_breaks_off_is_an_error(world, server):
    world.engine.failing_after = 2
    record = await send_one(url_of(server), output_tokens=5)
    assert "broke off" in record.error
    assert len(record.token_s) == 2


async def test_a_server_that_has_gone_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client, _ = await client_of(url_of(listener.getsockname()))
    record = Record(Arrival(0.0, 8, 3))
    await client.send(record, *Asks(VOCABULARY).make(record.arrival))
    assert "refused" in record.error.lower() or "Connect" in record.error
    assert record.ended_s is not None


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("data: nonsense\n\n", "does not answer as SGLang"),
        ('data: {"token": {"id": 5}}\n\n', "does not answer as SGLang"),
        ('data: {"meta_info": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n', "2 tokens came of the 3"),
        ('data: {"meta_info": {"completion_tokens": 3}}\n\n', "closed before"),
        (
            'data: {"meta_info": {"completion_tokens": 1, "finish_reason": {"type": "abort"}}}\n\n',
            "ended with abort",
        ),
        ("", "closed before"),
    ],
)
async def test_a_stream_that_is_no_whole_answer_is_an_error(said, words):
    app = FastAPI()

    @app.post("/generate")
    async def generate():
        return StreamingResponse(iter([said]), media_type="text/event-stream")

    async with serving(app) as url:
        record = await send_one(url)
    assert words in record.error
    assert not record.is_whole


async def test_a_server_that_hangs_up_in_the_middle_of_a_line_is_an_error():
    async def hang_up(reader, writer):
        if await reader.readline():  # else somebody looks whether anybody is there
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:\r\n")
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as crooked:
        record = await send_one(url_of(crooked.sockets[0].getsockname()))
    assert record.error
    assert record.tries[0].status == 200


class Doorman:
    """Refuses each request `num_refusals` times, then answers it; the first answers once `crowd` are inside."""

    def __init__(self, num_refusals, headers, status=429, crowd=0):
        self.num_refusals = num_refusals
        self.headers = headers
        self.status = status
        self.seen = {}  # x-request-id -> bodies
        self.keys = set()
        self.crowd = crowd
        self.crowded = asyncio.Event()
        self.num_inside = self.most_inside = 0
        self.app = FastAPI()
        self.app.post("/behind/a/proxy/generate")(self.generate)

    async def generate(self, request: Request):
        body = await request.body()
        bodies = self.seen.setdefault(request.headers["x-request-id"], [])
        bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        if len(bodies) <= self.num_refusals:
            return JSONResponse({"error": "not now"}, self.status, self.headers)
        num_tokens = (await request.json())["sampling_params"]["max_new_tokens"]
        return StreamingResponse(self.answer(num_tokens), media_type="text/event-stream")

    async def answer(self, num_tokens):
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        if self.num_inside >= self.crowd:
            self.crowded.set()
        await self.crowded.wait()
        for num in range(1, num_tokens + 1):
            yield f'data: {{"text": "a", "meta_info": {{"completion_tokens": {num}, "finish_reason": null}}}}\n\n'
            await asyncio.sleep(0)
        self.num_inside -= 1
        yield "data: [DONE]\n\n"


async def load_doorman(doorman, *, retry, num=5):
    async with serving(doorman.app) as url:
        client, clock = await client_of(f"{url}/behind/a/proxy/", key="secret")
        load = OpenLoad(client, clock, Asks(VOCABULARY), retry=retry)
        await load.run(drawn(num))
    assert doorman.keys == {"Bearer secret"}
    return load.records


async def test_who_is_refused_waits_as_told_and_comes_back_with_the_same_request():
    doorman = Doorman(2, {"retry-after-ms": "30", "x-llm-d-request-dropped-reason": "ttft"})
    records = await load_doorman(doorman, retry=True)
    for record in records:
        assert [attempt.status for attempt in record.tries] == [429, 429, 200]
        assert [attempt.reason for attempt in record.tries] == ["ttft", "ttft", ""]
        assert all(b.sent_s - a.answered_s >= 0.03 for a, b in itertools.pairwise(record.tries))
        assert record.is_whole
        assert not record.is_refused
    assert len(doorman.seen) == 5
    assert all(len(set(bodies)) == 1 for bodies in doorman.seen.values())


async def test_who_is_refused_four_times_stays_away():
    records = await load_doorman(Doorman(9, {"retry-after": "0"}), retry=True)
    assert [len(record.tries) for record in records] == [4] * 5
    assert all(record.is_refused and not record.error for record in records)


@pytest.mark.parametrize("status", [429, 503, 529])
@pytest.mark.parametrize(
    ("retry", "headers"), [(False, {"retry-after": "0"}), (True, {}), (True, {"retry-after": "9999"})]
)
async def test_who_may_not_or_cannot_know_when_does_not_come_back(status, retry, headers):
    records = await load_doorman(Doorman(1, headers, status), retry=retry, num=2)
    assert [len(record.tries) for record in records] == [1, 1]
    assert all(record.is_refused and record.ended_s is not None for record in records)


async def test_a_closed_loop_keeps_so_many_under_way_and_no_more():
    doorman = Doorman(0, {}, crowd=3)
    async with serving(doorman.app) as url:
        client, clock = await client_of(f"{url}/behind/a/proxy")
        load = ClosedLoad(client, Asks(VOCABULARY), draw_lengths(Range(4, 8), Range(20, 40), 0), 3)
        begin_s, end_s = await load.run(clock, 0.3)
    assert doorman.most_inside == 3
    assert end_s - begin_s >= 0.3
    assert len(load.records) >= 3
    assert all(record.is_whole for record in load.records)


async def test_a_capacity_of_a_server_that_only_fails_is_no_capacity(server):
    client, clock = await client_of(f"{url_of(server)}/nowhere")
    load = ClosedLoad(client, Asks(VOCABULARY), draw_lengths(Range(4, 8), Range(2, 4), 0), 2)
    with pytest.raises(BenchError, match="could not be measured: status 404"):
        await load.run(clock, 30.0)


async def test_a_server_is_at_rest_when_nothing_runs(world, server):
    url = url_of(server)
    assert await await_idle(url, PATIENCE_S)
    world.engine.running.clear()
    pending = asyncio.ensure_future(send_one(url))
    await until_submitted(world.engine, 1)
    assert not await await_idle(url, 0.2)
    world.engine.running.set()
    assert (await pending).is_whole
    assert await await_idle(url, PATIENCE_S)


async def test_a_server_that_does_not_tell_is_at_rest():
    async with serving(FastAPI()) as url:
        assert await await_idle(url, PATIENCE_S)


@pytest.mark.parametrize("url", ["http://[", "ftp://127.0.0.1", "127.0.0.1:8000", "http://127.0.0.1:1"])
async def test_a_server_that_is_none_is_one_sentence(url):
    with pytest.raises(BenchError, match=r"no URL|does not answer"):
        await find(url)


@pytest.mark.parametrize(
    ("seconds", "milliseconds", "expected"),
    [
        ("3", "2500", 3.0),
        (None, "2500", 2.5),
        ("Wed, 21 Oct 2026 07:28:00 GMT", "40", 0.04),
        ("0.5", None, 0.5),
        ("-1", None, None),
        ("nan", None, None),
        (None, None, None),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_nothing(seconds, milliseconds, expected):
    assert read_retry_after(seconds, milliseconds) == expected
