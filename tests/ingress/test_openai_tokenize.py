"""`/tokenize`, `/detokenize` and `/v1/models`."""

import pytest

from tests.ingress.openai_world import ASKED, error_of

pytestmark = pytest.mark.anyio

TEXT = "Norway \N{SNOWMAN}"


async def test_a_text_becomes_tokens_and_a_text_again(world):
    response = await world.client.post("/tokenize", json={"model": "tiny", "prompt": TEXT})
    tokens = world.tokenizer.encode(TEXT)
    assert response.json() == {"count": len(tokens), "max_model_len": 512, "tokens": tokens, "token_strs": None}
    back = await world.client.post("/detokenize", json={"tokens": tokens})
    assert back.json() == {"prompt": TEXT}


async def test_tokens_are_named_where_that_is_asked_for(world):
    body = (await world.client.post("/tokenize", json={"prompt": "a\n", "return_token_strs": True})).json()
    assert body["token_strs"] == ["a", "\u010a"]


async def test_messages_become_the_prompt_that_chat_would_send(world):
    body = (await world.client.post("/tokenize", json={"messages": ASKED})).json()
    assert body["tokens"] == world.tokenizer.encode_chat(ASKED)
    closed = (await world.client.post("/tokenize", json={"messages": ASKED, "add_generation_prompt": False})).json()
    assert closed["tokens"] == world.tokenizer.encode_chat(ASKED, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": ASKED}, "prompt and messages"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
async def test_what_cannot_be_read_is_refused_by_its_field(world, path, body, param):
    assert error_of(await world.client.post(path, json=body))["param"] == param


async def test_a_body_over_the_limit_is_refused(small_world):
    error_of(await small_world.client.post("/tokenize", json={"prompt": "x" * 2000}), 413)


async def test_the_model_is_listed_and_found_by_its_name(world):
    card = {"id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "octavo", "max_model_len": 512}
    assert (await world.client.get("/v1/models")).json() == {"object": "list", "data": [card]}
    assert (await world.client.get("/v1/models/tiny")).json() == card
    assert error_of(await world.client.get("/v1/models/some/other"), 404)["code"] == "model_not_found"
