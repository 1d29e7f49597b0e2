"""Whatever is sent, the answer is a 4xx that names the field, in the dialect's shape: never a 5xx, never silence."""

import asyncio
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.ingress import api
from serve_app.ingress.door import Limits
from tests.ingress.conftest import open_world

pytestmark = pytest.mark.anyio

PARAMS = "sampling_params"

# name -> (body, the field that the error names)
SGLANG = {
    "no prompt": ({}, "text"),
    "null prompt": ({"text": None}, "text"),
    "only parameters": ({PARAMS: {}}, "text"),
    "empty text": ({"text": ""}, "text"),
    "empty list": ({"text": []}, "text"),
    "empty text in a list": ({"text": ["a", ""]}, "text[1]"),
    "number as text": ({"text": 5}, "text"),
    "number in a list of texts": ({"text": ["a", 5]}, "text[1]"),
    "both prompts": ({"text": "a", "input_ids": [1]}, "input_ids and text"),
    "no ids": ({"input_ids": []}, "input_ids"),
    "no ids in a list": ({"input_ids": [[1], []]}, "input_ids[1]"),
    "ids and lists of ids": ({"input_ids": [1, [2]]}, "input_ids"),
    "id as text": ({"input_ids": [1, "2"]}, "input_ids[1]"),
    "id as float": ({"input_ids": [1.5]}, "input_ids[0]"),
    "id outside the vocabulary": ({"input_ids": [1, 410]}, "input_ids"),
    "negative id": ({"input_ids": [[1], [-1]]}, "input_ids[1]"),
    "huge id": ({"input_ids": [10**25]}, "input_ids"),
    "no messages": ({"messages": []}, "messages"),
    "no messages in a list": ({"messages": [[]]}, "messages[0]"),
    "message without a role": ({"messages": [{"content": "hi"}]}, "messages"),
    "message of an unknown role": ({"messages": [{"role": "king", "content": "hi"}]}, "messages"),
    "message with a number": ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    "text as messages": ({"messages": "hi"}, "messages"),
    "unknown field": ({"text": "a", "colour": 1}, "colour"),
    "unknown sampling param": ({"text": "a", PARAMS: {"colour": 1}}, "sampling_params.colour"),
    "unknown sampling param in a list": ({"text": ["a"], PARAMS: [{"colour": 1}]}, "sampling_params[0].colour"),
    "sampling params of another count": ({"text": ["a", "b"], PARAMS: [{}]}, "sampling_params"),
    "sampling params as text": ({"text": "a", PARAMS: "hot"}, "sampling_params"),
    "stream as text": ({"text": "a", "stream": "yes"}, "stream"),
    "prompt as long as the context": ({"input_ids": [5] * 512}, "input_ids"),
    "prompt and answer over the context": (
        {"input_ids": [5] * 500, PARAMS: {"max_new_tokens": 13}},
        "sampling_params.max_new_tokens",
    ),
    "empty rid": ({"text": "a", "rid": ""}, "rid"),
    "number as rid": ({"text": "a", "rid": 5}, "rid"),
    "over-long rid": ({"text": "a", "rid": "r" * 257}, "rid"),
    "rids of another count": ({"text": ["a", "b"], "rid": ["r"]}, "rid"),
    "rid twice": ({"text": ["a", "b"], "rid": ["r", "r"]}, "rid"),
    "too many prompts": ({"text": ["a"] * 257}, "text"),
    "too many copies": ({"text": "a", PARAMS: {"n": 257}}, "sampling_params.n"),
    "images": ({"text": "a", "image_data": "x"}, "image_data"),
    "top logprobs": ({"text": "a", "top_logprobs_num": 21}, "top_logprobs_num"),
    "fewer than no top logprobs": ({"text": "a", "top_logprobs_num": -1}, "top_logprobs_num"),
}
SGLANG_SAMPLING = {
    "max_new_tokens": [0, -1, 10**6, 10**30, 1.5, "5", True, [1]],
    "min_new_tokens": [-1, 129],
    "temperature": [-0.1, 101, "hot", True],
    "top_p": [0, -0.1, 1.1, "x"],
    "top_k": [-2, 1.5, "x", -(10**30)],
    "min_p": [-0.1, 1.1],
    "stop": ["", [""], ["a"] * 17, "x" * 257, 5, [5]],
    "stop_token_ids": [[410], [-1], ["a"], 5, [5] * 65],
    "ignore_eos": [1, "no"],
    "sampling_seed": [-1, 2**64, 0.5, "x"],
    "n": [0, -1, 1.5, 10**30],
    "frequency_penalty": [-2.1, 2.1, "x"],
    "presence_penalty": [-2.1, 2.1, 10**30],
    "repetition_penalty": [0, -1, 2.1, "x"],
    "logit_bias": [{"410": 1}, {"-1": 1}, {"a": 1}, {"٣": 1}, {"9" * 40: 1}, {"1": 101}, {"1": "x"}, [1], {"1": None}],
    "json_schema": ["{", '{"type": "strin"}', {"type": "object"}, "x" * 70_000],
    "regex": ["a(", "(?=a)", 5],
    "ebnf": ["root ::= b", "start ::= 5", "root ::= " + "(" * 5000, "#" * 9000, ""],
    "structural_tag": ["{}"],
    "no_stop_trim": [True],
}
TGI = {
    "empty": ({"inputs": ""}, "inputs"),
    "number": ({"inputs": 5}, "inputs"),
    "list": ({"inputs": ["a"]}, "inputs"),
    "unknown field": ({"inputs": "a", "colour": 1}, "colour"),
    "unknown parameter": ({"inputs": "a", "parameters": {"colour": 1}}, "parameters.colour"),
    "sampling params": ({"inputs": "a", PARAMS: {}}, "sampling_params"),
    "parameters as list": ({"inputs": "a", "parameters": []}, "parameters"),
}
TGI_PARAMETERS = {
    "max_new_tokens": [0, -1, 10**6, 10**30, 1.5, "5"],
    "temperature": [0, -1, 101, "hot"],
    "top_k": [0, -1, 0.5],
    "top_p": [0, 1.1],
    "seed": [-1, 2**64, "x"],
    "stop": [["a"] * 5, [""], "a", [5]],
    "truncate": [0, -1, 513, "x"],
    "do_sample": ["yes", 1],
    "typical_p": [0.5],
    "repetition_penalty": [0, -1, 1000],
    "frequency_penalty": [-2.1, 2.1, "x"],
    "best_of": [2],
    "top_n_tokens": [6, -1, "x"],
    "grammar": [
        5,
        {"type": "json"},
        {"type": "xml", "value": "a"},
        {"type": "json", "value": 5},
        {"type": "json", "value": {"type": "strin"}},
        {"type": "json_schema", "value": "{"},
        {"type": "regex", "value": "a("},
        {"type": "regex", "value": {}},
    ],
    "decoder_input_details": [True],
    "watermark": [True],
}


