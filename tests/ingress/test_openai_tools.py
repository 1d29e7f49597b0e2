"""Tools: told to the template, forced by a grammar, and their calls found in the answer."""

import json

import pytest

from tests.ingress.conftest import read_named_events
from tests.ingress.openai_world import (
    ASKED,
    HERMES_TEMPLATE,
    MISTRAL_TEMPLATE,
    TIME,
    WEATHER,
    chat,
    error_of,
    prompt_text,
    said,
    say_next,
    the_request,
    world_with,
)

pytestmark = pytest.mark.anyio

ARGUMENTS = '{"city": "Oslo"}'
FORCED = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
TWO = f'So.\n<tool_call>\n{FORCED}\n</tool_call>\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
async def hermes(tmp_path):
    async with world_with(tmp_path, HERMES_TEMPLATE) as world:
        yield world


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_forced_call_is_parsed_whatever_the_template(world, choice):
    say_next(world, FORCED)
    (answer,) = (await chat(world, tools=[WEATHER], tool_choice=choice)).json()["choices"]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": ARGUMENTS})
    assert '"name":"weather"' in prompt_text(world)


async def test_a_forced_call_is_held_to_a_schema_of_all_tools(world):
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["parameters"] = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/City"}},
        "$defs": {"City": {"type": "string"}},
    }
    say_next(world, FORCED)
    response = await chat(world, tools=[TIME, tool], tool_choice="required")
    assert response.status_code == 200, response.text
    schema = json.loads(the_request(world).sampling.grammar.text)
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["time", "weather"]
    assert schema["anyOf"][1]["properties"]["arguments"]["properties"]["city"] == {
        "$ref": "#/anyOf/1/properties/arguments/$defs/City"
    }


async def test_a_named_tool_is_the_only_one_that_can_be_called(world):
    say_next(world, FORCED)
    await chat(world, tools=[TIME, WEATHER], tool_choice=NAMED)
    schema = json.loads(the_request(world).sampling.grammar.text)
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["weather"]


async def test_calls_are_found_where_the_template_defines_them(hermes):
    say_next(hermes, TWO)
    (answer,) = (await chat(hermes, tools=[WEATHER, TIME])).json()["choices"]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] == "So.\n"
    calls = answer["message"]["tool_calls"]
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls] == [
        ("weather", {"city": "Oslo"}),
        ("time", {}),
    ]
    assert len({call["id"] for call in calls}) == 2
    assert "<tools>" in prompt_text(hermes)
    assert the_request(hermes).sampling.grammar is None


async def test_an_answer_without_a_call_is_plain(hermes):
    say_next(hermes, "It is cold.")
    (answer,) = (await chat(hermes, tools=[WEATHER])).json()["choices"]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("It is cold.", "stop")
    assert "tool_calls" not in answer["message"]


async def test_without_parallel_calls_only_the_first_is_told(hermes):
    say_next(hermes, TWO)
    (answer,) = (await chat(hermes, tools=[WEATHER, TIME], parallel_tool_calls=False)).json()["choices"]
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["weather"]


def calls_of(events):
    """(id, name, arguments) of each call of a stream, put together as clients do."""
    calls = {}
    for _, data in events:
        if data == "[DONE]" or not data["choices"]:
            continue
        for delta in data["choices"][0]["delta"].get("tool_calls", ()):
            call = calls.setdefault(delta["index"], ["", "", ""])
            call[0] += delta.get("id", "")
            call[1] += delta["function"].get("name", "")
            call[2] += delta["function"].get("arguments", "")
    return [tuple(call) for _, call in sorted(calls.items())]


async def test_calls_are_streamed_name_first(hermes):
    say_next(hermes, TWO)
    whole = (await chat(hermes, tools=[WEATHER, TIME], seed=1)).json()["choices"][0]["message"]
    events = read_named_events((await chat(hermes, tools=[WEATHER, TIME], seed=1, stream=True)).text)
    told = calls_of(events)
    assert [(name, arguments) for _, name, arguments in told] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in whole["tool_calls"]
    ]
    assert said(events) == whole["content"]
    deltas = [call for _, data in events[:-1] for call in data["choices"][0]["delta"].get("tool_calls", ())]
    assert "id" in deltas[0] and deltas[0]["function"]["name"] == "weather"
    assert len([delta for delta in deltas if delta["index"] == 0]) > 2
    assert events[-2][1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_stream_of_calls_goes_on_behind_the_last_event(hermes):
    say_next(hermes, TWO)
    body = {"tools": [WEATHER, TIME], "stream": True, "seed": 1}
    named = {"x-request-id": "mine"}
    events = read_named_events((await chat(hermes, body, named)).text)
    assert len(events) > 4
    for i, (event_id, _) in enumerate(events[:-2]):
        rest = read_named_events((await chat(hermes, body, named | {"last-event-id": event_id})).text)
        assert calls_of(events[: i + 1] + rest) == calls_of(events)
        assert said(events[: i + 1] + rest) == said(events)


async def test_a_mistral_call_has_its_special_mark_and_a_short_id(tmp_path):
    async with world_with(tmp_path, MISTRAL_TEMPLATE) as world:
        say_next(world, f"[TOOL_CALLS] [{FORCED}]")
        (answer,) = (await chat(world, tools=[WEATHER])).json()["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert (call["function"]["arguments"], len(call["id"])) == (ARGUMENTS, 9)


HISTORY = [
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
]


async def test_calls_of_the_past_reach_a_template_that_knows_them(hermes):
    say_next(hermes, "It is cold.")
    await chat(hermes, messages=HISTORY, tools=[WEATHER])
    assert f"<tool_call>weather{ARGUMENTS}</tool_call>" in prompt_text(hermes)
    assert "<|im_start|>tool\ncold" in prompt_text(hermes)


async def test_calls_of_the_past_are_told_as_text_to_a_template_that_does_not(world):
    say_next(world, "It is cold.")
    response = await chat(world, messages=HISTORY)
    assert response.status_code == 200
    assert f"<|im_start|>assistant\n{FORCED}<|im_end|>" in prompt_text(world)
    assert "<|im_start|>user\ncold<|im_end|>" in prompt_text(world)


async def test_tools_that_are_not_to_be_called_are_not_told(world):
    say_next(world, "It is cold.")
    await chat(world, tools=[WEATHER], tool_choice="none")
    assert "weather" not in prompt_text(world)


async def test_a_template_without_tools_says_so(world):
    error = error_of(await chat(world, tools=[WEATHER]))
    assert error["param"] == "tools"
    assert "does not define tools" in error["message"]


BROKEN = [*ASKED, {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{"}}]}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice.function.name"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": BROKEN, "tools": [WEATHER]}, "messages[1].tool_calls[0].function.arguments"),
    ],
)
async def test_what_makes_no_sense_of_tools_is_refused(hermes, fields, param):
    assert error_of(await chat(hermes, fields))["param"] == param
