"""How the sequences of one HTTP request run: side by side, each cancelled as soon as nobody waits for it."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

import msgspec

from serve_app.engine.request import Terms
from serve_app.ingress.access_log import account
from serve_app.ingress.client import Engine
from serve_app.ingress.door import Job
from serve_app.ingress.faults import AbortedError, BadInputError, GenerationError, RefusedError, TakenOverError
from serve_app.ingress.output import Output, Piece
from serve_app.ingress.sse import Progress
from serve_app.model.tokenizer import Tokenizer
from serve_app.telemetry.metrics import ServingMetrics, Watch

T = TypeVar("T")
Update = tuple[int, Output, list[Piece]]
Render = Callable[[int, Output, list[Piece]], T]  # index of the job, its output so far, what was just added


class Call(Protocol):
    """One validated HTTP request, in the words of its dialect."""

    @property
    def name(self) -> str:
        """By which it can be resumed: the client's, or ours."""
        ...

    @property
    def jobs(self) -> Sequence[Job]: ...

    @property
    def stream(self) -> bool: ...

    @property
    def progress(self) -> Progress:
        """What the client has of the stream."""
        ...

    @property
    def end(self) -> bytes:
        """What closes the stream."""
        ...

    def answer(self, outputs: list[Output]) -> bytes:
        """The JSON body where the call does not stream."""
        ...

    def events(self, index: int, output: Output, pieces: list[Piece]) -> bytes:
        """What the stream says of an update of job `index`: whole SSE events, or nothing where the client has it."""
        ...


class Runner:
    """Runs jobs on the engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, metrics: ServingMetrics) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._running: dict[str, object] = {}  # the engine's name of a request -> the run that it belongs to

    async def answer(self, call: Call, terms: Terms = Terms()) -> list[Output]:  # noqa: B008  (it is immutable)
        """All jobs' finished outputs. When one fails the others are cancelled."""
        async with aclosing(self.run(call, lambda index, output, _: (index, output), terms)) as updates:
            outputs = {index: output async for index, output in updates}
        return [outputs[i] for i in range(len(call.jobs))]

    async def run(self, call: Call, render: Render[T], terms: Terms = Terms()) -> AsyncGenerator[T, None]:  # noqa: B008
        """Every update of every job as it comes, rendered. Closing this cancels what still runs.

        Raises BadInputError if one of the jobs is running already, unless the call is resumed: then it takes that
        over. Raises RefusedError, AbortedError, GenerationError, EngineUnavailableError.
        """
        terms = msgspec.structs.replace(terms, is_accepted=call.progress.has_some)
        jobs = [_on_terms(job, terms) for job in call.jobs]
        with self._reserved([job.request.rid for job in jobs], takes_over=call.progress.is_resumed):
            rendered = self._run_alone(jobs[0], render) if len(jobs) == 1 else self._run_all(jobs, render)
            async with aclosing(rendered):
                async for update in rendered:
                    yield update

    @contextmanager
    def _reserved(self, rids: list[str], *, takes_over: bool) -> Iterator[None]:
        if not takes_over and any(rid in self._running for rid in rids):
            raise BadInputError("rid", "a request of this name is running")
        run = object()
        self._running.update(dict.fromkeys(rids, run))
        try:
            yield
        finally:
            for rid in [rid for rid in rids if self._running.get(rid) is run]:
                del self._running[rid]

    async def _run_alone(self, job: Job, render: Render[T]) -> AsyncGenerator[T, None]:
        async with aclosing(self._run_one(0, job)) as updates:
            async for update in updates:
                yield render(*update)

    async def _run_one(self, index: int, job: Job) -> AsyncGenerator[Update, None]:
        seen = account()
        seen.rid = seen.rid or job.rid
        seen.prompt_tokens += len(job.request.prompt)
        output = Output(self._tokenizer, job.stops, job.skip_special_tokens)
        with self._metrics.watch(job.request) as watch, _seen_by(watch):
            async with aclosing(self._engine.submit(job.request)) as emissions:
                async for emission in emissions:
                    pieces = output.take(emission)
                    watch.generated(len(pieces), emission)
                    seen.answer_tokens += len(pieces)
                    if output.finish is not None:
                        watch.finished(output.finish.reason)
                        yield index, output, pieces
                        return
                    yield index, output, pieces
            raise GenerationError("the engine ended the answer before it was finished")

    async def _run_all(self, jobs: Sequence[Job], render: Render[T]) -> AsyncGenerator[T, None]:
        updates: asyncio.Queue[T | Exception | None] = asyncio.Queue(len(jobs))  # full: the client reads too slowly
        turn = asyncio.Lock()  # events are sent in the order in which they are rendered: their ids count all sequences

        async def forward(index: int, job: Job) -> None:
            try:
                async with aclosing(self._run_one(index, job)) as own:
                    async for update in own:
                        async with turn:
                            await updates.put(render(*update))
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


def _on_terms(job: Job, terms: Terms) -> Job:
    """Whoever has another key has another request, though it be the same to the letter."""
    rid = job.request.rid
    if terms.tenant:
        rid = hashlib.blake2b(f"{rid} {terms.tenant}".encode(), digest_size=16).hexdigest()
    return replace(job, request=msgspec.structs.replace(job.request, rid=rid, name=job.rid, terms=terms))


@contextmanager
def _seen_by(watch: Watch) -> Iterator[None]:
    """What the metrics are told of a request that ends otherwise than by its answer."""
    try:
        yield
    except RefusedError as error:
        watch.refused(error.reason)
        raise
    except (TakenOverError, AbortedError):
        watch.finished("abort")
        raise
