"""`POST /v1/chat/completions`: what is asked reaches the engine, and is answered in OpenAI's shape."""

import json

import httpx
import pytest

from tests.ingress.conftest import read_named_events, serving
from tests.ingress.openai_world import ANSWER, ASKED, chat, error_of, prompt_text, said, say_next, the_request

pytestmark = pytest.mark.anyio


async def test_an_answer_has_openais_shape(world):
    say_next(world, ANSWER)
    response = await chat(world, model="tiny")
    assert response.status_code == 200
    body = response.json()
    num_prompt, num_new = len(the_request(world).prompt), len(world.tokenizer.encode(ANSWER)) + 1
    assert body.pop("id") == f"chatcmpl-{response.headers['x-request-id']}"
    assert body.pop("created") > 1_700_000_000
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_cached_tokens_are_counted(world):
    for seed, fewest in ((1, 0), (2, 16)):
        usage = (await chat(world, max_tokens=1, seed=seed)).json()["usage"]
        assert fewest <= usage["prompt_tokens_details"]["cached_tokens"] <= fewest * usage["prompt_tokens"]


async def test_a_prompt_counts_once_whatever_the_number_of_its_copies(world):
    body = (await chat(world, n=3, max_tokens=4)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    num_prompt = len(next(iter(world.engine.requests.values())).prompt)
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (num_prompt, 12)
    assert len({request.sampling.seed for request in world.engine.requests.values()}) == 3


async def test_every_parameter_reaches_the_engine(world):
    await chat(
        world,
        max_completion_tokens=9,
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        frequency_penalty=-2,
        presence_penalty=1.5,
        logit_bias={"7": -100, "3": 2.5},
        logprobs=True,
        top_logprobs=3,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.2,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9],
    )
    sampling = the_request(world).sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (9, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 20, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (-2.0, 1.5, 1.2)
    assert sampling.logit_bias == ((3, 2.5), (7, -100.0))
    assert (sampling.seed, sampling.logprobs, sampling.top_logprobs) == ((1 << 64) - 1, True, 3)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (9,))


async def test_defaults_are_openais(world):
    say_next(world, ANSWER)
    await chat(world)
    request = the_request(world)
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_new_tokens == 512 - len(request.prompt)  # the rest of the context
    assert not request.sampling.logprobs


async def test_roles_and_parts_reach_the_template(world):
    say_next(world, ANSWER)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "yes", "refusal": None, "annotations": []},
        {"role": "user", "content": "three"},
    ]
    await chat(world, messages=messages)
    plain = ["system\nbe brief", "user\none\ntwo", "assistant\nyes", "user\nthree"]
    assert prompt_text(world).replace("\n<|im", "<|im").startswith(
        "".join(f"<|im_start|>{text}<|im_end|>" for text in plain)
    )  # fmt: skip


async def test_a_stop_string_ends_the_answer(world):
    say_next(world, ANSWER)
    choice = (await chat(world, stop=[" capital"])).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Oslo is the", "stop")


async def test_the_limit_of_tokens_ends_the_answer(world):
    choice = (await chat(world, max_completion_tokens=3)).json()["choices"][0]
    assert choice["finish_reason"] == "length"


