"""What a running server says of its cell, over HTTP."""

from typing import TypeVar

import httpx
import msgspec

from serve_app.errors import OctavoError
from serve_app.ingress.client import EngineStatus
from serve_app.runtime.snapshot import CellView
from serve_app.status.figures import plain

TIMEOUT_S = 10.0  # to connect, and between two bytes; the server gives its own router up earlier
MAX_ANSWER_BYTES = 64 << 20  # many times what a cell of a thousand workers says

T = TypeVar("T")


class StatusError(OctavoError):
    """There is no cell to show: no server, another server, or one that does not know its cell yet."""


class Refusal(msgspec.Struct, frozen=True):
    """What comes with a 503."""

    reason: str


class Answer(msgspec.Struct, frozen=True):
    """What one look at a server brought."""

    url: str
    health: EngineStatus
    view: CellView
    said: bytes  # both as JSON, as the server said them: {"health": ..., "placement": ...}


def client_of(url: str) -> httpx.Client:
    """Connects when it is first asked. StatusError if `url` is none."""
    try:
        return httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise StatusError(f"{url} is no URL: {str(error) or type(error).__name__}") from None


def ask(client: httpx.Client, url: str) -> Answer:
    """One look at the server of `client`, which the user calls `url`. StatusError if there is no cell to show."""
    try:
        health_status, health_body = _get(client, "/health")
        status, body = _get(client, "/admin/placement")
        health = _decode(health_status, health_body, EngineStatus)
        if status == 503:
            raise _refused(url, health, _decode(status, body, Refusal))
        view = _decode(status, body, CellView)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise StatusError(f"{url} does not answer: {str(error) or type(error).__name__}") from None
    except _NotOctavoError as error:
        raise StatusError(f"{url} does not answer as an Octavo server does, or not yet: {error}") from None
    said = {"health": msgspec.Raw(health_body), "placement": msgspec.Raw(body)}
    return Answer(url, health, view, msgspec.json.format(msgspec.json.encode(said)))


class _NotOctavoError(Exception):
    """The message says what is wrong with the answer."""


def _get(client: httpx.Client, path: str) -> tuple[int, bytes]:
    """The status and the body of an answer. _NotOctavoError if it does not end."""
    body = bytearray()
    with client.stream("GET", path) as response:
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise _NotOctavoError(f"{path} is longer than {MAX_ANSWER_BYTES} bytes")
    return response.status_code, bytes(body)


def _decode(status: int, body: bytes, kind: type[T]) -> T:
    if status not in {200, 503}:
        raise _NotOctavoError(f"status {status}")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise _NotOctavoError(str(error)) from None


def _refused(url: str, health: EngineStatus, refusal: Refusal) -> StatusError:
    """What both pages say, in one sentence."""
    state = "is ready, but" if health.ready else f"is not ready ({health.reason}), and"
    return StatusError(plain(f"{url} {state} cannot say who holds what: {refusal.reason}"))
