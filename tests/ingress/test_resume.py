"""A client that comes back with its last event's id gets the events behind it, and no token twice."""

import asyncio

import httpx
import pytest

from tests.ingress.conftest import read_event, read_events, read_named_events
from tests.ingress.test_disconnect import PATIENCE_S, cancelled, soon

pytestmark = pytest.mark.anyio

QUESTION, ANSWER = "What is the capital of France?", " Paris is the capital."
HELD = ["capital. Rome"]  # begins in the answer, and is held back until its end
NAME = "mine"

SGLANG = {"text": QUESTION, "rid": NAME, "stream": True}
TGI = {"inputs": QUESTION, "stream": True}
BODIES = {
    "sglang": SGLANG,
    "sglang, text held back": {**SGLANG, "sampling_params": {"stop": HELD}},
    "sglang, cut at a stop string": {**SGLANG, "sampling_params": {"stop": "the cap"}},
    "sglang, several": {**SGLANG, "text": [QUESTION, "Norway"], "sampling_params": {"n": 2, "max_new_tokens": 5}},
    "tgi": TGI,
    "tgi, text held back": {**TGI, "parameters": {"stop": HELD}},
    "tgi, cut at a stop string": {**TGI, "parameters": {"stop": ["the cap"], "do_sample": True}},
}


@pytest.fixture(autouse=True)
def knowledge(world):
    world.say(QUESTION, ANSWER)
    world.say("Norway", "?")


def resumed(body, last_event_id):
    headers = {"last-event-id": last_event_id}
    return headers if "rid" in body else headers | {"x-request-id": NAME}


async def stream(world, body, last_event_id=None):
    """(id, data) of all events, without what the prefix cache says; the end without an id is "[DONE]"."""
    headers = {"x-request-id": NAME} if last_event_id is None else resumed(body, last_event_id)
    response = await world.post(body, **headers)
    assert response.status_code == 200, response.text
    events = read_named_events(response.text)
    for _, data in events:
        if "meta_info" in data:
            del data["meta_info"]["cached_tokens"]
    return events


def by_sequence(events):
    """The same events in an order that does not depend on which sequence was faster; so do the ids of several."""
    if any("index" in data and "," in (event_id or "") for event_id, data in events):
        events = [(None, data) for _, data in events]
    return sorted(events, key=lambda event: event[1].get("index", 0) if isinstance(event[1], dict) else 99)


def counts_of(event_id):
    return [int(count) for count in event_id.split(",")]


@pytest.mark.parametrize("name", BODIES)
async def test_what_was_forgotten_is_computed_again_and_told_from_there(world, name):
    whole = await stream(world, BODIES[name])
    named = [event for event in whole if event[0] is not None]
    assert len(named) > 3
    for i, (event_id, _) in enumerate(named):
        world.engine.forget()
        rest = await stream(world, BODIES[name], event_id)
        assert by_sequence(rest) == by_sequence(whole[i + 1 :])
    world.engine.assert_idle()


@pytest.mark.parametrize("name", BODIES)
async def test_what_was_kept_is_told_from_there(world, name):
    whole = await stream(world, BODIES[name])
    last = {data.get("index", 0): data for _, data in whole if data != "[DONE]"}
    for event_id, _ in [event for event in whole if event[0] is not None][:-1]:
        num_steps = world.engine.core.stats().steps_total
        rest = await stream(world, BODIES[name], event_id)
        assert rest[-1] == whole[-1]
        if "inputs" in BODIES[name]:
            assert rest == whole[-len(rest) :]
            assert counts_of(rest[0][0]) == [counts_of(event_id)[0] + 1]
        elif "cut" not in name:  # an event holds all that came so far, and all came at once
            assert all(data == last[data.get("index", 0)] for _, data in rest[:-1])
        if "cut" not in name:  # the ingress ended that one: the engine knows it as cancelled, and computes it again
            assert world.engine.core.stats().steps_total == num_steps


@pytest.mark.parametrize("name", BODIES)
async def test_ids_count_the_tokens_of_each_sequence(world, name):
    counts = [0] * (4 if "several" in name else 1)
    seen = []
    for event_id, data in await stream(world, BODIES[name]):
        if event_id is not None:
            index = data.get("index", 0) if "rid" in BODIES[name] else 0
            counts[index] = data["meta_info"]["completion_tokens"] if "rid" in BODIES[name] else data["index"]
            assert counts_of(event_id) == counts
            assert event_id not in seen
            seen.append(event_id)


@pytest.mark.parametrize("name", BODIES)
async def test_after_the_end_only_the_end_is_left(world, name):
    *_, (last_id, _) = [event for event in await stream(world, BODIES[name]) if event[0] is not None]
    end = [] if "inputs" in BODIES[name] else [(None, "[DONE]")]
    assert await stream(world, BODIES[name], last_id) == end