@pytest.mark.parametrize("name", SGLANG)
async def test_sglang_refuses_with_400_and_the_field(world, name):
    body, field = SGLANG[name]
    await assert_sglang_refuses(world, body, field)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in SGLANG_SAMPLING.items() for value in bad])
async def test_sglang_refuses_sampling_params_with_400_and_the_field(world, name, value):
    await assert_sglang_refuses(world, {"text": "a", PARAMS: {name: value}}, f"{PARAMS}.{name}")


@pytest.mark.parametrize("name", TGI)
async def test_tgi_refuses_with_422_and_the_field(world, name):
    body, field = TGI[name]
    await assert_tgi_refuses(world, body, field)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in TGI_PARAMETERS.items() for value in bad])
async def test_tgi_refuses_parameters_with_422_and_the_field(world, name, value):
    await assert_tgi_refuses(world, {"inputs": "a", "parameters": {name: value}}, f"parameters.{name}")


async def assert_sglang_refuses(world, body, field):
    for stream in ({}, {"stream": True}):
        response = await world.post(stream | body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["field"].split("[")[0] == field.split("[")[0]
        assert error["field"].startswith(field)
        assert error["message"].startswith(field)
        assert len(error["message"]) < 300
    assert not world.engine.requests


async def assert_tgi_refuses(world, body, field):
    response = await world.post(body)
    assert response.status_code == 422, response.text
    error = response.json()
    assert error["error_type"] == "validation"
    assert error["field"].startswith(field)
    assert error["error"].startswith(f"Input validation error: {field}")
    assert not world.engine.requests


@pytest.mark.parametrize("prompt", ["text", "input_ids", "messages"])
async def test_two_dialects_at_once_are_refused_by_name(world, prompt):
    response = await world.post({prompt: "a", "inputs": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["field"] == " and ".join(sorted([prompt, "inputs"]))


NOT_JSON = {
    "empty": b"",
    "cut": b'{"text": "a"',
    "two values": b"{} {}",
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "words": b"text=a",
    "bytes": b"\xff\xfe\x00",
    "byte order mark": b'\xef\xbb\xbf{"text": "a"}',
    "deep": b"[" * 100_000,
    "deep and closed": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep in a field for anything": b'{"text": "a", "image_data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"text": "a", "image_data": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "endless number": b'{"input_ids": [' + b"9" * 100_000 + b"]}",
}


@pytest.mark.parametrize("name", NOT_JSON)
async def test_what_is_no_json_object_is_a_400(world, name):
    response = await world.post(NOT_JSON[name])
    assert response.status_code == 400, response.text
    assert response.json()["error"]["field"]
    assert len(response.content) < 600


ONE_LEAF = {
    "not a number": (b'{"text": "a", "sampling_params": {"temperature": NaN}}', "sampling_params.temperature"),
    "infinity": (b'{"text": "a", "sampling_params": {"top_p": -Infinity}}', "sampling_params.top_p"),
    "over the floats": (b'{"text": "a", "sampling_params": {"top_p": 1e999}}', "sampling_params.top_p"),
    "lone surrogate": (rb'{"text": "a\ud800"}', "text"),
    "low surrogate first": (rb'{"text": ["a", "\udc00\ud800"]}', "text[1]"),
    "surrogate in a message": (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', "messages[0].content"),
    "surrogate in a stop": (rb'{"text": "a", "sampling_params": {"stop": "\uDFFF"}}', "sampling_params.stop"),
    "surrogate in a name": (rb'{"text": "a", "b\ud800": 1}', "b?"),
    "stray byte": (b'{"text": "a\xff"}', "text"),
    "latin-1": ('{"text": "déjà"}'.encode("latin-1"), "text"),
    "overlong utf-8": (b'{"text": "\xc0\xaf"}', "text"),
    "surrogate as utf-8": (b'{"text": "\xed\xa0\x80"}', "text"),
}


@pytest.mark.parametrize("name", ONE_LEAF)
async def test_one_bad_value_in_json_is_named(world, name):
    body, field = ONE_LEAF[name]
    response = await world.post(body)
    assert response.status_code == 400
    assert response.json()["error"]["field"] == field


async def test_bad_text_of_tgi_is_refused_in_its_shape(world):
    response = await world.post(b'{"inputs": "a\xff"}')
    assert response.status_code == 422
    assert response.json()["field"] == "inputs"


async def test_a_pair_of_surrogates_is_a_character(world):
    assert (await world.post(rb'{"text": "\ud83d\ude00"}')).status_code == 200


async def test_a_body_over_the_limit_is_a_413_by_its_length(small_world):
    response = await small_world.post({"text": "a" * 1000})
    assert response.status_code == 413
    assert response.json()["error"]["field"] == "body"


async def test_a_body_over_the_limit_is_a_413_while_it_is_read(small_world):
    num_read = 0

    async def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield b" " * 100

    response = await small_world.client.post("/generate", content=endless())
    assert response.status_code == 413
    assert num_read <= 12


@pytest.mark.parametrize("body", [b'{"text": 5, "rid": "%s"}', b'{"text": NaN, "rid": "%s"}', b'{"%s"'])
async def test_a_large_body_is_read_beside_the_event_loop(world, body, monkeypatch):
    readers = []

    def read(body):
        readers.append(threading.current_thread())
        return set_fields(body)

    set_fields = api.set_fields
    monkeypatch.setattr(api, "set_fields", read)
    for num_chars in (1, 1 << 16):
        assert (await world.post(body % (b"a" * num_chars))).status_code == 400
    small, large = readers
    assert small is threading.main_thread()
    assert large is not threading.main_thread()


async def test_the_content_length_may_be_nonsense(world):
    for length in ("-1", "abc", "9" * 100, "٣"):
        response = await world.client.post(
            "/generate", content=b'{"text": ""}', headers=[(b"content-length", length.encode())]
        )
        assert response.status_code in {400, 413}


async def test_limits_are_the_operators(small_world):
    assert (await small_world.post({"text": ["a"] * 4})).status_code == 400
    assert (await small_world.post({"text": "a", "rid": "r" * 9})).status_code == 400
    assert (await small_world.post({"text": "a", PARAMS: {"stop": ["a"] * 3}})).status_code == 400
    assert (await small_world.post({"text": "a", PARAMS: {"stop": "a" * 9}})).status_code == 400
    assert (await small_world.post({"text": ["a"] * 3, "rid": "r" * 6})).status_code == 200


async def test_the_content_type_does_not_matter(world):
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "x"):
        assert (await world.post({"text": "a"}, **{"content-type": content_type})).status_code == 200


async def test_a_rid_that_is_running_is_refused_and_free_again_afterwards(world):
    world.engine.running.clear()
    first = asyncio.ensure_future(world.post({"text": "a", "rid": "mine"}))
    await world.engine.submitted.wait()
    for stream in (False, True):
        again = await world.post({"text": "a", "rid": "mine", "stream": stream})
        assert (again.status_code, again.json()["error"]["field"]) == (400, "rid")
    world.engine.running.set()
    assert (await first).status_code == 200
    assert (await world.post({"text": "a", "rid": "mine"})).status_code == 200


async def test_unknown_paths_and_methods_are_json(world):
    response = await world.client.get("/nowhere")
    assert (response.status_code, response.json()["error"]["message"]) == (404, "Not Found: GET /nowhere")
    response = await world.client.get("/generate")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == 405


# -- anything at all ------------------------------------------------------------------------------------------------

LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["a", 1, 0.5])
)
ANYTHING = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "name"]), st.sampled_from(["user", "hi"]) | ANYTHING)
SAMPLING = st.dictionaries(st.sampled_from([*SGLANG_SAMPLING, *TGI_PARAMETERS, "details", "x"]), ANYTHING, max_size=3)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(max_size=5) | ANYTHING,
        "input_ids": st.lists(st.integers(-1, 500), max_size=4) | ANYTHING,
        "messages": st.lists(MESSAGE, max_size=3) | ANYTHING,
        "inputs": st.text(max_size=5) | ANYTHING,
        PARAMS: SAMPLING | st.lists(SAMPLING, max_size=2) | ANYTHING,
        "parameters": SAMPLING | ANYTHING,
        "rid": ANYTHING,
        "stream": st.booleans() | ANYTHING,
        "return_logprob": ANYTHING,
        "x": ANYTHING,
    },
)
BODIES = FIELDS.map(lambda fields: json.dumps(fields).encode()) | st.binary(max_size=40)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies=st.lists(BODIES, min_size=1, max_size=8))
def test_no_body_makes_a_5xx_or_leaves_anything_behind(tokenizer, bodies):
    async def send_all():
        async with open_world(tokenizer, Limits(max_prompts=4)) as world:
            for body in bodies:
                response = await world.post(body)
                assert response.status_code in {200, 400, 422}, (body, response.text)
                assert response.status_code != 200 or '"error"' not in response.text, body
            world.engine.assert_idle()

    asyncio.run(send_all())
