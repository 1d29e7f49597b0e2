"""`/generate` in SGLang's dialect: what is asked for is what comes back, whole and as a stream."""

import httpx
import pytest

from serve_app.engine.request import Grammar
from tests.ingress.conftest import BABBLE, read_events
from tests.ingress.echo_engine import END_TOKEN

pytestmark = pytest.mark.anyio

QUESTION, ANSWER = "What is the capital of France?", " Paris is the capital."


@pytest.fixture(autouse=True)
def knowledge(world):
    world.say(QUESTION, ANSWER)


def only(requests):
    [request] = requests.values()
    return request


async def test_an_answer_has_text_tokens_and_meta_info(world):
    response = await world.post({"text": QUESTION, "rid": "mine"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    prompt, said = world.tokenizer.encode(QUESTION), world.tokenizer.encode(ANSWER)
    assert response.json() == {
        "text": ANSWER,
        "output_ids": [*said, END_TOKEN],
        "meta_info": {
            "id": "mine",
            "finish_reason": {"type": "stop", "matched": END_TOKEN},
            "prompt_tokens": len(prompt),
            "completion_tokens": len(said) + 1,
            "cached_tokens": 0,
        },
    }
    world.engine.assert_idle()


async def test_defaults_are_the_dialects(world):
    await world.post({"text": "Rome"})
    sampling = only(world.engine.requests).sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (128, 1.0, 1.0, 0)


async def test_sampling_params_reach_the_engine(world):
    params = {
        "max_new_tokens": 7,
        "min_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "stop_token_ids": [9, 7, 7],
        "ignore_eos": True,
        "sampling_seed": 2**64 - 1,
    }
    await world.post({"text": "Rome", "sampling_params": params})
    sampling = only(world.engine.requests).sampling
    sent = {name: getattr(sampling, "seed" if name == "sampling_seed" else name) for name in params}
    assert sent == params | {"stop_token_ids": (7, 9)}


@pytest.mark.parametrize(
    ("given", "meant"),
    [({"top_k": -1}, 0), ({"top_k": 10**30}, 0), ({"top_k": 1 << 30}, 0), ({"top_k": 1}, 1), ({"top_k": None}, 0)],
)
async def test_top_k_beyond_the_vocabulary_keeps_all(world, given, meant):
    await world.post({"text": "Rome", "sampling_params": {"max_new_tokens": 1, **given}})
    assert only(world.engine.requests).sampling.top_k == meant


async def test_an_unset_seed_is_drawn_anew(world):
    for _ in range(3):
        await world.post({"text": "Rome", "sampling_params": {"max_new_tokens": 1}})
    seeds = {request.sampling.seed for request in world.engine.requests.values()}
    assert len(seeds) == 3


async def test_a_temperature_that_would_overflow_is_greedy(world):
    await world.post({"text": "Rome", "sampling_params": {"max_new_tokens": 1, "temperature": 1e-300}})
    assert only(world.engine.requests).sampling.temperature == 0.0


async def test_neutral_values_of_what_is_not_supported_are_accepted(world):
    params = {"structural_tag": None, "custom_params": {}, "json_schema": None, "n": 1, "no_stop_trim": False}
    body = {"text": QUESTION, "sampling_params": params, "logprob_start_len": -1, "image_data": None}
    assert (await world.post(body)).json()["text"] == ANSWER


async def test_input_ids_and_messages_are_prompts_too(world):
    ids = world.tokenizer.encode(QUESTION)
    assert (await world.post({"input_ids": ids})).json()["text"] == ANSWER
    messages = [{"role": "user", "content": QUESTION}]
    world.engine.script[tuple(world.tokenizer.encode_chat(messages))] = world.tokenizer.encode("Paris")
    assert (await world.post({"messages": messages})).json()["text"] == "Paris"
    both = (await world.post({"messages": [messages, messages]})).json()
    assert [answer["text"] for answer in both] == ["Paris", "Paris"]


async def test_a_list_is_answered_by_a_list_in_its_order(world):
    world.say("Rome", " is the capital of Italy, and Madrid is the capital of Spain.")
    world.say("Norway", "?")
    response = await world.post({"text": [QUESTION, "Rome", "Norway"], "rid": "r"})
    answers = response.json()
    assert [answer["text"] for answer in answers][::2] == [ANSWER, "?"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1", "r_2"]
    [alone] = (await world.post({"text": [QUESTION]})).json()
    assert alone["text"] == ANSWER


async def test_each_prompt_of_a_list_may_have_its_own_sampling_params(world):
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2}]
    answers = (await world.post({"text": [QUESTION, QUESTION], "sampling_params": params})).json()
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [1, 2]


async def test_n_copies_differ_in_their_seed_only(world):
    params = {"n": 3, "sampling_seed": 2**64 - 2, "max_new_tokens": 4}
    answers = (await world.post({"text": QUESTION, "sampling_params": params, "rid": "r"})).json()
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1", "r_2"]
    assert [request.sampling.seed for request in world.engine.requests.values()] == [2**64 - 2, 2**64 - 1, 0]


async def test_length_ends_an_answer_with_its_length(world):
    response = await world.post({"text": QUESTION, "sampling_params": {"max_new_tokens": 3}})
    assert response.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 3}


