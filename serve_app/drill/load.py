"""Load with a memory: streams of SGLang's dialect that go on over a broken connection, as a real client's do.

Each stream is recorded: its tokens, when they came, and what went wrong. Times are `time.time()`, to be compared with
those of other processes.
"""

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Iterable
from typing import Any

import httpx
import msgspec

VOCABULARY = 256  # token ids that any served model has; a server does not tell its vocabulary
PROMPT_TOKENS = (8, 64)
SILENT_S = 60.0  # a connection that says nothing for so long is given up, and made anew
RESUME_S = 60.0  # that a client tries to get a connection
RETRY_S = 0.1  # between two tries
MAX_BREAKS = 20  # of one stream
_RETRIED = frozenset({502, 503})  # what a proxy, or an ingress without its engine, says for a while
_NOTHING_YET = "0"  # Last-Event-ID of who comes back before an event has come: Octavo's ids count tokens
_MAX_SAID = 300  # characters of what a server says that are worth repeating


class Ask(msgspec.Struct, frozen=True):
    """One request, whose tokens are always the same."""

    index: int
    prompt: list[int]
    num_tokens: int
    temperature: float  # 0 is greedy
    seed: int

    def body(self, rid: str) -> bytes:
        sampling = {
            "max_new_tokens": self.num_tokens,
            "temperature": self.temperature,
            "sampling_seed": self.seed,
            "ignore_eos": True,
        }
        return msgspec.json.encode({"input_ids": self.prompt, "sampling_params": sampling, "rid": rid, "stream": True})


class Record(msgspec.Struct):
    """What became of one stream."""

    ask: int
    rid: str
    sent_unix_s: float
    ended_unix_s: float = 0.0
    tokens: list[int] = []
    token_unix_s: list[float] = []  # of the events that brought any
    error: str = ""  # why it failed
    changed: str = ""  # what it said again, or otherwise than before
    num_resumed: int = 0  # connections after the first that brought events


