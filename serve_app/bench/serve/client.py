"""One request on a connection of its own, over h11 on plain asyncio streams.

The generator shares the machine with the server more often than not. A client with a connection pool takes longer for
each request the more are under way, and that would be measured as the server's.
"""

import asyncio
import re
import ssl
from typing import Any

import h11
import httpx
import msgspec

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.record import Clock, Record, Try

CONNECT_S = 5.0
SILENT_S = 60.0  # between two tokens of one stream
_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 22  # SGLang's events carry all that was said so far
_MAX_SAID = 300  # characters of what a server says that are worth repeating
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


class Address(msgspec.Struct, frozen=True):
    """Where a server listens; `host` is a number, so that no request waits for a name."""

    host: str
    port: int
    authority: str  # for the header `host`
    prefix: str  # of all paths, without a slash at its end
    tls_name: str | None  # the name to verify; None: no TLS


async def find(url: str) -> Address:
    """The first of a URL's addresses that takes a connection. BenchError if none does."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise BenchError(f"{url} is no URL: {error}") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise BenchError(f"{url} is no URL: it needs http:// or https://, and a host")
    tls_name = parsed.host if parsed.scheme == "https" else None
    port = parsed.port or (443 if tls_name else 80)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(parsed.host, port)
    except (OSError, UnicodeError) as error:
        raise BenchError(f"{url} does not answer: {str(error) or type(error).__name__}") from None
    host = writer.get_extra_info("peername")[0]
    writer.close()
    return Address(host, port, parsed.netloc.decode("ascii"), parsed.path.rstrip("/"), tls_name)


class _BrokenError(Exception):
    """It cannot be counted as an answer. The message says why."""


class _Meta(msgspec.Struct, frozen=True):
    completion_tokens: int
    finish_reason: dict[str, Any] | None = None


class _Event(msgspec.Struct, frozen=True):
    """What SGLang's /generate streams, as far as it is counted here."""

    meta_info: _Meta | None = None
    error: Any = None


_events = msgspec.json.Decoder(_Event)


class Client:
    """Sends requests, any number at a time. `hang_up_s`: without a first token for so long, it is not waited for."""

    def __init__(self, address: Address, clock: Clock, hang_up_s: float, key: str | None = None) -> None:
        self._address = address
        self._clock = clock
        self._hang_up_s = hang_up_s
        self._tls = ssl.create_default_context() if address.tls_name else None
        self._headers = [
            ("host", address.authority),
            ("content-type", "application/json"),
            ("accept", "text/event-stream"),
            ("connection", "close"),
            *([("authorization", f"Bearer {key}")] if key else []),
        ]

    async def send(self, record: Record, rid: str, body: bytes) -> None:
        """Try a request once; what became of it is in `record`. Raises nothing but CancelledError."""
        attempt = Try(self._clock.now_s())
        record.tries.append(attempt)
        record.ended_s = None
        patience = asyncio.timeout(self._hang_up_s)
        try:
            async with patience:
                await self._exchange(record, attempt, patience, self._request(rid, body))
        except (OSError, h11.RemoteProtocolError, _BrokenError) as error:  # OSError: a TimeoutError is one
            record.gave_up = patience.expired() and not record.token_s
            if not record.gave_up:
                record.error = _why(error, patience)
        record.ended_s = self._clock.now_s()

    def _request(self, rid: str, body: bytes) -> tuple[h11.Connection, bytes]:
        headers = [*self._headers, ("x-request-id", rid), ("content-length", str(len(body)))]
        http = h11.Connection(h11.CLIENT)
        head = http.send(h11.Request(method="POST", target=f"{self._address.prefix}/generate", headers=headers))
        http.send(h11.Data(body))
        http.send(h11.EndOfMessage())
        return http, (head or b"") + body

    async def _exchange(
        self, record: Record, attempt: Try, patience: asyncio.Timeout, request: tuple[h11.Connection, bytes]
    ) -> None:
        http, data = request
        address = self._address
        reader, writer = await asyncio.open_connection(
            address.host, address.port, ssl=self._tls, server_hostname=address.tls_name
        )
        try:
            writer.write(data)
            answer = _Answer(record, attempt, self._clock, patience)
            while not answer.is_over:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(_READ_BYTES))
                else:
                    answer.take(event)
        finally:
            writer.close()