@pytest.mark.parametrize("body", [SGLANG, TGI])
async def test_who_claims_more_tokens_than_there_are_is_told_how_it_ended(world, body):
    *_, (_, last) = [event for event in await stream(world, body) if event[0] is not None]
    [(event_id, data), *end] = await stream(world, body, "999")
    assert event_id == "999"
    assert end == ([] if "inputs" in body else [(None, "[DONE]")])
    if "inputs" in body:
        assert (data["generated_text"], data["details"]) == (last["generated_text"], last["details"])
        assert data["token"]["text"] == ""
    else:
        assert data == last


async def test_an_answer_that_does_not_stream_is_whole_when_it_is_fetched_again(world):
    body = {**SGLANG, "stream": False, "sampling_params": {"temperature": 1}}
    first = (await world.post(body)).json()
    assert (await world.post(body, **{"last-event-id": "3"})).json() == first
    assert world.engine.core.stats().finished_total == {"stop": 1}


@pytest.mark.parametrize("body", [SGLANG, TGI])
async def test_another_ingress_replica_goes_on_in_the_middle_of_a_stream(world, server, body):
    world.engine.hold_after = 3
    client = httpx.AsyncClient(base_url=f"http://{server[0]}:{server[1]}", timeout=PATIENCE_S)
    async with client, client.stream("POST", "/generate", json=body, headers={"x-request-id": NAME}) as response:
        lines = response.aiter_lines()
        seen = [await next_event(lines) for _ in range(3)]
        async with world.replica() as elsewhere:
            task = asyncio.ensure_future(elsewhere.post("/generate", json=body, headers=resumed(body, "2")))
            _, end = await next_event(lines)
            world.engine.hold_after = None
            world.engine.running.set()
            events = read_named_events((await soon(task)).text)
    assert [event_id for event_id, _ in seen] == ["1", "2", "3"]
    assert "taken over by a newer connection" in str(end)
    ids = [event_id for event_id, _ in events if event_id is not None]
    assert ids == [str(n) for n in range(3, 3 + len(ids))]
    assert world.engine.cancelled == []
    assert len(world.engine.requests) == 1
    if "inputs" in body:
        texts = [data["token"]["text"] for _, data in [*seen[:2], *events] if not data["token"]["special"]]
        assert "".join(texts) == events[-1][1]["generated_text"] == ANSWER
    else:
        assert events[0][1]["text"].startswith(seen[-1][1]["text"])
        assert events[-2][1]["text"] == ANSWER


async def next_event(lines):
    block = []
    while line := await soon(anext(lines)):
        block.append(line)
    return read_event("\n".join(block))


@pytest.mark.parametrize("num", [1, 3])
async def test_a_newer_connection_takes_over_on_the_same_replica(world, server, num):
    body = {**SGLANG, "text": [QUESTION] * num}
    world.engine.hold_after = 2
    client = httpx.AsyncClient(base_url=f"http://{server[0]}:{server[1]}", timeout=PATIENCE_S)
    async with client, client.stream("POST", "/generate", json=body) as older:
        lines = older.aiter_lines()
        await next_event(lines)
        refused = await client.post("/generate", json=body)
        assert (refused.status_code, refused.json()["error"]["field"]) == (400, "rid")
        zero = ",".join(["0"] * num)
        newer = asyncio.ensure_future(client.post("/generate", json=body, headers={"last-event-id": zero}))
        event = [None, {}]
        while event[0] is not None or "error" not in event[1]:
            event = await next_event(lines)
        assert event[1]["error"]["code"] == 409
        assert await next_event(lines) == (None, "[DONE]")
        world.engine.hold_after = None
        world.engine.running.set()
        *events, done = read_events((await soon(newer)).text)
    assert done == "[DONE]"
    ends = [event["text"] for event in events if event["meta_info"]["finish_reason"]]
    assert ends == [ANSWER] * num
    assert (await world.post(body)).status_code == 200  # the name is free again
    world.engine.assert_idle()


