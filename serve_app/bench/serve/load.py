"""Two ways to load a server: open, where requests come at their time whatever the server does, and closed."""

import asyncio
import itertools
import random
import secrets
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import Arrival, Lengths, Range
from serve_app.bench.serve.client import Client
from serve_app.bench.serve.record import Clock, Record

MAX_RETRIES = 3
MAX_RETRY_WAIT_S = 600.0  # whoever is told to wait longer stays away
REFUSED_WAIT_S = 1.0  # in a closed loop, after a refusal or an error: a server's limit is found by pressing on
WARM_UP_S = 60.0  # at most


class Asks:
    """Makes requests of random tokens. No two runs share a prompt, whatever their seed: no prefix cache helps."""

    def __init__(self, vocabulary: Range) -> None:
        self._tokens = range(vocabulary.low, vocabulary.high + 1)
        self._draw = random.Random(secrets.randbits(64))
        self._name = f"bench-{secrets.token_hex(4)}"
        self._numbers = itertools.count()

    def make(self, arrival: Arrival) -> tuple[str, bytes]:
        """Its name, and the body."""
        sampling = {"max_new_tokens": arrival.output_tokens, "temperature": 0.0, "ignore_eos": True}
        prompt = self._draw.choices(self._tokens, k=arrival.prompt_tokens)
        body = msgspec.json.encode({"input_ids": prompt, "sampling_params": sampling, "stream": True})
        return f"{self._name}-{next(self._numbers)}", body


class OpenLoad:
    """Sends each arrival at its time. `records` grows as they are sent; one that is cut short has no end."""

    def __init__(self, client: Client, clock: Clock, asks: Asks, *, retry: bool) -> None:
        self._client = client
        self._clock = clock
        self._asks = asks
        self._max_retries = MAX_RETRIES if retry else 0
        self.records: list[Record] = []

    async def run(self, arrivals: Iterable[Arrival]) -> None:
        """Until the last of them has ended."""
        async with asyncio.TaskGroup() as requests:
            for arrival in arrivals:
                rid, body = self._asks.make(arrival)  # before its time: it takes a while
                await asyncio.sleep(max(0.0, arrival.at_s - self._clock.now_s()))
                record = Record(arrival)
                self.records.append(record)
                requests.create_task(self._follow(record, rid, body))

    async def _follow(self, record: Record, rid: str, body: bytes) -> None:
        """Send it; while it is refused, wait as long as the server says and come back."""
        await self._client.send(record, rid, body)
        for _ in range(self._max_retries):
            wait_s = record.tries[-1].retry_after_s
            if not record.is_refused or wait_s is None or wait_s > MAX_RETRY_WAIT_S:
                return
            await asyncio.sleep(wait_s)
            await self._client.send(record, rid, body)


class ClosedLoad:
    """Keeps a number of requests under way. `records` are of those that have ended."""

    def __init__(self, client: Client, asks: Asks, lengths: Lengths, num_streams: int) -> None:
        self._client = client
        self._asks = asks
        self._lengths = lengths
        self._num_streams = num_streams
        self._warm = asyncio.Event()
        self._num_ended = 0
        self.records: list[Record] = []

    async def run(self, clock: Clock, measure_s: float) -> tuple[float, float]:
        """Warm up and go on for `measure_s`; the begin and the end of that, in seconds. BenchError if nothing works."""
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(self._keep()) for _ in range(self._num_streams)]
            await self._warm_up()
            begin_s = clock.now_s()
            if self.records and not all(record.error for record in self.records):
                await asyncio.sleep(measure_s)
            for stream in streams:
                stream.cancel()
        end_s = clock.now_s()
        if end_s - begin_s < measure_s:
            raise BenchError(f"the capacity could not be measured: {self._complaint()}")
        return begin_s, end_s

    async def _warm_up(self) -> None:
        """Until as many have ended as there are streams, without those that were refused."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._warm.wait(), WARM_UP_S)

    async def _keep(self) -> None:
        for prompt_tokens, output_tokens in self._lengths:
            record = Record(Arrival(0.0, prompt_tokens, output_tokens))
            await self._client.send(record, *self._asks.make(record.arrival))
            self.records.append(record)
            self._num_ended += not record.is_refused
            if self._num_ended >= self._num_streams:
                self._warm.set()
            if record.is_refused or record.error:
                await asyncio.sleep(REFUSED_WAIT_S)

    def _complaint(self) -> str:
        return self.records[0].error if self.records else f"no request has ended within {WARM_UP_S:g} s"
