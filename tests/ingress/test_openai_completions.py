"""`POST /v1/completions`: one prompt or several, in OpenAI's shape."""

import pytest

from tests.ingress.conftest import read_named_events
from tests.ingress.openai_world import complete, error_of, the_request

pytestmark = pytest.mark.anyio

ANSWER = " is far \N{SNOWMAN}!"


@pytest.fixture(autouse=True)
def knowledge(world):
    world.say("Norway", ANSWER)
    world.say("Rome", " is near")


async def test_an_answer_has_openais_shape(world):
    response = await complete(world, model="tiny")
    body = response.json()
    num_prompt, num_new = len(the_request(world).prompt), len(world.tokenizer.encode(ANSWER)) + 1
    assert body.pop("id") == f"cmpl-{response.headers['x-request-id']}"
    assert body.pop("created") > 1_700_000_000
    assert body.pop("system_fingerprint")
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_sixteen_tokens_are_the_default(world):
    body = (await complete(world, prompt="a leaf")).json()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


async def test_prompts_come_as_texts_and_as_token_ids(world):
    norway, rome = world.tokenizer.encode("Norway"), world.tokenizer.encode("Rome")
    texts = [ANSWER, " is near"]
    for prompt, count in (("Norway", 1), (["Norway", "Rome"], 2), (norway, 1), ([norway, rome], 2)):
        body = (await complete(world, prompt=prompt)).json()
        assert [choice["text"] for choice in body["choices"]] == texts[:count]
        assert body["usage"]["prompt_tokens"] == len(norway) + (count == 2) * len(rome)


async def test_copies_stand_side_by_side(world):
    body = (await complete(world, prompt=["Norway", "Rome"], n=2, best_of=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == [ANSWER, ANSWER, " is near", " is near"]
    assert body["usage"]["prompt_tokens"] == sum(len(world.tokenizer.encode(text)) for text in ("Norway", "Rome"))


async def test_an_echo_stands_before_the_answer(world):
    for prompt in ("Norway", world.tokenizer.encode("Norway")):
        assert (await complete(world, prompt=prompt, echo=True)).json()["choices"][0]["text"] == "Norway" + ANSWER
    events = read_named_events((await complete(world, echo=True, stream=True)).text)
    assert text_of(events) == "Norway" + ANSWER


def text_of(events, index=0):
    choices = [data["choices"][0] for _, data in events if data != "[DONE]" and data["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


async def test_a_stream_tells_all_and_its_usage(world):
    fields = {"prompt": ["Norway", "Rome"], "stream": True, "stream_options": {"include_usage": True}}
    events = read_named_events((await complete(world, **fields)).text)
    assert (text_of(events, 0), text_of(events, 1)) == (ANSWER, " is near")
    assert events[-1] == (None, "[DONE]")
    assert events[-2][1]["choices"] == []
    num_new = sum(len(world.tokenizer.encode(text)) + 1 for text in (ANSWER, " is near"))
    assert events[-2][1]["usage"]["completion_tokens"] == num_new
    assert all(data["usage"] is None for _, data in events[:-2])


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"logprobs": 1}])
async def test_a_stream_goes_on_behind_the_last_event_that_came(world, options):
    fields = {"stream": True, "seed": 3, **options}
    events = read_named_events((await complete(world, {"x-request-id": "mine"}, **fields)).text)
    assert len(events) > 4
    for i, (event_id, _) in enumerate(events[:-2]):
        headers = {"x-request-id": "mine", "last-event-id": event_id}
        rest = read_named_events((await complete(world, headers, **fields)).text)
        assert text_of(events[: i + 1] + rest) == text_of(events)
        assert tokens_of(events[: i + 1] + rest) == tokens_of(events)


def tokens_of(events):
    """(token, offset, top) of all tokens that a stream tells the log-probabilities of."""
    told = [data["choices"][0]["logprobs"] for _, data in events if data != "[DONE]"]
    return [
        entry
        for logprobs in told
        if logprobs
        for entry in zip(logprobs["tokens"], logprobs["text_offset"], logprobs["top_logprobs"], strict=True)
    ]


async def test_logprobs_have_the_old_form(world):
    logprobs = (await complete(world, logprobs=2)).json()["choices"][0]["logprobs"]
    num_tokens = len(world.tokenizer.encode(ANSWER))
    assert {len(values) for values in logprobs.values()} == {num_tokens}
    assert logprobs["token_logprobs"] == [-0.5] * num_tokens
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.5
        assert len(top) == 2
    whole = "".join(token for token in logprobs["tokens"] if not token.startswith("bytes:"))
    assert whole == ANSWER.replace("\N{SNOWMAN}", "")
    assert [token for token in logprobs["tokens"] if token.startswith("bytes:")] == [
        f"bytes:\\x{byte:02x}" for byte in "\N{SNOWMAN}".encode()
    ]


async def test_no_top_logprobs_leave_the_chosen_one(world):
    logprobs = (await complete(world, logprobs=0)).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {logprobs["tokens"][0]: -0.5}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[1], [500]]}, "prompt[1]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 3}, "n"),
        ({"messages": []}, "messages"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_its_field(world, fields, param):
    assert error_of(await complete(world, **fields))["param"] == param
    assert not world.engine.requests
