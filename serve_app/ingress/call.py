"""How the sequences of one HTTP request run: side by side, each cancelled as soon as nobody waits for it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol, TypeVar

from serve_app.ingress.client import Engine
from serve_app.ingress.door import Job
from serve_app.ingress.faults import BadInputError, GenerationError
from serve_app.ingress.output import Output, Piece
from serve_app.model.tokenizer import Tokenizer
from serve_app.telemetry.metrics import ServingMetrics

T = TypeVar("T")
Render = Callable[[int, Output, list[Piece]], T]  # index of the job, its output so far, what was just added


class Call(Protocol):
    """One validated HTTP request, in the words of its dialect."""

    @property
    def jobs(self) -> Sequence[Job]: ...

    @property
    def stream(self) -> bool: ...

    @property
    def end(self) -> bytes:
        """What closes the stream."""
        ...

    def answer(self, outputs: list[Output]) -> bytes:
        """The JSON body where the call does not stream."""
        ...

    def events(self, index: int, output: Output, pieces: list[Piece]) -> bytes:
        """What the stream says of an update of job `index`: whole SSE events, or nothing."""
        ...


class Runner:
    """Runs jobs on the engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, metrics: ServingMetrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._running: set[str] = set()  # the clients' names

    async def answer(self, jobs: Sequence[Job]) -> list[Output]:
        """All jobs' finished outputs. When one fails the others are cancelled."""
        async with aclosing(self.run(jobs, lambda index, output, _: (index, output))) as updates:
            outputs = {index: output async for index, output in updates}
        return [outputs[i] for i in range(len(jobs))]

    async def run(self, jobs: Sequence[Job], render: Render[T]) -> AsyncGenerator[T, None]:
        """Every update of every job as it comes, rendered. Closing this cancels what still runs.

        Raises BadInputError if a job's rid is running already, GenerationError, EngineUnavailableError.
        """
        with self._reserved([job.rid for job in jobs]):
            updates = self._run_one(0, jobs[0], render) if len(jobs) == 1 else self._run_all(jobs, render)
            async with aclosing(updates):
                async for update in updates:
                    yield update

    @contextmanager
    def _reserved(self, rids: list[str]) -> Iterator[None]:
        taken = next((rid for rid in rids if rid in self._running), None)
        if taken is not None:
            raise BadInputError("rid", "a request of this name is running")
        self._running.update(rids)
        try:
            yield
        finally:
            self._running.difference_update(rids)

    async def _run_one(self, index: int, job: Job, render: Render[T]) -> AsyncGenerator[T, None]:
        output = Output(self._tokenizer, job.stops, job.skip_special_tokens)
        with self._metrics.watch(len(job.request.prompt)) as watch:
            async with aclosing(self._engine.submit(job.request)) as emissions:
                async for emission in emissions:
                    pieces = output.take(emission)
                    watch.generated(len(pieces))
                    if output.finish is not None:
                        watch.finished(output.finish.reason)
                        yield render(index, output, pieces)
                        return
                    yield render(index, output, pieces)
            raise GenerationError("the engine ended the answer before it was finished")

    async def _run_all(self, jobs: Sequence[Job], render: Render[T]) -> AsyncGenerator[T, None]:
        updates: asyncio.Queue[T | Exception | None] = asyncio.Queue(len(jobs))  # full: the client reads too slowly

        async def forward(index: int, job: Job) -> None:
            try:
                async with aclosing(self._run_one(index, job, render)) as own:
                    async for update in own:
                        await updates.put(update)
            except Exception as failure:  # raised again by whoever reads the queue
                await updates.put(failure)
            else:
                await updates.put(None)

        tasks = [asyncio.create_task(forward(index, job)) for index, job in enumerate(jobs)]
        try:
            num_running = len(tasks)
            while num_running:
                update = await updates.get()
                if isinstance(update, Exception):
                    raise update
                if update is None:
                    num_running -= 1
                else:
                    yield update
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
