"""Streams are recorded as they came, and go on over a broken connection."""

import asyncio
import itertools
import json

import pytest

from serve_app.drill import load
from serve_app.drill.load import Ask, Load, draw_asks
from tests.drill.faulty_server import FaultyServer

pytestmark = pytest.mark.anyio

ASK = Ask(0, [5, 6, 7], 6, 0.0, 0)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(load, "RETRY_S", 0.001)


def stream(event, finish="length"):
    """A whole response, of one event and its end."""
    event = {"meta_info": {"finish_reason": {"type": finish}}} | event
    return b"HTTP/1.1 200 OK\r\n\r\ndata: %s\n\ndata: [DONE]\n\n" % json.dumps(event).encode()


async def record_of(*script):
    """(record, connections seen) of ASK."""
    async with FaultyServer(*script) as server:
        (record,) = await Load(server.url, 1, "test").run([ASK])
    return record, server.seen


def test_requests_are_drawn_from_the_seed():
    asks = draw_asks(40, 48, 3)
    assert asks == draw_asks(40, 48, 3) != draw_asks(40, 48, 4)
    assert len({tuple(ask.prompt) for ask in asks}) == 40
    assert [ask.temperature for ask in asks[:4]] == [0.0, 1.0, 0.0, 1.0]
    assert all(8 <= len(ask.prompt) <= 64 and 24 <= ask.num_tokens <= 48 for ask in asks)
    assert len({ask.num_tokens for ask in asks}) > 5 < len({len(ask.prompt) for ask in asks})


async def test_streams_of_the_real_application(world, url):
    asks = draw_asks(12, 16, 1)
    running = Load(url, 4, "test")
    records = await running.run(asks)
    assert records == running.records
    assert sorted(record.ask for record in records) == list(range(12))
    assert len({record.rid for record in records}) == 12
    for record in records:
        assert (record.error, record.changed, record.num_resumed) == ("", "", 0)
        assert len(record.tokens) == asks[record.ask].num_tokens
        times = [record.sent_unix_s, *record.token_unix_s, record.ended_unix_s]
        assert times == sorted(times)
    samplings = [request.sampling for request in world.engine.requests.values()]
    assert all(sampling.ignore_eos for sampling in samplings)
    assert [sampling.temperature for sampling in samplings].count(0.0) == 6
    again = await Load(url, 12, "test").run(asks)
    assert {r.ask: r.tokens for r in again} == {r.ask: r.tokens for r in records}
    assert not {r.rid for r in again} & {r.rid for r in records}


async def test_an_endless_load_ends_when_it_is_stopped(world, url):
    running = Load(url, 3, "test")

    def asks():
        for number, ask in enumerate(itertools.cycle(draw_asks(2, 4, 0))):
            if number == 10:
                running.stop()
            yield ask

    records = await asyncio.wait_for(running.run(asks()), 30)
    assert len(records) == 10
    world.engine.assert_idle()


async def test_a_cancelled_load_ends_its_streams(world, url):
    running = Load(url, 3, "test")
    world.engine.running.clear()
    task = asyncio.ensure_future(running.run(draw_asks(3, 16, 0)))
    await world.engine.submitted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running.records == []


async def test_a_broken_stream_goes_on_at_the_next_event():
    record, seen = await record_of(2, "503", 3)
    assert (record.error, record.changed, record.num_resumed) == ("", "", 2)
    assert record.tokens == list(range(6))
    assert len(record.token_unix_s) == 6
    assert [last_id for last_id, _ in seen] == [None, "2", "2", "5"]
    assert all(body == seen[0][1] for _, body in seen)
    assert seen[0][1]["rid"] == record.rid


async def test_a_refused_connection_is_tried_again_from_the_beginning():
    record, seen = await record_of("503", 0)
    assert (record.error, record.num_resumed, record.tokens) == ("", 0, list(range(6)))
    assert [last_id for last_id, _ in seen] == [None, "0", "0"]


async def test_who_cannot_be_reached_is_given_up(monkeypatch):
    monkeypatch.setattr(load, "RESUME_S", 0.05)
    (record,) = await Load("http://127.0.0.1:1", 1, "test").run([ASK])
    assert record.error.startswith("the stream broke, and could not be resumed: ")


async def test_a_stream_that_breaks_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr(load, "MAX_BREAKS", 2)
    record, seen = await record_of(1, 1, 1, 1)
    assert record.error.startswith("the stream broke")
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (b"HTTP/1.1 400 Bad\r\ncontent-length: 3\r\n\r\nno!", "status 400: no!"),
        (stream({"error": {"message": "the engine ended"}}), "the server ended the stream: {'message'"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [5\n\n", "does not answer as SGLang's"),
        (stream({"output_ids": [0]}, finish="abort"), "the stream ended with abort"),
    ],
)
async def test_what_the_server_says_of_a_failure_is_kept(response, words):
    record, seen = await record_of(response)
    assert words in record.error
    assert len(seen) == 1


@pytest.mark.parametrize("ids", [[0, 2, 3], [0], [9, 9, 9, 9]])
async def test_what_is_told_again_or_otherwise_is_noted(ids):
    record, _ = await record_of(2, stream({"output_ids": ids}))
    assert record.error == ""
    assert record.changed
    assert record.tokens == [0, 1]
