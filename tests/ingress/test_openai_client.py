"""The `openai` Python client, unchanged, against a live server."""

import json
import time

import httpx
import openai
import pydantic
import pytest

from serve_app.ingress.faults import RefusedError
from tests.ingress.openai_world import ANSWER, ASKED, WEATHER, say_next, the_request

pytestmark = pytest.mark.anyio

FORCED = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def url_of(server):
    host, port = server
    return f"http://{host}:{port}/v1"


@pytest.fixture
async def client(server):
    async with openai.AsyncOpenAI(base_url=url_of(server), api_key="none", max_retries=0) as client:
        yield client


async def test_chat(world, client):
    say_next(world, ANSWER)
    completion = await client.chat.completions.create(model="tiny", messages=ASKED)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == len(world.tokenizer.encode(ANSWER)) + 1
    assert completion.usage.prompt_tokens_details.cached_tokens == 0
    assert completion.id == f"chatcmpl-{completion._request_id}"


async def test_chat_as_a_stream_with_usage(world, client):
    say_next(world, ANSWER)
    stream = await client.chat.completions.create(
        model="tiny", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


async def test_the_stream_helper_puts_the_answer_together(world, client):
    say_next(world, FORCED)
    tool = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # it takes no others
    async with client.chat.completions.stream(
        model="tiny", messages=ASKED, tools=[tool], tool_choice="required"
    ) as stream:
        completion = await stream.get_final_completion()
    (call,) = completion.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert completion.choices[0].finish_reason == "tool_calls"


async def test_tools(world, client):
    say_next(world, FORCED)
    completion = await client.chat.completions.create(
        model="tiny", messages=ASKED, tools=[WEATHER], tool_choice="required"
    )
    message = completion.choices[0].message
    assert message.tool_calls[0].function.arguments == '{"city": "Oslo"}'
    say_next(world, "It is cold.")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "cold"}
    completion = await client.chat.completions.create(
        model="tiny", messages=[*ASKED, message, result], tools=[WEATHER], tool_choice="none"
    )
    assert completion.choices[0].message.content == "It is cold."


class City(pydantic.BaseModel):
    name: str
    inhabitants: int


async def test_a_schema_is_parsed_into_a_model(world, client):
    say_next(world, '{"name": "Oslo", "inhabitants": 700000}')
    completion = await client.chat.completions.parse(model="tiny", messages=ASKED, response_format=City)
    assert completion.choices[0].message.parsed == City(name="Oslo", inhabitants=700_000)
    grammar = the_request(world).sampling.grammar
    assert grammar.kind == "json_schema"
    assert set(json.loads(grammar.text)["properties"]) == {"name", "inhabitants"}


async def test_copies_stop_strings_and_logprobs(world, client):
    say_next(world, ANSWER)
    completion = await client.chat.completions.create(
        model="tiny", messages=ASKED, n=2, stop=[" of"], logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.message.content for choice in completion.choices] == ["Oslo is the capital"] * 2
    content = completion.choices[1].logprobs.content
    assert content[0].token == content[0].top_logprobs[0].token
    assert bytes(content[0].bytes).decode() == content[0].token


async def test_completions(world, client):
    world.say("Norway", " is far")
    completion = await client.completions.create(model="tiny", prompt="Norway", logprobs=1, echo=False)
    assert completion.choices[0].text == " is far"
    assert completion.choices[0].logprobs.token_logprobs[0] == -0.5
    stream = await client.completions.create(model="tiny", prompt="Norway", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == " is far"


async def test_models(client):
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "octavo"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4o")


async def test_errors_have_the_clients_own_kinds(world, client):
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="tiny", messages=ASKED, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-4o", messages=ASKED)
    assert missing.value.code == "model_not_found"
    world.engine.broken = "it is away"
    with pytest.raises(openai.InternalServerError) as away:
        await client.chat.completions.create(model="tiny", messages=ASKED)
    assert away.value.status_code == 503


async def test_an_error_amid_a_stream_is_raised(world, client):
    world.engine.failing_after = 2
    stream = await client.chat.completions.create(model="tiny", messages=ASKED, stream=True)
    with pytest.raises(openai.APIError, match="could not finish"):
        async for _ in stream:
            pass


async def test_a_refusal_is_a_rate_limit_and_tells_when_to_come_back(world, client):
    world.engine.refusing = [RefusedError("ttft", "too much is queued", 7.2)]
    with pytest.raises(openai.RateLimitError) as refused:
        await client.chat.completions.create(model="tiny", messages=ASKED)
    assert refused.value.code == "ttft"
    assert refused.value.response.headers["retry-after"] == "8"
    assert refused.value.response.headers["x-llm-d-request-dropped-reason"] == "ttft"


async def test_the_clients_retry_waits_as_long_as_it_was_told(world, client):
    world.engine.refusing = [RefusedError("ttft", "too much is queued", 0.8)]
    say_next(world, ANSWER)
    began_s = time.monotonic()
    completion = await client.with_options(max_retries=1).chat.completions.create(model="tiny", messages=ASKED)
    assert completion.choices[0].message.content == ANSWER
    assert time.monotonic() - began_s >= 1.0  # a whole second, rounded up; its own first pause would be half a one


async def test_a_client_that_times_out_leaves_nothing_running(world, client):
    world.engine.running.clear()
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=httpx.Timeout(5, read=0.05)).chat.completions.create(
            model="tiny", messages=ASKED
        )
    await world.engine.was_cancelled.wait()
    world.engine.running.set()
    await client.completions.create(model="tiny", prompt="Rome")  # by its answer the step that was held is done
    world.engine.assert_idle()
