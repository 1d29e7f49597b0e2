"""The ingress' world, and servers that break connections or live in a thread of their own."""

import asyncio
import queue
import socket
import threading
from contextlib import contextmanager

import pytest
import uvicorn

from tests.ingress.conftest import anyio_backend, open_world, server, tokenizer, world

__all__ = ["anyio_backend", "server", "tokenizer", "world"]


@pytest.fixture
def url(server):
    return "http://{}:{}".format(*server)


@pytest.fixture
def threaded(tokenizer):
    """A world behind a server, in a thread of its own; yields (world, url)."""
    with _in_thread(tokenizer) as found:
        yield found


@contextmanager
def _in_thread(tokenizer):
    found = queue.Queue()

    async def serve(listener):
        async with open_world(tokenizer) as world:
            served = uvicorn.Server(uvicorn.Config(world.app, log_level="warning", lifespan="off"))
            found.put((world, served))
            await served.serve(sockets=[listener])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=asyncio.run, args=(serve(listener),))
        thread.start()
        world, served = found.get(timeout=30)
        try:
            yield world, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            served.should_exit = True
            thread.join()