async def test_a_default_budget_shrinks_to_the_context(world):
    response = await world.post({"input_ids": [5] * 500})
    assert response.json()["meta_info"]["completion_tokens"] == 12


async def test_logprobs_come_when_asked_for(world):
    response = await world.post({"text": QUESTION, "return_logprob": True, "sampling_params": {"max_new_tokens": 2}})
    ids = world.tokenizer.encode(ANSWER)[:2]
    assert response.json()["meta_info"]["output_token_logprobs"] == [[-0.5, ids[0], None], [-0.5, ids[1], None]]


async def test_penalties_and_biases_reach_the_engine(world):
    params = {"frequency_penalty": -2, "presence_penalty": 0.5, "repetition_penalty": 1.5, "max_new_tokens": 2}
    await world.post({"text": "Rome", "sampling_params": params | {"logit_bias": {"30": -1.5, "4": 100}}})
    sampling = only(world.engine.requests).sampling
    assert {name: getattr(sampling, name) for name in params} == params
    assert sampling.logit_bias == ((4, 100.0), (30, -1.5))


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"json_schema": '{"type": "object"}'}, Grammar("json_schema", '{"type": "object"}')),
        ({"regex": "a|b"}, Grammar("regex", "a|b")),
        ({"ebnf": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"ebnf": 'root ::= "a" | "b" root'}, Grammar("lark", '%llguidance {}\n\nstart: "a"\n     | "b" start\n\n')),
    ],
)
async def test_grammars_reach_the_engine(world, given, grammar):
    response = await world.post({"text": "Rome", "sampling_params": given | {"max_new_tokens": 2}})
    assert response.status_code == 200, response.text
    assert only(world.engine.requests).sampling.grammar == grammar


async def test_two_grammars_at_once_are_refused_by_name(world):
    response = await world.post({"text": "a", "sampling_params": {"regex": "a", "json_schema": "{}"}})
    assert response.status_code == 400
    assert response.json()["error"]["field"] == "sampling_params.json_schema and sampling_params.regex"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_likeliest_tokens_come_when_asked_for(world, stream):
    ids = world.tokenizer.encode(ANSWER)[:2]
    body = {"text": QUESTION, "return_logprob": True, "top_logprobs_num": 2, "sampling_params": {"max_new_tokens": 2}}
    response = await world.post(body | {"stream": stream})
    answer = read_events(response.text)[-2] if stream else response.json()
    assert answer["meta_info"]["output_top_logprobs"] == [[[-0.5, i, None], [-1.5, i + 1, None]] for i in ids]
    quiet = (await world.post({**body, "return_logprob": False})).json()
    assert not quiet["meta_info"].keys() & {"output_top_logprobs", "output_token_logprobs"}


