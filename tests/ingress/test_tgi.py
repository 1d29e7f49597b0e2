"""`/generate` in TGI's dialect: what is asked for is what comes back, whole and as a stream."""

import pytest

from serve_app.engine.request import Grammar
from tests.ingress.conftest import read_events
from tests.ingress.echo_engine import END_TOKEN

pytestmark = pytest.mark.anyio

QUESTION, ANSWER = "What is the capital of France?", " Paris is the capital."


@pytest.fixture(autouse=True)
def knowledge(world):
    world.say(QUESTION, ANSWER)


def only(requests):
    [request] = requests.values()
    return request


async def test_an_answer_is_the_generated_text(world):
    response = await world.post({"inputs": QUESTION})
    assert response.status_code == 200
    assert response.json() == {"generated_text": ANSWER}
    world.engine.assert_idle()


async def test_details_have_a_token_each(world):
    response = await world.post({"inputs": QUESTION, "parameters": {"details": True}})
    ids = world.tokenizer.encode(ANSWER)
    details = response.json()["details"]
    tokens = details.pop("tokens")
    assert details == {"finish_reason": "eos_token", "generated_tokens": len(ids) + 1, "seed": None, "prefill": []}
    assert [token["id"] for token in tokens] == [*ids, END_TOKEN]
    assert "".join(token["text"] for token in tokens if not token["special"]) == ANSWER
    assert tokens[-1] == {"id": END_TOKEN, "text": "<|im_end|>", "logprob": -0.5, "special": True}


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 5}, 1.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
    ],
)
async def test_sampling_must_be_asked_for(world, parameters, temperature):
    await world.post({"inputs": QUESTION, "parameters": parameters})
    assert only(world.engine.requests).sampling.temperature == temperature


async def test_the_seed_of_a_sampled_answer_is_reported(world):
    parameters = {"do_sample": True, "details": True}
    answer = (await world.post({"inputs": QUESTION, "parameters": parameters})).json()
    assert answer["details"]["seed"] == only(world.engine.requests).sampling.seed
    world.engine.requests.clear()
    await world.post({"inputs": QUESTION, "parameters": {**parameters, "seed": 17}})
    assert only(world.engine.requests).sampling.seed == 17


async def test_the_default_is_100_tokens(world):
    await world.post({"inputs": QUESTION})
    assert only(world.engine.requests).sampling.max_new_tokens == 100


async def test_penalties_reach_the_engine(world):
    await world.post({"inputs": QUESTION, "parameters": {"repetition_penalty": 1.2, "frequency_penalty": 0.1}})
    sampling = only(world.engine.requests).sampling
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.2, 0.1, 0.0)


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"type": "json", "value": {"type": "object"}}, Grammar("json_schema", '{"type":"object"}')),
        ({"type": "json_schema", "value": {"type": "object"}}, Grammar("json_schema", '{"type":"object"}')),
        ({"type": "json", "value": '{"type": "array"}'}, Grammar("json_schema", '{"type": "array"}')),
        ({"type": "regex", "value": "[a-z]+"}, Grammar("regex", "[a-z]+")),
    ],
)
async def test_grammars_reach_the_engine(world, given, grammar):
    response = await world.post({"inputs": QUESTION, "parameters": {"grammar": given}})
    assert response.status_code == 200, response.text
    assert only(world.engine.requests).sampling.grammar == grammar


async def test_the_likeliest_tokens_come_when_asked_for(world):
    ids = world.tokenizer.encode(ANSWER)[:3]
    tops = [
        [
            {"id": i, "text": world.tokenizer.decode([i]), "logprob": -0.5, "special": False},
            {"id": i + 1, "text": world.tokenizer.decode([i + 1]), "logprob": -1.5, "special": False},
        ]
        for i in ids
    ]
    parameters = {"top_n_tokens": 2, "max_new_tokens": 3}
    body = {"inputs": QUESTION, "parameters": parameters | {"details": True}}
    assert (await world.post(body)).json()["details"]["top_tokens"] == tops
    events = read_events((await world.post({"inputs": QUESTION, "parameters": parameters, "stream": True})).text)
    assert [event["top_tokens"] for event in events] == tops
    assert (await world.post({"inputs": QUESTION, "parameters": parameters})).json().keys() == {"generated_text"}


async def test_the_full_text_begins_with_the_prompt(world):
    body = {"inputs": QUESTION, "parameters": {"return_full_text": True}}
    assert (await world.post(body)).json() == {"generated_text": QUESTION + ANSWER}
    *_, last = read_events((await world.post({**body, "stream": True})).text)
    assert last["generated_text"] == QUESTION + ANSWER


async def test_truncate_keeps_the_last_tokens_of_the_prompt(world):
    await world.post({"inputs": QUESTION, "parameters": {"truncate": 4}})
    assert only(world.engine.requests).prompt == world.tokenizer.encode(QUESTION)[-4:]


async def test_a_stream_has_an_event_per_token_and_the_details_in_the_last(world):
    response = await world.post({"inputs": QUESTION, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response.text)
    ids = world.tokenizer.encode(ANSWER)
    assert [event["index"] for event in events] == list(range(1, len(ids) + 2))
    assert [event["token"]["id"] for event in events] == [*ids, END_TOKEN]
    assert "".join(event["token"]["text"] for event in events if not event["token"]["special"]) == ANSWER
    assert all((event["generated_text"], event["details"]) == (None, None) for event in events[:-1])
    assert events[-1]["generated_text"] == ANSWER
    assert events[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": len(ids) + 1,
        "seed": None,
        "input_length": len(world.tokenizer.encode(QUESTION)),
    }


async def test_a_stop_sequence_cuts_the_text(world):
    parameters = {"stop": ["the cap"], "details": True}
    answer = (await world.post({"inputs": QUESTION, "parameters": parameters})).json()
    assert answer["generated_text"] == " Paris is "
    assert answer["details"]["finish_reason"] == "stop_sequence"
    events = read_events((await world.post({"inputs": QUESTION, "parameters": parameters, "stream": True})).text)
    assert "".join(event["token"]["text"] for event in events) == " Paris is "
    world.engine.assert_idle()


async def test_text_held_back_before_the_end_token_is_not_lost(world):
    parameters = {"stop": ["capital. Rome"]}
    events = read_events((await world.post({"inputs": QUESTION, "parameters": parameters, "stream": True})).text)
    assert "".join(event["token"]["text"] for event in events if not event["token"]["special"]) == ANSWER
    assert events[-1]["generated_text"] == ANSWER


async def test_length_is_a_finish_reason(world):
    parameters = {"max_new_tokens": 2, "details": True}
    answer = (await world.post({"inputs": QUESTION, "parameters": parameters})).json()
    assert answer["details"]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_fails_is_a_424(world, stream):
    world.engine.failing_after = 0
    response = await world.post({"inputs": QUESTION, "stream": stream})
    assert response.status_code == 424
    assert response.json()["error_type"] == "generation"


async def test_an_engine_that_fails_later_ends_the_stream_with_an_error(world):
    world.engine.failing_after = 1
    response = await world.post({"inputs": QUESTION, "stream": True})
    token, error = read_events(response.text)
    assert token["index"] == 1
    assert error["error_type"] == "generation"


async def test_without_an_engine_the_answer_is_503(world):
    world.engine.broken = "starting"
    response = await world.post({"inputs": QUESTION})
    assert (response.status_code, response.json()) == (503, {"error": "starting", "error_type": "unavailable"})
