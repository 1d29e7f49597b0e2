"""Server-sent events with ids to go on from, and doing work only as long as the client is there."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.errors import OctavoError
from serve_app.ingress.faults import BadInputError

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


# Line ends of Unicode that are none of SSE's. JSON need not escape them, but clients that cut decoded text into lines
# (httpx's `aiter_lines` among them) would cut an event in two.
_FOREIGN_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


_EVENT_ID = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*", re.ASCII)


def sse_event(data: bytes, event_id: str = "") -> bytes:
    """One event of JSON in UTF-8. Without an id the client keeps that of the event before."""
    for raw, escaped in _FOREIGN_LINE_ENDS:
        data = data.replace(raw, escaped)
    head = f"id: {event_id}\n".encode() if event_id else b""
    return head + b"data: " + data + b"\n\n"


class Ticket(NamedTuple):
    """What a request's headers say of it: the client's name for it, and the last event of its answer that came."""

    rid: str | None = None  # x-request-id
    last_event_id: str | None = None

    def progress(self, num_sequences: int) -> "Progress":
        """Raises BadInputError when there is a Last-Event-ID that no event of such an answer has."""
        if self.last_event_id is None:
            return Progress([0] * num_sequences, is_resumed=False)
        if not _EVENT_ID.fullmatch(self.last_event_id):
            raise BadInputError("Last-Event-ID", "not the id of an event: counts of tokens, joined by commas")
        counts = [int(count) for count in self.last_event_id.split(",")]
        if len(counts) != num_sequences:
            raise BadInputError("Last-Event-ID", f"{len(counts)} counts for {num_sequences} sequences")
        return Progress(counts, is_resumed=True)


class Progress:
    """How many tokens of each sequence the client of a stream has: the ids of its events say just that.

    `counts`: what it had before. A client that comes back with its last id gets what is behind that, nothing twice.
    """

    def __init__(self, counts: Sequence[int], *, is_resumed: bool) -> None:
        self.is_resumed = is_resumed
        self._had = tuple(counts)
        self._counts = list(counts)

    @property
    def has_some(self) -> bool:
        """Whether the client had tokens of this answer before: it was let in then."""
        return any(self._had)

    def had(self, index: int) -> int:
        """Tokens of sequence `index` that the client had before."""
        return self._had[index]

    def is_news(self, index: int, num_tokens: int, *, is_end: bool = False) -> bool:
        """Whether an event that brings sequence `index` to so many tokens is yet to be sent.

        An end is news also to a client that claims more tokens than there are.
        """
        had = self._had[index]
        return had == 0 or num_tokens > had or (is_end and num_tokens < had)

    def advance(self, index: int, num_tokens: int) -> str:
        """The id of that event."""
        self._counts[index] = max(self._counts[index], num_tokens)
        return ",".join(map(str, self._counts))


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client goes first, `work` is cancelled and ClientGoneError raised.

    Returns only when `work` has ended, its clean-up included. The body must have been read.
    """
    tasks = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGoneError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends chunks of whole events as they come, and closes their generator when the client goes.

    The response starts with the first chunk: what fails before it is answered by `refuse`, with a status of its
    own; what fails later becomes the chunk that `report` makes of it. Then `end` follows.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        end: bytes,
        headers: Mapping[str, str],
        refuse: Callable[[OctavoError], Response],
        report: Callable[[OctavoError], bytes],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._chunks = chunks
        self._end = end
        self._refuse = refuse
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            refused = await unless_gone(receive, self._send_all(send))
        except ClientGoneError:
            return
        if refused is not None:
            await refused(scope, receive, send)

    async def _send_all(self, send: Send) -> Response | None:
        """Stream to the end; or the response to give instead, when nothing has been sent."""
        async with aclosing(self._chunks) as chunks:
            try:
                first = await anext(chunks)
            except OctavoError as error:
                return self._refuse(error)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_chunk(send, first)
            try:
                async for chunk in chunks:
                    await _send_chunk(send, chunk)
            except OctavoError as error:
                await _send_chunk(send, self._report(error))
        await send({"type": "http.response.body", "body": self._end, "more_body": False})
        return None


async def _send_chunk(send: Send, chunk: bytes) -> None:
    if chunk:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
