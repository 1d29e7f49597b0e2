"""Whether a server is at rest: the next run is to begin with an empty queue."""

import asyncio

import httpx
import msgspec

POLL_S = 0.5
TIMEOUT_S = 5.0


class _Stats(msgspec.Struct, frozen=True):
    running: int
    waiting: int


class _Health(msgspec.Struct, frozen=True):
    """Of an Octavo server's `/health`, what matters here. Other servers say other things, or nothing."""

    stats: _Stats | None = None


async def await_idle(url: str, limit_s: float) -> bool:
    """Wait until nothing runs and nothing waits; whether it came to that. A server that tells neither is at rest."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        try:
            async with asyncio.timeout(limit_s):
                await _poll(client)
        except TimeoutError:
            return False
    return True


async def _poll(client: httpx.AsyncClient) -> None:
    while True:
        if not await _is_busy(client):
            return
        await asyncio.sleep(POLL_S)


async def _is_busy(client: httpx.AsyncClient) -> bool:
    try:
        response = await client.get("/health", headers={"connection": "close"})
    except httpx.HTTPError:
        return True  # too busy to answer, for one thing
    stats = _stats(response.content)
    return stats is not None and (stats.running > 0 or stats.waiting > 0)


def _stats(body: bytes) -> _Stats | None:
    try:
        return msgspec.json.decode(body, type=_Health).stats
    except (msgspec.DecodeError, UnicodeError):
        return None