def draw_asks(num: int, num_tokens: int, seed: int) -> list[Ask]:
    """Distinct requests, half of them greedy. Answers are `num_tokens` long, or down to half of it."""
    draw = random.Random(f"asks {seed}")
    return [
        Ask(
            index,
            [draw.randrange(VOCABULARY) for _ in range(draw.randint(*PROMPT_TOKENS))],
            draw.randint(max(1, num_tokens // 2), num_tokens),
            0.0 if index % 2 == 0 else 1.0,
            draw.getrandbits(32),
        )
        for index in range(num)
    ]


class Load:
    """Streams against one server, `num_streams` at a time.

    `records` grows as streams end; what was cut short by a cancellation is in none.
    """

    def __init__(self, url: str, num_streams: int, name: str) -> None:
        self._url = url
        self._num_streams = num_streams
        self._name = f"{name}-{secrets.token_hex(3)}"  # a rid is used once, whoever drilled here before
        self._stopping = False
        self._numbers = itertools.count()
        self.records: list[Record] = []

    def stop(self) -> None:
        """No more streams begin; those that run go on to their end."""
        self._stopping = True

    async def run(self, asks: Iterable[Ask]) -> list[Record]:
        """All of `asks`, which may be endless, until they or `stop` end it. The records of these."""
        first = len(self.records)
        queue = iter(asks)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a dead ingress keeps nothing warm
        timeout = httpx.Timeout(SILENT_S, connect=5.0)
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=timeout, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as streams,
        ):
            for _ in range(self._num_streams):
                streams.create_task(self._keep(client, queue))
        return self.records[first:]

    async def _keep(self, client: httpx.AsyncClient, queue: Iterable[Ask]) -> None:
        for ask in queue:
            if self._stopping:
                return
            rid = f"{self._name}-{next(self._numbers)}"
            self.records.append(await _Stream(client, ask, rid).run())


class _FailedError(Exception):
    """The server refused, or ended the stream with an error. The message is what it said."""


class _BrokenError(Exception):
    """The connection ended before the stream did, or did not come about. The message says how."""


class _Meta(msgspec.Struct, frozen=True):
    finish_reason: dict[str, Any] | None = None


class _Event(msgspec.Struct, frozen=True):
    """What SGLang's /generate streams: all tokens so far, or an error."""

    output_ids: list[int] = []
    meta_info: _Meta = _Meta()
    error: Any = None


class _Stream:
    """One request, on as many connections as it takes."""

    def __init__(self, client: httpx.AsyncClient, ask: Ask, rid: str) -> None:
        self._client = client
        self._body = ask.body(rid)
        self._record = Record(ask.index, rid, time.time())
        self._last_id = ""
        self._num_events = 0
        self._finish: dict[str, Any] | None = None

    async def run(self) -> Record:
        """To its end, good or bad."""
        record = self._record
        try:
            await self._go_on()
        except (httpx.HTTPError, _FailedError) as error:
            record.error = str(error) or type(error).__name__
        record.ended_unix_s = time.time()
        return record

    async def _go_on(self) -> None:
        """Connect until the stream has ended. A break is forgiven for RESUME_S."""
        deadline_s = time.monotonic() + RESUME_S
        num_breaks = 0
        while True:
            num_known = self._num_events
            try:
                return await self._connect()
            except (httpx.TransportError, _BrokenError) as error:
                why = str(error) or type(error).__name__
            self._last_id = self._last_id or _NOTHING_YET
            if self._num_events > num_known:
                num_breaks += 1
                deadline_s = time.monotonic() + RESUME_S
            if num_breaks > MAX_BREAKS or time.monotonic() > deadline_s:
                raise _FailedError(f"the stream broke, and could not be resumed: {why}")
            await asyncio.sleep(RETRY_S)

    async def _connect(self) -> None:
        """One connection; returns if the stream has come to its end on it."""
        headers = {"content-type": "application/json"}
        if self._last_id:
            headers["last-event-id"] = self._last_id
        was_known = self._num_events > 0
        async with self._client.stream("POST", "/generate", content=self._body, headers=headers) as response:
            await _check(response)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return self._check_finish()
                if line.startswith("id:"):
                    self._last_id = line.removeprefix("id:").strip()
                elif line.startswith("data:"):
                    self._num_events += 1
                    self._take(_decode(line.removeprefix("data:")))
                    self._record.num_resumed += was_known
                    was_known = False
        raise _BrokenError("the connection was closed before the end")

    def _take(self, event: _Event) -> None:
        record, now_s = self._record, time.time()
        known, ids = record.tokens, event.output_ids
        if ids[: len(known)] != known:
            record.changed = record.changed or f"after {len(known)} tokens the server told {len(ids)}, others or fewer"
        elif len(ids) > len(known):
            known += ids[len(known) :]
            record.token_unix_s.append(now_s)
        self._finish = event.meta_info.finish_reason

    def _check_finish(self) -> None:
        kind = self._finish["type"] if self._finish else "nothing"
        if kind not in {"length", "stop"}:
            raise _FailedError(f"the stream ended with {kind}")


async def _check(response: httpx.Response) -> None:
    """That it is a stream."""
    if response.status_code == 200:
        return
    body = await response.aread()
    said = f"status {response.status_code}: {body[:_MAX_SAID].decode(errors='replace')}"
    is_a_proxy_s = response.status_code >= 500 and not body.startswith(b"{")  # our own faults are JSON
    raise (_BrokenError if is_a_proxy_s or response.status_code in _RETRIED else _FailedError)(said)


def _decode(data: str) -> _Event:
    try:
        event = msgspec.json.decode(data, type=_Event)
    except (msgspec.DecodeError, UnicodeError):
        raise _FailedError(f"the server does not answer as SGLang's /generate does: {data[:_MAX_SAID]}") from None
    if event.error is not None:
        raise _FailedError(f"the server ended the stream: {event.error}"[:_MAX_SAID])
    return event