async def test_a_stream_tells_the_answer_bit_by_bit(world):
    say_next(world, ANSWER)
    response = await chat(world, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_named_events(response.text)
    assert events[-1] == (None, "[DONE]")
    chunks = [data for _, data in events[:-1]]
    assert said(events) == ANSWER
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{response.headers['x-request-id']}"}
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_tells_its_usage_where_it_is_asked_for(world):
    say_next(world, ANSWER)
    whole = (await chat(world, n=2, max_tokens=4)).json()["usage"]
    response = await chat(world, n=2, max_tokens=4, stream=True, stream_options={"include_usage": True})
    *events, (last_id, last), _ = read_named_events(response.text)
    assert (last_id, last["choices"]) == (None, [])
    assert {k: v for k, v in last["usage"].items() if k != "prompt_tokens_details"} == {
        k: v for k, v in whole.items() if k != "prompt_tokens_details"
    }
    assert all(chunk["usage"] is None for _, chunk in events)


@pytest.mark.parametrize("options", [{}, {"stop": "NEVER"}, {"logprobs": True, "top_logprobs": 1}, {"n": 2}])
async def test_a_stream_goes_on_behind_the_last_event_that_came(world, options):
    answer = "Oslo \N{SNOWMAN} is it: \N{EARTH GLOBE EUROPE-AFRICA}!"
    headers = {"x-request-id": "mine"}
    say_next(world, answer)
    body = {"stream": True, "seed": 1, "stream_options": {"include_usage": True}, "max_tokens": 40, **options}
    first = read_named_events((await chat(world, body, headers)).text)
    whole = chunks_by_choice(first)
    assert len(first) > 4
    for event_id, _ in first[:-2]:
        again = await chat(world, body, headers | {"last-event-id": event_id})
        rest = chunks_by_choice(read_named_events(again.text))
        counts = [int(count) for count in event_id.split(",")]
        for index, count in enumerate(counts):
            before = [told for told in whole[index] if told[0] <= count]
            assert content_of(before + rest[index]) == content_of(whole[index])
            assert all(seen > count for seen, _ in rest[index])
            assert sum("role" in choice["delta"] for _, choice in before + rest[index]) == 1


def chunks_by_choice(events):
    """Per choice (number of its tokens, chunk)."""
    told = {0: [], 1: []}
    for event_id, data in events:
        if event_id is not None and data != "[DONE]":
            (choice,) = data["choices"]
            told[choice["index"]].append((int(event_id.split(",")[choice["index"]]), choice))
    return told


def content_of(told):
    choices = [choice for _, choice in told]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    tokens = [entry["token"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    return text, tokens, [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


async def test_logprobs_are_told_with_bytes(world):
    say_next(world, "Oslo \N{SNOWMAN}")
    body = (await chat(world, logprobs=True, top_logprobs=2)).json()
    entries = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "Oslo \N{SNOWMAN}"
    for entry in entries:
        assert entry["logprob"] == -0.5
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]


async def test_streamed_logprobs_are_those_of_the_whole(world):
    say_next(world, ANSWER)
    whole = (await chat(world, logprobs=True, seed=1)).json()["choices"][0]["logprobs"]["content"]
    events = read_named_events((await chat(world, logprobs=True, seed=1, stream=True)).text)
    parts = [entry for _, data in events[:-1] for entry in data["choices"][0]["logprobs"]["content"]]
    assert parts == whole


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": CITY}}},
            "json_schema",
            CITY,
        ),
        ({"guided_json": CITY}, "json_schema", CITY),
        ({"structured_outputs": {"json": json.dumps(CITY)}}, "json_schema", CITY),
        ({"guided_regex": "[a-z]+"}, "regex", "[a-z]+"),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        ({"guided_choice": ["yes", 'n"o']}, "lark", 'start: "yes" | "n\\"o"'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
    ],
)
async def test_a_format_reaches_the_engine_as_a_grammar(world, fields, kind, text):
    say_next(world, "{}")
    response = await chat(world, fields)
    assert response.status_code == 200, response.text
    grammar = the_request(world).sampling.grammar
    assert grammar.kind == kind
    assert (json.loads(grammar.text) if kind == "json_schema" else grammar.text) == text


async def test_plain_text_has_no_grammar(world):
    say_next(world, ANSWER)
    await chat(world, response_format={"type": "text"})
    assert the_request(world).sampling.grammar is None


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"messages": []}, "messages"),
        ({"messages": IMAGE}, "messages[0].content[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10_000}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logit_bias": {"9": 101}}, "logit_bias[...]"),
        ({"stop": ["", "x"]}, "stop"),
        ({"seed": 1 << 64}, "seed"),
        ({"min_tokens": 600}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "x"}, "response_format and guided_*"),
        ({"structured_outputs": {"regex": "x"}, "guided_regex": "x"}, "guided_regex and structured_outputs.regex"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_refused_by_its_field(world, fields, param):
    error = error_of(await chat(world, fields))
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not world.engine.requests


async def test_hints_are_accepted_and_ignored(world):
    say_next(world, ANSWER)
    hints = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "reasoning_effort": "low",
        "verbosity": "low",
        "priority": 3,
        "prediction": {"type": "content", "content": "x"},
        "modalities": ["text"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    response = await chat(world, hints)
    assert response.json()["choices"][0]["message"]["content"] == ANSWER


async def test_another_model_is_not_found(world):
    error = error_of(await chat(world, model="gpt-4o"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_nesting_too_deep_is_refused(world):
    deep = "[" * 3000 + "]" * 3000
    tool = f'{{"type":"function","function":{{"name":"f","parameters":{{"a":{deep}}}}}}}'
    body = f'{{"messages":[{{"role":"user","content":"x"}}],"tools":[{tool}],"tool_choice":"required"}}'
    response = await world.client.post("/v1/chat/completions", content=body)
    assert error_of(response)["param"]


async def test_the_body_of_a_fault_is_openais_for_any_fault(world, small_world):
    assert error_of(await small_world.client.post("/v1/chat/completions", content=b" " * 2000), 413)["code"]
    world.engine.broken = "it is away"
    assert error_of(await chat(world), 503)["code"] == "engine_unavailable"
    assert error_of(await chat(world, stream=True), 503)["type"] == "service_unavailable"
    world.engine.broken = ""
    world.engine.failing_after = 2
    assert error_of(await chat(world), 500)["type"] == "server_error"
    events = read_named_events((await chat(world, stream=True)).text)
    assert events[-2][1]["error"]["type"] == "server_error"


async def test_an_aborted_stream_ends_with_an_error_event(world):
    async with serving(world) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        world.engine.hold_after = 3
        body = {"messages": ASKED, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200  # its first event is out
            await world.engine.abort("")
            events = read_named_events((await response.aread()).decode())
    assert said(events[:-2])
    assert events[-2][1]["error"]["code"] == "aborted"
