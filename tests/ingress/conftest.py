"""The real application over the echo engine, in memory or behind a real server on loopback."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn

from serve_app.ingress.api import create_app
from serve_app.ingress.door import Limits, ModelInfo
from serve_app.model.tokenizer import Tokenizer
from tests.ingress.echo_engine import EchoEngine
from tests.model.families import make_tiny_tokenizer

BABBLE = " and the leaf after it, and so on"


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder, 400)
    return Tokenizer.load(folder)


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://octavo")


class World:
    """One application, its engine, and a client."""

    def __init__(self, tokenizer, limits=None, **options):
        self.tokenizer = tokenizer
        self.model = ModelInfo("tiny", max_context_tokens=512, vocab_size=410, created=1_700_000_000)
        self.engine = EchoEngine(tokenizer.encode(BABBLE))
        self.app = create_app(self.engine, tokenizer, self.model, limits, **options)
        self.client = client_of(self.app)

    def say(self, prompt, answer):
        """Let the model answer the text `prompt` with the text `answer`, then end."""
        self.engine.script[tuple(self.tokenizer.encode(prompt))] = self.tokenizer.encode(answer)

    async def post(self, body, **headers):
        """POST /generate; `body` is JSON, or the bytes of what should be."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post("/generate", content=content, headers=headers)

    def replica(self, **options):
        """A client of another ingress replica with the same engine."""
        return client_of(create_app(self.engine, self.tokenizer, self.model, **options))

    async def close(self):
        await self.client.aclose()
        await self.engine.close()


@asynccontextmanager
async def open_world(tokenizer, limits=None, **options):
    world = World(tokenizer, limits, **options)
    try:
        yield world
    finally:
        await world.close()


@pytest.fixture
async def world(tokenizer):
    async with open_world(tokenizer) as world:
        yield world


@pytest.fixture
async def small_world(tokenizer):
    """One with tight limits."""
    limits = Limits(max_body_bytes=1000, max_prompts=3, max_rid_chars=8, max_stops=2, max_stop_chars=8)
    async with open_world(tokenizer, limits) as world:
        yield world


@asynccontextmanager
async def serving(world):
    """`world` behind uvicorn; yields (host, port)."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(world.app, log_level="warning", lifespan="off")
    served = uvicorn.Server(config)
    task = asyncio.ensure_future(served.serve(sockets=[listener]))
    try:
        yield listener.getsockname()
    finally:
        served.should_exit = True
        await task
        listener.close()


@pytest.fixture
async def server(world):
    async with serving(world) as address:
        yield address


def read_events(text):
    """The data of each SSE event, JSON decoded unless it is [DONE]."""
    return [data for _, data in read_named_events(text)]


def read_named_events(text):
    """The id (None where there is none) and the data of each SSE event."""
    assert text == "" or text.endswith("\n\n")
    return [read_event(block) for block in text.split("\n\n")[:-1]]


def read_event(block):
    *head, data = block.split("\n")
    assert len(head) <= 1
    assert all(line.startswith("id: ") for line in head)
    assert data.startswith("data: ")
    data = data.removeprefix("data: ")
    return head[0].removeprefix("id: ") if head else None, data if data == "[DONE]" else json.loads(data)
