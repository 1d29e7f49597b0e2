"""A whole load test: the capacity where it is needed, then rate after rate, the server at rest before each."""

import asyncio
import itertools
from collections.abc import Callable, Sequence

import msgspec

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import (
    Arrival,
    Lengths,
    Pattern,
    draw_arrivals,
    draw_lengths,
    lengths_of,
    mean_rate,
    read_arrivals,
    stretch,
    write_arrivals,
)
from serve_app.bench.serve.client import Address, Client, find
from serve_app.bench.serve.idle import await_idle
from serve_app.bench.serve.load import Asks, ClosedLoad, OpenLoad
from serve_app.bench.serve.record import Clock, Record
from serve_app.bench.serve.settings import Rate, Settings
from serve_app.bench.serve.verdict import Capacity, Run, RunFigures, capacity_of, judge, with_ratios

Say = Callable[[str], None]


class _Ongoing(msgspec.Struct):
    """The run that is under way, so that what is known of it is not lost with it."""

    run: Run
    clock: Clock
    records: list[Record]


class LoadTest:
    """Run it once. What it found is in `capacity` and `figures`, also when it was cut short.

    `say` tells what it is doing; `note` tells what a reader of the figures must know.
    """

    def __init__(self, settings: Settings, say: Say, note: Say) -> None:
        self._settings = settings
        self._say = say
        self._note = note
        self._asks = Asks(settings.vocabulary)
        self._trace = read_arrivals(settings.trace) if settings.trace else []
        self._done: list[RunFigures] = []
        self._ongoing: _Ongoing | None = None
        self.capacity = Capacity(settings.capacity_per_s) if settings.capacity_per_s else None

    async def run(self) -> None:
        """BenchError if there is no server, or none that can be measured."""
        settings = self._settings
        address = await find(settings.url)
        if settings.needs_capacity and self.capacity is None:
            self.capacity = await self._measure_capacity(address)
        plans = [self._plan(rate) for rate in settings.rates] or [self._plan(None)]
        if settings.record:
            write_arrivals(settings.record, plans[0][1])
        for run, arrivals in plans:
            await self._rest()
            await self._load(address, run, arrivals)

    def figures(self) -> list[RunFigures]:
        """A row for each run; for one that was cut short, of what had been sent until then."""
        rows = list(self._done)
        if self._ongoing and self._ongoing.records:
            ongoing = self._ongoing
            until_s = min(ongoing.run.arrivals_s, ongoing.clock.now_s())
            run = msgspec.structs.replace(ongoing.run, arrivals_s=until_s)
            rows.append(judge(run, ongoing.records, self._settings.ttft_s))
        return with_ratios(rows, self.capacity)

    async def _measure_capacity(self, address: Address) -> Capacity:
        settings = self._settings
        await self._rest()
        self._say(
            f"measuring the capacity with {settings.capacity_streams} streams, {settings.capacity_s:g} s once warm"
        )
        clock = Clock()
        client = Client(address, clock, settings.hang_up_s, settings.key)
        load = ClosedLoad(client, self._asks, self._lengths(), settings.capacity_streams)
        begin_s, end_s = await load.run(clock, settings.capacity_s)
        capacity = capacity_of(load.records, begin_s, end_s, settings.ttft_s, settings.capacity_streams)
        if not capacity.requests_per_s:
            raise BenchError(
                f"no request met the objective of {settings.ttft_s:g} s with {settings.capacity_streams} streams under "
                "way: measure the capacity with fewer (--capacity-streams), or for longer (--capacity-s)"
            )
        self._note(f"capacity: {capacity.requests_per_s:.3g} requests per second (--capacity takes it the next time)")
        return capacity

    def _lengths(self) -> Lengths:
        settings = self._settings
        if self._trace:
            return lengths_of(self._trace)
        return draw_lengths(settings.prompt_tokens, settings.output_tokens, settings.seed)

    def _plan(self, rate: Rate | None) -> tuple[Run, Sequence[Arrival]]:
        """The arrivals of one run, and what it is called."""
        settings = self._settings
        rate_per_s = self._per_s(rate) if rate else mean_rate(self._trace)
        if self._trace and settings.pattern is None:
            trace = stretch(self._trace, rate_per_s) if rate else self._trace
            arrivals: Sequence[Arrival] = trace[: settings.max_requests]
            arrivals_s = arrivals[-1].at_s
        else:
            arrivals, arrivals_s = self._draw(rate_per_s)
        name = rate.text if rate else "trace"
        return Run(name, rate_per_s, settings.pattern or ("trace" if self._trace else "poisson"), arrivals_s), arrivals

    def _draw(self, rate_per_s: float) -> tuple[list[Arrival], float]:
        """Arrivals, and when they end: sooner than asked for where there would be too many."""
        settings = self._settings
        pattern, most = settings.pattern or Pattern.POISSON, settings.max_requests
        arrivals = draw_arrivals(pattern, rate_per_s, settings.duration_s, self._lengths(), settings.seed, most)
        if not arrivals:
            raise BenchError(
                f"no request falls into {settings.duration_s:g} s at {rate_per_s:.3g} per second: --duration is short"
            )
        if len(arrivals) < most:
            return arrivals, settings.duration_s
        self._note(f"the run at {rate_per_s:.3g} per second ends after {most} requests (--max-requests)")
        return arrivals, arrivals[-1].at_s

    def _per_s(self, rate: Rate) -> float:
        if not rate.is_multiple:
            return rate.value
        assert self.capacity is not None
        return rate.value * self.capacity.requests_per_s

    async def _rest(self) -> None:
        self._say("waiting for the server to come to rest")
        if not await await_idle(self._settings.url, self._settings.drain_s):
            self._note(f"the server did not come to rest within {self._settings.drain_s:g} s; going on all the same")

    async def _load(self, address: Address, run: Run, arrivals: Sequence[Arrival]) -> None:
        settings = self._settings
        clock = Clock()
        client = Client(address, clock, settings.hang_up_s, settings.key)
        load = OpenLoad(client, clock, self._asks, retry=settings.retry)
        self._ongoing = _Ongoing(run, clock, load.records)
        telling = asyncio.create_task(self._tell(run, load.records, len(arrivals)))
        try:
            await load.run(arrivals)
        finally:
            telling.cancel()
        self._done.append(judge(run, load.records, settings.ttft_s))
        self._ongoing = None

    async def _tell(self, run: Run, records: Sequence[Record], num_all: int) -> None:
        for _ in itertools.count():
            num_ended = sum(record.ended_s is not None for record in records)
            self._say(f"{run.rate}: {len(records)} of {num_all} sent, {num_ended} at their end")
            await asyncio.sleep(1.0)
