"""What the tests of OpenAI's API share."""

import json
from contextlib import asynccontextmanager

from serve_app.model.tokenizer import Tokenizer
from tests.ingress.conftest import open_world
from tests.model.families import CHAT_TEMPLATE, make_tiny_tokenizer

ASKED = [{"role": "user", "content": "What about Norway?"}]
ANSWER = "Oslo is the capital of Norway."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}

HERMES_TEMPLATE = """\
{% if tools %}
{{ '<|im_start|>system\\n<tools>' + (tools | tojson) + '</tools> <tool_call>{...}</tool_call><|im_end|>' }}
{% endif %}
{% for message in messages %}
{% if message.tool_calls %}
{% for call in message.tool_calls %}
{{ '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' }}
{% endfor %}
{% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endif %}
{% endfor %}
{{ '<|im_start|>assistant' }}
"""
MISTRAL_TEMPLATE = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]" + CHAT_TEMPLATE


def tokenizer_with(folder, template):
    make_tiny_tokenizer(folder, 400)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return Tokenizer.load(folder)


@asynccontextmanager
async def world_with(folder, template):
    """One whose model has this chat template."""
    async with open_world(tokenizer_with(folder, template)) as world:
        yield world


def say_next(world, text):
    """The answer to the next request."""
    world.engine.next_answer = world.tokenizer.encode(text)


async def chat(world, body=None, headers=None, **fields):
    return await world.client.post(
        "/v1/chat/completions", json={"messages": ASKED, **(body or {}), **fields}, headers=headers
    )


async def complete(world, headers=None, **fields):
    return await world.client.post("/v1/completions", json={"prompt": "Norway", **fields}, headers=headers)


def the_request(world):
    """The only one that the engine ever had."""
    (request,) = world.engine.requests.values()
    return request


def prompt_text(world):
    return world.tokenizer.decode(the_request(world).prompt, skip_special_tokens=False)


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def said(events):
    """The text of a stream of chat chunks of one choice."""
    choices = [data["choices"][0] for _, data in events if data != "[DONE]" and data["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)
