"""Other people's clients that speak OpenAI's API: one call each, against a live server.

They are heavy to import, so each is imported by its own test.
"""

import asyncio

import pydantic
import pytest

from tests.ingress.openai_world import ANSWER, say_next

pytestmark = pytest.mark.anyio

QUESTION = "What about Norway?"


def url_of(server):
    host, port = server
    return f"http://{host}:{port}/v1"


async def test_langchain(world, server):
    langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain_openai.ChatOpenAI(model="tiny", base_url=url_of(server), api_key="none", max_retries=0)
    say_next(world, ANSWER)
    assert (await model.ainvoke(QUESTION)).content == ANSWER
    say_next(world, ANSWER)
    assert "".join([chunk.content async for chunk in model.astream(QUESTION)]) == ANSWER


@pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning")  # pydantic, of types of its
async def test_litellm(world, server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices from the internet
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    say_next(world, ANSWER)
    answer = await litellm.acompletion(
        model="openai/tiny",
        api_base=url_of(server),
        api_key="none",
        messages=[{"role": "user", "content": QUESTION}],
        max_retries=0,
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage.completion_tokens == len(world.tokenizer.encode(ANSWER)) + 1


class City(pydantic.BaseModel):
    """A city."""

    name: str
    inhabitants: int


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
async def test_instructor(world, server, mode):
    instructor = pytest.importorskip("instructor", reason="instructor is not installed")
    openai = pytest.importorskip("openai")
    arguments = '{"name": "Oslo", "inhabitants": 700000}'
    say_next(world, f'{{"name": "City", "arguments": {arguments}}}' if mode == "TOOLS" else arguments)
    async with openai.AsyncOpenAI(base_url=url_of(server), api_key="none", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode[mode])
        city = await asyncio.wait_for(
            client.chat.completions.create(
                model="tiny", response_model=City, messages=[{"role": "user", "content": QUESTION}], max_retries=0
            ),
            30,
        )
    assert city.model_dump() == {"name": "Oslo", "inhabitants": 700_000}