async def test_a_stream_carries_the_text_so_far_and_ends_with_done(world):
    response = await world.post({"text": QUESTION, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *events, done = read_events(response.text)
    assert done == "[DONE]"
    texts = [event["text"] for event in events]
    assert texts[-1] == ANSWER
    assert all(ANSWER.startswith(text) for text in texts)
    num_tokens = len(world.tokenizer.encode(ANSWER)) + 1
    assert [event["meta_info"]["completion_tokens"] for event in events] == list(range(1, num_tokens + 1))
    reasons = [event["meta_info"]["finish_reason"] for event in events]
    assert reasons == [None] * (num_tokens - 1) + [{"type": "stop", "matched": END_TOKEN}]
    whole = (await world.post({"text": QUESTION})).json()
    events[-1]["meta_info"].update(id=whole["meta_info"]["id"], cached_tokens=whole["meta_info"]["cached_tokens"])
    assert events[-1] == whole


async def test_a_streamed_list_says_which_prompt_each_event_is_of(world):
    world.say("Norway", "?")
    response = await world.post({"text": [QUESTION, "Norway"], "stream": True})
    *events, done = read_events(response.text)
    assert done == "[DONE]"
    last = {event["index"]: event["text"] for event in events}
    assert last == {0: ANSWER, 1: "?"}
    num_ends = sum(event["meta_info"]["finish_reason"] is not None for event in events)
    assert num_ends == 2


async def test_many_streams_at_once_each_get_their_own_text(world):
    prompts = [f"{i} leaves" for i in range(40)]
    for i, prompt in enumerate(prompts):
        world.say(prompt, f" number {i} of the book")
    response = await world.post({"text": prompts, "stream": True})
    last = {event["index"]: event["text"] for event in read_events(response.text)[:-1]}
    assert last == {i: f" number {i} of the book" for i in range(40)}
    world.engine.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cuts_the_text_and_cancels_the_request(world, stream):
    body = {"text": "Rome", "sampling_params": {"stop": ["nothing", "af after"], "max_new_tokens": 400}}
    response = await world.post({**body, "stream": stream})
    answer = read_events(response.text)[-2] if stream else response.json()
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "af after"}
    assert BABBLE in answer["text"] + "af after it, and so on" + BABBLE
    assert answer["text"].endswith("the le")
    assert len(world.engine.cancelled) == 1
    world.engine.assert_idle()


async def test_a_stream_never_shows_a_part_of_a_stop_string(world):
    body = {"text": QUESTION, "sampling_params": {"stop": "capital of"}, "stream": True}
    *events, _ = read_events((await world.post(body)).text)
    assert not any(event["text"].endswith((" c", " ca", " cap", " capital")) for event in events[:-1])
    assert events[-1]["text"] == ANSWER  # "capital." it was, after all


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_fails_before_the_first_token_is_a_500(world, stream):
    world.engine.failing_after = 0
    response = await world.post({"text": QUESTION, "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the engine could not finish the request"


async def test_an_engine_that_fails_later_ends_the_stream_with_an_error(world):
    world.engine.failing_after = 2
    response = await world.post({"text": QUESTION, "stream": True})
    assert response.status_code == 200
    *events, error, done = read_events(response.text)
    assert (len(events), done) == (2, "[DONE]")
    assert error["error"]["code"] == 500


async def test_when_one_of_a_list_fails_the_others_are_cancelled(world):
    world.engine.failing_after = 5
    response = await world.post({"text": ["Rome", "Norway"], "sampling_params": [{"max_new_tokens": 400}] * 2})
    assert response.status_code == 500
    assert len(world.engine.cancelled) == 1
    world.engine.failing_after = None
    assert (await world.post({"text": QUESTION})).status_code == 200
    world.engine.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_without_an_engine_the_answer_is_503_with_the_reason(world, stream):
    world.engine.broken = "3 of 4 workers have loaded"
    response = await world.post({"text": QUESTION, "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "3 of 4 workers have loaded"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_of_ours_is_a_500_that_says_nothing_of_the_inside(world, monkeypatch, stream):
    async def submit(request):
        raise RuntimeError("secret")
        yield

    monkeypatch.setattr(world.engine, "submit", submit)
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        response = await client.post("/generate", json={"text": QUESTION, "stream": stream})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error"
