"""The one place where a request in any dialect is run, and where what goes wrong becomes its response."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from serve_app.engine.request import Terms
from serve_app.errors import OctavoError
from serve_app.ingress.body import read_body
from serve_app.ingress.call import Call, Runner
from serve_app.ingress.door import Door
from serve_app.ingress.faults import RefusedError, TimedOutError
from serve_app.ingress.sse import ClientGoneError, EventStream, Ticket, sse_event, unless_gone
from serve_app.ingress.terms import Policy

T = TypeVar("T")
Fault = Callable[[OctavoError], tuple[int, bytes]]

_PARSE_IN_THREAD_BYTES = (
    1 << 15
)  # a body over this takes milliseconds to read and tokenize: other streams must not wait
# Fields that bring a grammar, which takes up to seconds to compile; a name may be written with escapes.
_GRAMMAR_FIELD = re.compile(
    rb'\\u|"(?:json_schema|json_object|regex|ebnf|grammar|tool_choice|structured_outputs|guided_\w{4,7})"'
)
_CLIENT_GONE = 499  # nobody reads it


class Dialect(Protocol):
    """A way to ask for text: the modules `sglang` and `tgi`, and those that `openai.routes` puts together."""

    def parse(self, body: bytes, door: Door, ticket: Ticket) -> Call: ...

    def fault(self, error: OctavoError) -> tuple[int, bytes]: ...


@dataclass(frozen=True)
class Service:
    """Runs what the routes are asked for.

    `names_answers`: answers carry the request's name as `x-request-id`. Serve adds that header itself.
    """

    door: Door
    runner: Runner
    names_answers: bool
    policy: Policy

    async def generate(
        self, request: Request, dialect: Dialect, choose: Callable[[bytes], Dialect] | None = None
    ) -> Response:
        """Run the call of the body. `dialect` is what it speaks, unless `choose` finds another in the body."""
        headers: dict[str, str] = {}
        try:
            body = await read_body(request, self.door.limits.max_body_bytes)
            if choose is not None:
                dialect = await _read(body, choose)
            terms = self.policy.terms(request.headers, request.scope.get("state", {}).get("tenant", ""))
            timeout_s = self.policy.timeout_s(request.headers)
            call = await _read(body, dialect.parse, self.door, _ticket(request))
            headers = _headers(call) if self.names_answers else {}
            if call.stream:
                return self._stream(dialect, call, headers, terms, timeout_s)
            answer = within(self.runner.answer(call, terms), timeout_s)
            return _json(call.answer(await unless_gone(request.receive, answer)), headers)
        except OctavoError as error:
            return self._refusal(dialect.fault, error, headers)
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=_CLIENT_GONE)

    async def look_up(
        self,
        request: Request,
        answer: Callable[[bytes, Door], bytes],
        fault: Fault,
    ) -> Response:
        """What the door alone can answer: `answer(body, door)`."""
        try:
            body = await read_body(request, self.door.limits.max_body_bytes)
            return _json(await _read(body, answer, self.door), {})
        except OctavoError as error:
            return self._refusal(fault, error, {})
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)

    def _stream(
        self, dialect: Dialect, call: Call, headers: dict[str, str], terms: Terms, timeout_s: float | None
    ) -> Response:
        chunks = self.runner.run(call, call.events, terms)
        return EventStream(
            chunks if timeout_s is None else all_within(chunks, timeout_s),
            call.end,
            headers,
            refuse=lambda error: self._refusal(dialect.fault, error, headers),
            report=lambda error: sse_event(dialect.fault(error)[1]),
        )

    def _refusal(self, fault: Fault, error: OctavoError, headers: dict[str, str]) -> Response:
        """What went wrong, in the dialect's words. What is refused now is told when to come back."""
        if isinstance(error, RefusedError):
            headers = headers | self.policy.refuse(error)
        status, body = fault(error)
        return Response(body, status, headers, media_type="application/json")


def _ticket(request: Request) -> Ticket:
    """An empty header is none: that is how a browser says that it has no last event."""
    return Ticket(request.headers.get("x-request-id") or None, request.headers.get("last-event-id") or None)


def _headers(call: Call) -> dict[str, str]:
    """A name that is no header value came with the body: the client has it."""
    return {"x-request-id": call.name} if call.name.isascii() and call.name.isprintable() else {}


async def _read(body: bytes, read: Callable[..., T], *rest: Any) -> T:
    """`read(body, *rest)`, beside the event loop where the body is large or may bring a grammar."""
    if len(body) > _PARSE_IN_THREAD_BYTES or _GRAMMAR_FIELD.search(body):
        return await asyncio.to_thread(read, body, *rest)
    return read(body, *rest)


def _json(body: bytes, headers: dict[str, str]) -> Response:
    return Response(body, headers=headers, media_type="application/json")


async def within(work: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
    """The result of `work`, which is cancelled when it takes longer. Raises TimedOutError."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise TimedOutError(timeout_s or 0.0) from None


async def all_within(chunks: AsyncGenerator[T, None], timeout_s: float) -> AsyncGenerator[T, None]:
    """What `chunks` gives; it is closed when all of it takes longer. Raises TimedOutError."""
    until_s = asyncio.get_running_loop().time() + timeout_s
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout_at(until_s):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise TimedOutError(timeout_s) from None
            yield chunk
