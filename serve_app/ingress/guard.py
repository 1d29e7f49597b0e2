"""What stands before every route: who may ask, how much of a request is read, how many are open, what is logged.

All of it is plain ASGI: nothing is buffered, and a client's going reaches the route as it always did.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import OctavoConfig
from serve_app.ingress.access_log import AccessLog
from serve_app.ingress.keys import Key, Keys, keys_path

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # who watches the server has no key
MAX_HEADER_BYTES = 1 << 16
BODY_IDLE_S = 30.0  # that a client may take for the next piece of its body
BODY_S = 300.0  # and for all of it
RETRY_S = 1  # after so long one of the open requests will have ended


@dataclass(frozen=True)
class Protection:
    """What `protect` holds requests to."""

    keys_file: Path | None = None  # None: nobody needs a key
    cors_origins: list[str] = field(default_factory=list)
    log_prompts: bool = False
    max_headers: int = 100
    max_connections: int = 2000  # requests that are open at a time
    body_idle_s: float = BODY_IDLE_S
    body_s: float = BODY_S

    @classmethod
    def of(cls, config: OctavoConfig) -> "Protection":
        """Raises ConfigError where the path of the keys cannot be meant."""
        security = config.security
        return cls(
            keys_file=None if security.keys_file is None else keys_path(security.keys_file),
            cors_origins=security.cors_origins,
            log_prompts=security.log_prompts,
            max_headers=config.limits.max_headers,
            max_connections=config.limits.max_connections,
        )


@dataclass(frozen=True)
class Caller:
    """Who asks, as `request.state.caller`. Without a file of keys everybody is a nameless admin."""

    tenant: str
    is_admin: bool


def protect(app: FastAPI, protection: Protection) -> None:
    """Put the guards before `app`; the last one added is the first that sees a request. Raises ConfigError."""
    keys = None if protection.keys_file is None else Keys(protection.keys_file)
    app.add_middleware(Gate, keys=keys)
    app.add_middleware(Guard, protection=protection)
    if protection.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=protection.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients have headers of their own, such as openai's x-stainless-...
            expose_headers=["x-request-id", "retry-after", "x-llm-d-request-dropped-reason"],
        )
    app.add_middleware(AccessLog, quiet_paths=OPEN_PATHS, log_prompts=protection.log_prompts)


def require_admin(request: Request) -> None:
    """A dependency of the routes for operators. Raises HTTPException."""
    caller: Caller = request.state.caller
    if not caller.is_admin:
        raise HTTPException(403, "this needs an admin's key")


class Gate:
    """Lets in who has a key, and says who it is: `request.state.caller` and `request.state.tenant`."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        caller = self._caller(scope)
        if caller is None and _path(scope) not in OPEN_PATHS:
            await _refuse(scope, receive, send, *_stranger(scope))
            return
        caller = caller or Caller("", is_admin=False)
        scope["state"] = {**scope.get("state", {}), "caller": caller, "tenant": caller.tenant}
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        """None: a stranger."""
        if self._keys is None:
            return Caller("", is_admin=True)
        presented = _bearer(scope)
        key: Key | None = self._keys.find(presented) if presented else None
        return None if key is None else Caller(key.name, is_admin=key.role == "admin")


class Guard:
    """Limits what one request may bring, how slowly, and how many there are."""

    def __init__(self, app: ASGIApp, protection: Protection) -> None:
        self._app = app
        self._protection = protection
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif problem := self._excess(scope):
            await _refuse(scope, receive, send, 431, problem, "RequestHeaderFieldsTooLarge")
        elif _path(scope) in OPEN_PATHS:  # probes are answered however busy we are
            await _Intake(scope, receive, send, self._protection).run(self._app)
        elif self._num_open >= self._protection.max_connections:
            message = f"{self._num_open} requests are open, as many as may be"
            headers = {"retry-after": str(RETRY_S), "x-llm-d-request-dropped-reason": "connections"}
            await _refuse(scope, receive, send, 503, message, "ServiceUnavailable", headers)
        else:
            await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._num_open += 1
        try:
            await _Intake(scope, receive, send, self._protection).run(self._app)
        finally:
            self._num_open -= 1

    def _excess(self, scope: Scope) -> str:
        """What is too much of the headers; "" where nothing is."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > self._protection.max_headers:
            return f"{len(headers)} header fields; the limit is {self._protection.max_headers}"
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        return f"{num_bytes} bytes of header; the limit is {MAX_HEADER_BYTES}" if num_bytes > MAX_HEADER_BYTES else ""


class _Intake:
    """One request, whose body must come in time. One that does not is answered, and then gone for the route."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, protection: Protection) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._idle_s, self._left_s = protection.body_idle_s, protection.body_s
        self._is_whole = False  # the body has come
        self._has_begun = False  # the answer
        self._is_late = False

    async def run(self, app: ASGIApp) -> None:
        await app(self._scope, self._take, self._give)

    async def _take(self) -> Message:
        if self._is_whole:
            return await self._receive()
        began_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(self._idle_s, max(0.0, self._left_s))):
                message = await self._receive()
        except TimeoutError:
            return await self._give_up()
        self._left_s -= asyncio.get_running_loop().time() - began_s
        self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def _give(self, message: Message) -> None:
        self._has_begun = True
        if not self._is_late:
            await self._send(message)

    async def _give_up(self) -> Message:
        self._is_whole = True
        if not self._has_begun:
            self._is_late = True
            message = "the body has not come in time"
            headers = {"connection": "close"}
            await _refuse(self._scope, self._receive, self._send, 408, message, "RequestTimeout", headers)
        return {"type": "http.disconnect"}


def fault(path: str, status: int, message: str, kind: str) -> bytes:
    """The body of a refusal: OpenAI's shape under `/v1/`, SGLang's elsewhere."""
    if path.startswith("/v1/"):
        code = "invalid_api_key" if status == 401 else None
        openai_kind = "server_error" if status >= 500 else "invalid_request_error"
        return msgspec.json.encode({"error": {"message": message, "type": openai_kind, "param": None, "code": code}})
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": status}})


async def _refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    status: int,
    message: str,
    kind: str,
    headers: dict[str, str] | None = None,
) -> None:
    response = Response(fault(_path(scope), status, message, kind), status, headers, media_type="application/json")
    await response(scope, receive, send)


def _stranger(scope: Scope) -> tuple[int, str, str, dict[str, str]]:
    if _bearer(scope) is None:
        return 401, "a key is needed: Authorization: Bearer ...", "Unauthorized", {"www-authenticate": "Bearer"}
    challenge = {"www-authenticate": 'Bearer error="invalid_token"'}
    return 401, "this key is not known here", "Unauthorized", challenge


def _bearer(scope: Scope) -> str | None:
    """The key in a request's header; None where there is none, or more than one."""
    values = Headers(scope=scope).getlist("authorization")
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _path(scope: Scope) -> str:
    """Below the prefix that the application is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