class _Answer:
    """Reads one answer into a record, HTTP event after HTTP event."""

    def __init__(self, record: Record, attempt: Try, clock: Clock, patience: asyncio.Timeout) -> None:
        self._record = record
        self._attempt = attempt
        self._clock = clock
        self._patience = patience
        self._rest = b""  # of the body: what is not yet a whole line
        self.is_over = False

    def take(self, event: Any) -> None:
        """Raises _BrokenError when the answer is at its end, and was none."""
        match event:
            case h11.Response():
                self._begin(event)
            case h11.Data() if self._attempt.status == 200:
                self._take_lines(bytes(event.data))
            case h11.Data():
                self._rest = (self._rest + bytes(event.data))[:_MAX_SAID]
            case h11.EndOfMessage() | h11.ConnectionClosed():
                self._end()

    def _begin(self, response: h11.Response) -> None:
        attempt = self._attempt
        attempt.answered_s = self._clock.now_s()
        headers = {name.decode(): value.decode("latin-1") for name, value in response.headers}
        attempt.status = response.status_code
        attempt.retry_after_s = read_retry_after(headers.get("retry-after"), headers.get("retry-after-ms"))
        attempt.reason = headers.get("x-llm-d-request-dropped-reason", "")
        self.is_over = attempt.is_refused

    def _take_lines(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            raise _BrokenError(f"an event is longer than {_MAX_LINE_BYTES >> 20} MiB")
        for line in lines:
            if line.startswith(b"data:") and not self.is_over:
                self._take_event(line.removeprefix(b"data:").strip())

    def _take_event(self, data: bytes) -> None:
        record = self._record
        if data == b"[DONE]":
            return self._check_all_came()
        meta = _decode(data)
        now_s = self._clock.now_s()
        num_new = meta.completion_tokens - len(record.token_s)
        if num_new > 0:
            record.token_s += [now_s] * num_new
            self._patience.reschedule(asyncio.get_running_loop().time() + SILENT_S)
        if meta.finish_reason and meta.finish_reason.get("type") not in {"length", "stop"}:
            raise _BrokenError(f"the stream ended with {meta.finish_reason.get('type')}")
        return None

    def _check_all_came(self) -> None:
        self.is_over = True
        num_came, num_asked = len(self._record.token_s), self._record.arrival.output_tokens
        if num_came != num_asked:
            raise _BrokenError(f"{num_came} tokens came of the {num_asked} that were asked for")

    def _end(self) -> None:
        if self._attempt.status == 200:
            raise _BrokenError("the connection was closed before the stream was at its end")
        said = " ".join(self._rest.decode(errors="replace").split())
        raise _BrokenError(f"status {self._attempt.status}: {said}")


def _why(error: Exception, patience: asyncio.Timeout) -> str:
    if patience.expired():
        return f"no further token within {SILENT_S:g} s"
    return str(error) or type(error).__name__


def _decode(data: bytes) -> _Meta:
    """Raises _BrokenError if it is no event of SGLang's, or one that tells of an error."""
    try:
        event = _events.decode(data)
    except (msgspec.DecodeError, UnicodeError):
        event = _Event()
    said = data[:_MAX_SAID].decode(errors="replace")
    if event.error is not None:
        raise _BrokenError(f"the stream broke off: {said}")
    if event.meta_info is None:
        raise _BrokenError(f"the server does not answer as SGLang's /generate does: {said}")
    return event.meta_info


def read_retry_after(seconds: str | None, milliseconds: str | None) -> float | None:
    """Seconds. `Retry-After` goes before `retry-after-ms`; what is no number, such as a date, counts as nothing."""
    for text, unit_s in ((seconds, 1.0), (milliseconds, 1e-3)):
        if text is not None and _NUMBER.fullmatch(text.strip()):
            return float(text) * unit_s
    return None