async def test_a_client_that_left_and_comes_back_is_answered_though_its_request_was_cancelled(world, server):
    world.engine.hold_after = 2
    client = httpx.AsyncClient(base_url=f"http://{server[0]}:{server[1]}", timeout=PATIENCE_S)
    async with client:
        async with client.stream("POST", "/generate", json=SGLANG) as response:
            event_id, _ = await next_event(response.aiter_lines())
        await cancelled(world.engine, 1)
        world.engine.hold_after = None
        world.engine.running.set()
        response = await client.post("/generate", json=SGLANG, headers={"last-event-id": event_id})
    events = read_named_events(response.text)
    assert [event_id for event_id, _ in events[:2]] == ["2", "3"]
    assert events[-2][1]["text"] == ANSWER


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1,2", "1,", ",", " 1 2", "1" * 10, "٣", "0x1", "[DONE]", "1;2"])
@pytest.mark.parametrize("body", [SGLANG, TGI])
async def test_an_id_that_no_event_has_is_refused_by_name(world, body, value):
    headers = [(b"last-event-id", value.encode()), (b"x-request-id", b"mine")]
    response = await world.client.post("/generate", json=body, headers=headers)
    fault = response.json()
    status, field = (422, fault["field"]) if "inputs" in body else (400, fault["error"]["field"])
    assert (response.status_code, field) == (status, "Last-Event-ID")
    assert not world.engine.requests


async def test_ids_of_several_sequences_are_as_many(world):
    body = {**SGLANG, "sampling_params": {"n": 3}}
    for value in ("1", "1,2", "1,2,3,4"):
        response = await world.post(body, **{"last-event-id": value})
        assert (response.status_code, response.json()["error"]["field"]) == (400, "Last-Event-ID")


@pytest.mark.parametrize("body", [{"text": QUESTION, "stream": True}, TGI])
async def test_what_has_no_name_cannot_be_resumed(world, body):
    response = await world.post(body, **{"last-event-id": "1"})
    assert response.status_code in {400, 422}
    assert "Last-Event-ID: names no request" in response.text


async def test_an_empty_last_event_id_is_none(world):
    body = {"text": QUESTION, "stream": True}
    response = await world.post(body, **{"last-event-id": "", "x-request-id": ""})
    assert response.status_code == 200
    assert len(response.headers["x-request-id"]) == 32


async def test_a_name_in_the_header_has_a_limit_and_that_in_the_body_comes_first(small_world):
    response = await small_world.post({"text": "a"}, **{"x-request-id": "r" * 9})
    assert (response.status_code, response.json()["error"]["field"]) == (400, "x-request-id")
    response = await small_world.post({"text": "a", "rid": "r"}, **{"x-request-id": "r" * 9})
    assert (response.status_code, response.headers["x-request-id"]) == (200, "r")


# -- names and seeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{"text": QUESTION}, {"inputs": QUESTION}])
async def test_every_answer_says_by_which_name_it_is_known(world, body):
    for streams in ({}, {"stream": True}):
        assert len((await world.post({**body, **streams})).headers["x-request-id"]) == 32
        named = await world.post({**body, **streams}, **{"x-request-id": "header"})
        assert named.headers["x-request-id"] == "header"
        world.engine.broken = "starting"
        assert (await world.post({**body, **streams}, **{"x-request-id": "b"})).headers["x-request-id"] == "b"
        world.engine.broken = ""


async def test_the_name_of_a_list_is_what_its_sequences_have_in_common(world):
    response = await world.post({"text": ["a", "b"], "sampling_params": {"n": 2, "max_new_tokens": 1}})
    name = response.headers["x-request-id"]
    ids = [answer["meta_info"]["id"] for answer in response.json()]
    assert ids == [f"{name}_{i}_{copy}" for i in (0, 1) for copy in (0, 1)]
    again = await world.post({"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": {"max_new_tokens": 1}})
    assert again.headers["x-request-id"] == "x"


@pytest.mark.parametrize("rid", ["a\r\nset-cookie: b", "Läuse", "\x00"])
async def test_a_name_that_is_no_header_value_is_in_the_body_only(world, rid):
    response = await world.post({"text": QUESTION, "rid": rid})
    assert response.json()["meta_info"]["id"] == rid
    assert not {"x-request-id", "set-cookie"} & set(response.headers)


async def test_where_serve_names_the_answers_we_do_not(world):
    async with world.replica(names_answers=False) as client:
        response = await client.post("/generate", json={"text": QUESTION}, headers={"x-request-id": NAME})
        assert response.json()["meta_info"]["id"] == NAME
        assert "x-request-id" not in response.headers


async def test_a_seed_that_is_not_given_follows_from_the_name(world):
    async def seeds(body, name):
        world.engine.requests.clear()
        assert (await world.post(body, **{"x-request-id": name})).status_code == 200
        return [request.sampling.seed for request in world.engine.requests.values()]

    sampled = {"inputs": QUESTION, "parameters": {"do_sample": True}}
    copies = {"text": QUESTION, "sampling_params": {"n": 3, "max_new_tokens": 2}}
    for body, num in ((sampled, 1), ({"text": QUESTION}, 1), (copies, 3)):
        first = await seeds(body, "one")
        world.engine.forget()
        assert await seeds(body, "one") == first
        assert not set(first) & set(await seeds(body, "two"))
        assert len(set(first)) == num
