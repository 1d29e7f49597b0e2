"""The real application over the echo engine, behind a real server, is what a load test has here to load."""

from tests.ingress.conftest import anyio_backend, server, tokenizer, world

__all__ = ["anyio_backend", "server", "tokenizer", "world"]
