"""The engine of one cell: a pure state machine. Events go in; plans to run and tokens to emit come out.

Nothing here reads a clock, draws a random number or waits: the Ray cluster, the in-process executor and the simulator
all drive this same object, and a run can be replayed from its events.
"""

from collections import Counter

import msgspec

from serve_app.engine.plan import Begin, Cancel, Command, Emit, Event, Run, StepDone, Submit
from serve_app.engine.request import Emission, FinishReason, Request
from serve_app.engine.scheduler import EngineConfig, Scheduler, Totals
from serve_app.engine.sequence import Sequence

__all__ = ["EngineConfig", "EngineCore", "EngineStats"]


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot. Fields that end in `_total` and `num_stale` only ever grow."""

    running: int
    waiting: int
    kv_usage: float  # held pages / all pages; cached pages that nobody holds count as free
    num_pages: int  # of all replicas
    prompt_tokens_total: int  # of admitted requests, cached tokens included
    generation_tokens_total: int
    preemptions_total: int
    prefix_queries_total: int  # tokens
    prefix_hits_total: int  # tokens
    finished_total: dict[FinishReason, int]
    steps_total: int
    num_stale: int  # step results of another epoch, dropped


class EngineCore:
    """`on(event, now)` is all there is to drive; `stats` and `check_integrity` look on.

    A rid is known from its Submit to its last Emission. Before the first Begin, or while there is no replica,
    requests wait.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.epoch = -1
        self._schedulers: list[Scheduler] = []
        self._live: dict[str, Sequence] = {}  # in order of arrival
        self._totals = Totals()
        self._finished: Counter[FinishReason] = Counter()
        self._num_submitted = 0
        self._num_stale = 0

    def on(self, event: Event, now: float) -> list[Command]:
        """Take one event; return what follows. Plans come first: the stages should not wait for the ingress.

        `now` is in seconds, of any monotonic clock; nothing is due by time yet.
        """
        emissions = self._handle(event)
        commands: list[Command] = []
        for scheduler in self._schedulers:
            while (plan := scheduler.next_plan()) is not None:
                commands.append(Run(plan))
        commands.extend([Emit(emission) for emission in emissions])
        return commands

    def stats(self) -> EngineStats:
        """What the engine is doing and has done. O(replicas)."""
        num_running = sum(len(s.running) for s in self._schedulers)
        num_pages = sum(s.pool.num_pages for s in self._schedulers)
        return EngineStats(
            running=num_running,
            waiting=len(self._live) - num_running,
            kv_usage=sum(s.pool.num_held for s in self._schedulers) / num_pages if num_pages else 0.0,
            num_pages=num_pages,
            prompt_tokens_total=self._totals.prompt_tokens,
            generation_tokens_total=self._totals.generation_tokens,
            preemptions_total=self._totals.num_preemptions,
            prefix_queries_total=self._totals.prefix_query_tokens,
            prefix_hits_total=self._totals.prefix_hit_tokens,
            finished_total=dict(self._finished),
            steps_total=self._totals.num_steps,
            num_stale=self._num_stale,
        )

    def check_integrity(self) -> None:
        """Assert the conservation laws: of pages, and requests in = running + waiting + out. O(everything)."""
        for scheduler in self._schedulers:
            scheduler.check_integrity()
        placed = [rid for s in self._schedulers for rid in (*s.running, *s.waiting)]
        homeless = [rid for rid, seq in self._live.items() if seq.replica < 0]
        assert sorted(placed + homeless) == sorted(self._live), "a request is lost or in two places"
        assert self._num_submitted == len(self._live) + self._finished.total(), "requests in differ from those out"

    def _handle(self, event: Event) -> list[Emission]:
        match event:
            case StepDone():
                return self._step_done(event)
            case Submit(request):
                return self._submit(request)
            case Cancel(rid):
                return self._cancel(rid)
            case Begin():
                return self._begin(event)

    def _submit(self, request: Request) -> list[Emission]:
        if request.rid in self._live:
            return []
        seq = Sequence(request, self._num_submitted, self.config.eos_token_ids, self.config.max_context_tokens)
        self._num_submitted += 1
        self._live[seq.rid] = seq
        return self._place(seq)

    def _cancel(self, rid: str) -> list[Emission]:
        seq = self._live.get(rid)
        if seq is None:
            return []
        emission = seq.end("abort")
        if seq.replica >= 0:
            self._schedulers[seq.replica].drop(seq)
        self._forget(emission)
        return [emission]

    def _step_done(self, done: StepDone) -> list[Emission]:
        if done.epoch != self.epoch:
            self._num_stale += 1
            return []
        if not 0 <= done.replica < len(self._schedulers):
            return []
        emissions = self._schedulers[done.replica].step_done(done)
        for emission in emissions:
            if emission.finish is not None:
                self._forget(emission)
        return emissions

    def _begin(self, begin: Begin) -> list[Emission]:
        """A new membership: no KV and no step in flight survives, so every request is a fresh add of its tokens."""
        if begin.epoch <= self.epoch:
            return []
        self.epoch = begin.epoch
        self._schedulers = [
            Scheduler(self.config, begin.epoch, replica, begin.num_pages, self._totals)
            for replica in range(begin.num_replicas)
        ]
        emissions = []
        for seq in list(self._live.values()):
            seq.restart()
            emissions += self._place(seq)
        return emissions

    def _place(self, seq: Sequence) -> list[Emission]:
        """Give `seq` to the replica with the least work left then (what its prefix cache holds is none), or end it."""
        seq.replica = -1
        seq.limit_tokens = seq.max_tokens
        if self._schedulers:
            # the pool must hold all tokens but the last; what it cannot hold ends the request, it cannot block it
            capacity_tokens = self._schedulers[0].pool.num_pages * self.config.page_tokens
            seq.limit_tokens = min(seq.max_tokens, capacity_tokens + 1)
        if (reason := seq.verdict()) is not None:
            emission = seq.end(reason)
            self._forget(emission)
            return [emission]
        if self._schedulers:
            min(self._schedulers, key=lambda s: s.load_tokens - s.hit_tokens(seq)).add(seq)
        return []

    def _forget(self, emission: Emission) -> None:
        del self._live[emission.rid]
        assert emission.finish is not None
        self._finished[emission.finish] += 1
