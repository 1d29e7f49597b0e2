"""What a drill asks of the server: is it whole, what is it made of, what has happened to it."""

from typing import TypeVar

import httpx
import msgspec

from serve_app.errors import OctavoError
from serve_app.runtime.snapshot import EventView, ProcessView

TIMEOUT_S = 10.0  # to connect, and between two bytes

T = TypeVar("T")


class DrillError(OctavoError):
    """The drill cannot be held, or not be held on."""


class Health(msgspec.Struct, frozen=True):
    """Of `/health`, what matters here. `status` is "ready" where nothing is missing."""

    status: str
    reason: str = ""


class _Events(msgspec.Struct):
    events: list[EventView]


class _Processes(msgspec.Struct):
    processes: list[ProcessView]


class Server:
    """An Octavo server. Use as a context. Each question raises DrillError if there is no answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise DrillError(f"{url} is no URL: {str(error) or type(error).__name__}") from None

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()

    async def health(self) -> Health:
        return await self._get("/health", Health, 200, 503)

    async def processes(self) -> list[ProcessView]:
        return (await self._get("/admin/processes", _Processes, 200)).processes

    async def events(self, after_unix_s: float) -> list[EventView]:
        return (await self._get(f"/admin/events?after={after_unix_s!r}", _Events, 200)).events

    async def _get(self, path: str, kind: type[T], *statuses: int) -> T:
        try:
            response = await self._client.get(path, headers={"connection": "close"})
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise DrillError(f"{self._url} does not answer: {str(error) or type(error).__name__}") from None
        if response.status_code not in statuses:
            said = " ".join(response.text.split())[:300]
            raise DrillError(f"{self._url}{path} answered {response.status_code}: {said}")
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise DrillError(f"{self._url}{path} does not answer as an Octavo server does: {error}") from None
