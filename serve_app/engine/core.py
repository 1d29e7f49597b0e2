"""The engine of one cell: a pure state machine. Events go in; plans to run and tokens to emit come out.

Nothing here reads a clock, draws a random number or waits: the Ray cluster, the in-process executor and the simulator
all drive this same object, and a run can be replayed from its events.
"""

from collections import Counter, OrderedDict

import msgspec

from serve_app.engine.bounds import EngineConfig, Totals
from serve_app.engine.forecast import foresee, prompt_tokens, wait_s
from serve_app.engine.pace import Observed, Pace, Paces, Work
from serve_app.engine.plan import (
    Abort,
    Arrivals,
    Begin,
    Cancel,
    Command,
    Emit,
    Event,
    Plan,
    Refuse,
    Run,
    StepDone,
    Submit,
)
from serve_app.engine.request import Emission, FinishReason, Refusal, Request
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Sequence
from serve_app.engine.slo import Admission, Forecast, Queue

__all__ = ["EngineConfig", "EngineCore", "EngineStats"]

MAX_FRUITLESS = 8  # times that a request may lose the workers it runs on without a token in between: is it the cause?
MAX_KEPT = 10_000  # requests that have ended, kept for those who ask again


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
    budget_tokens: int = 0  # prompt tokens that would be let in now at the server's objective; 0 without one
    refused_total: dict[str, int] = {}  # by reason
    replayed_total: int = 0  # running requests that were added again, because their replica or their engine was lost


class EngineCore:
    """`on(event, now)` is all there is to drive; `stats` and `check_integrity` look on.

    A rid is known from its Submit until `keep_s` after its last Emission. Before the first Begin, or while there is no
    replica, requests wait.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.epoch = -1
        self._schedulers: dict[int, Scheduler] = {}  # by replica; those that rest have none
        self._live: dict[str, Sequence] = {}  # in order of arrival
        self._kept: OrderedDict[str, tuple[float, Sequence]] = OrderedDict()  # ended: until when they are remembered
        self._totals = Totals()
        self._finished: Counter[FinishReason] = Counter()
        self._num_submitted = 0
        self._num_stale = 0
        self._now_s = 0.0
        self._without_s = 0.0  # since when there has been no replica
        self._refusals: list[Refusal] = []
        self.paces = Paces()
        self.admission = Admission(config.slo)

    def on(self, event: Event, now: float) -> list[Command]:
        """Take one event; return what follows. Plans come first: the stages should not wait for the ingress.

        `now` is in seconds, of any monotonic clock.
        """
        self._now_s = now
        self._forget_kept()
        reruns, emissions = self._handle(event)
        commands: list[Command] = [Run(plan) for plan in reruns]
        for scheduler in self._schedulers.values():
            while (plan := scheduler.next_plan(self._pace, now)) is not None:
                commands.append(Run(plan))
        commands.extend([Emit(emission) for emission in emissions])
        refusals, self._refusals = self._refusals, []
        commands.extend([Refuse(refusal) for refusal in refusals])
        return commands

    def stats(self) -> EngineStats:
        """What the engine is doing and has done. O(all that waits): the budget depends on it."""
        num_running = sum(len(s.running) for s in self._schedulers.values())
        num_pages = sum(s.pool.num_pages for s in self._schedulers.values())
        return EngineStats(
            running=num_running,
            waiting=len(self._live) - num_running,
            kv_usage=sum(s.pool.num_held for s in self._schedulers.values()) / num_pages if num_pages else 0.0,
            num_pages=num_pages,
            prompt_tokens_total=self._totals.prompt_tokens,
            generation_tokens_total=self._totals.generation_tokens,
            preemptions_total=self._totals.num_preemptions,
            prefix_queries_total=self._totals.prefix_query_tokens,
            prefix_hits_total=self._totals.prefix_hit_tokens,
            finished_total=dict(self._finished),
            steps_total=self._totals.num_steps,
            num_stale=self._num_stale,
            budget_tokens=self._budget_tokens(),
            refused_total=dict(self.admission.refused),
            replayed_total=self._totals.num_replayed,
        )

    def check_integrity(self) -> None:
        """Assert the conservation laws: of pages, and requests in = running + waiting + out. O(everything)."""
        for scheduler in self._schedulers.values():
            scheduler.check_integrity()
        placed = [rid for s in self._schedulers.values() for rid in (*s.running, *s.waiting)]
        homeless = [rid for rid, seq in self._live.items() if seq.replica < 0]
        assert sorted(placed + homeless) == sorted(self._live), "a request is lost or in two places"
        assert self._num_submitted == len(self._live) + self._finished.total(), "requests in differ from those out"

    def _handle(self, event: Event) -> tuple[list[Plan], list[Emission]]:
        """Plans to run again, and emissions."""
        match event:
            case StepDone():
                return [], self._step_done(event)
            case Submit(request):
                return [], self._submit(request)
            case Arrivals(requests):
                return [], [emission for request in requests for emission in self._submit(request)]
            case Cancel(rid):
                return [], self._cancel(rid)
            case Abort(name, tenant):
                return [], self._abort(name, tenant)
            case Begin():
                return self._begin(event)

    def _submit(self, request: Request) -> list[Emission]:
        if (known := self._known(request.rid)) is not None:
            again = known.again(len(request.emitted))
            return [again] if again.tokens or again.finish else []
        seq = Sequence(request, self._num_submitted, self.config.eos_token_ids, self.config.max_context_tokens)
        seq.promise(self._now_s - request.terms.waited_s, self.admission.objective_s(request))
        forecast = None
        if not request.terms.is_accepted and not request.emitted:
            forecast = self._forecast(seq)
            refusal = self._judge(seq, forecast)
            if refusal is not None:
                self._refusals.append(refusal)
                return []
        self._num_submitted += 1
        self._totals.num_replayed += bool(request.emitted)
        self._live[seq.rid] = seq
        return self._place(seq, None if forecast is None else forecast.replica)

    def _known(self, rid: str) -> Sequence | None:
        kept = self._kept.get(rid)
        return self._live.get(rid) if kept is None else kept[1]

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
        scheduler = self._schedulers.get(done.replica)
        if scheduler is None:
            return []
        self._observe(scheduler.observed(done.step, self._now_s))
        emissions = [self._first(e) if e.first == 0 else e for e in scheduler.step_done(done)]
        for emission in emissions:
            if emission.finish is not None:
                self._forget(emission)
        for seq in scheduler.late(self._now_s):
            self._refusals.append(self.admission.late(seq.request))
            scheduler.drop(seq)
            self._forget(seq.end("abort"))
        return emissions

    def _begin(self, begin: Begin) -> tuple[list[Plan], list[Emission]]:
        """A new membership. Kept replicas run their steps in flight again; who was on others is added afresh.

        So is, without loss, who only waits: there may be a better place now.
        """
        if begin.epoch <= self.epoch:
            return [], []
        is_first, self.epoch = self.epoch < 0, begin.epoch
        before = self._schedulers
        self._schedulers = {
            replica: before[replica]
            if replica in begin.kept and replica in before
            else Scheduler(self.config, begin.epoch, replica, begin.num_pages, self._totals)
            for replica in range(begin.num_replicas)
            if replica not in begin.resting
        }
        reruns: list[Plan] = []
        emissions: list[Emission] = []
        for replica, scheduler in self._schedulers.items():
            if scheduler is before.get(replica):
                reruns += scheduler.renew(begin.epoch)
                for seq in scheduler.take_waiting():
                    seq.replica = -1
        if not self._schedulers and (before or is_first):
            self._without_s = self._now_s
        for seq in list(self._live.values()):
            if seq.replica < 0 or self._schedulers.get(seq.replica) is not before.get(seq.replica, None):
                emissions += self._replay(seq)
        return reruns, emissions

    def _replay(self, seq: Sequence) -> list[Emission]:
        """A fresh add of all its tokens. A request that seems to kill whoever runs it ends with an error."""
        if seq.num_in_flight and seq.lose_again() > MAX_FRUITLESS:
            emission = seq.end("error")
            self._forget(emission)
            return [emission]
        self._totals.num_replayed += bool(seq.num_done or seq.num_in_flight)
        seq.restart()
        return self._place(seq)

    def _place(self, seq: Sequence, replica: int | None = None) -> list[Emission]:
        """Give `seq` to the replica with the least work left then (what its prefix cache holds is none), or end it.

        `replica`: of its forecast. Who comes again in hundreds, after a loss, is placed without one: that is O(queue).
        """
        seq.replica = -1
        seq.limit_tokens = seq.max_tokens
        if self._schedulers:
            # the pool must hold all tokens but the last; what it cannot hold ends the request, it cannot block it
            num_pages = min(scheduler.pool.num_pages for scheduler in self._schedulers.values())
            seq.limit_tokens = min(seq.max_tokens, num_pages * self.config.page_tokens + 1)
        if (reason := seq.verdict()) is not None:
            emission = seq.end(reason)
            self._forget(emission)
            return [emission]
        if self._schedulers:
            self._schedulers[self._best_for(seq) if replica is None else replica].add(seq)
        return []

    def _best_for(self, seq: Sequence) -> int:
        return min(self._schedulers.items(), key=lambda item: item[1].load_tokens - item[1].hit_tokens(seq))[0]

    # -- the objective -------------------------------------------------------------------------------------------------

    @property
    def num_replicas(self) -> int:
        """That serve now."""
        return len(self._schedulers)

    @property
    def _pace(self) -> Pace | None:
        """Of the replicas that serve now; None without an objective: nobody asks then what steps take."""
        slo = self.config.slo
        return self.paces.of(len(self._schedulers)) if slo.ttft_s is not None or slo.itl_s is not None else None

    def _observe(self, observed: Observed | None) -> None:
        """Only what happened while every replica was at work tells what a full cell can do."""
        if observed is not None and self._pace is not None and all(s.is_busy for s in self._schedulers.values()):
            self._pace.observe(observed)

    def _forecast(self, seq: Sequence) -> Forecast | None:
        """Of the replica where its first token comes soonest; None while nothing is known."""
        pace = self._pace
        if self.config.slo.ttft_s is None or pace is None or pace.costs is None:
            return None
        forecasts = [
            foresee(scheduler, seq, pace, self._now_s, self.admission.bias) for scheduler in self._schedulers.values()
        ]
        return min(forecasts, key=lambda f: (f.harms, f.ttft_s, f.load_tokens), default=None)

    def _judge(self, seq: Sequence, forecast: Forecast | None) -> Refusal | None:
        request, schedulers = seq.request, self._schedulers.values()
        token_s = pace.costs[1] if (pace := self._pace) is not None and pace.costs is not None else 0.0
        counts = [prompt_tokens(s, request.terms.tenant) for s in schedulers]
        num_own, num_tokens = sum(own for own, _ in counts), sum(total for _, total in counts)
        num_queued = sum(len(s.waiting) for s in schedulers)
        if not schedulers:
            num_queued, num_tokens = len(self._live), sum(len(s.tokens) for s in self._live.values())
        queue = Queue(num_queued, num_tokens, num_own / max(1, num_tokens), token_s * num_tokens)
        outage_s = self._now_s - self._without_s if not schedulers and self.epoch >= 0 else None
        refusal = self.admission.judge(request, forecast, queue, len(schedulers), self._now_s, outage_s)
        if refusal is None and forecast is not None:
            seq.foreseen_s = forecast.ttft_s
            seq.predicted_ttft_s = forecast.ttft_s * self.admission.middle + request.terms.waited_s
        return refusal

    def _first(self, emission: Emission) -> Emission:
        """A request's first token: what was predicted of it is learned from, and told."""
        seq = self._live.get(emission.rid)
        if seq is None or seq.predicted_ttft_s is None:
            return emission
        self.admission.learn(seq.foreseen_s, self._now_s - seq.submitted_s - seq.request.terms.waited_s)
        return msgspec.structs.replace(
            emission, predicted_ttft_s=seq.predicted_ttft_s, queued_s=max(0.0, seq.planned_s - seq.submitted_s)
        )

    def _budget_tokens(self) -> int:
        pace = self._pace
        if self.config.slo.ttft_s is None or pace is None or pace.costs is None or pace.costs[1] <= 0:
            return 0
        token_s = (pace.step_s(Work(self.config.max_step_tokens)) / self.config.max_step_tokens) * self.admission.bias
        return sum(int(self.admission.budget_s(wait_s(s, pace)) / token_s) for s in self._schedulers.values())

    def _abort(self, name: str, tenant: str | None) -> list[Emission]:
        """End all requests of this name ("": of any), of one tenant or of all (None)."""
        rids = [
            rid
            for rid, seq in self._live.items()
            if name in {"", seq.request.name} and tenant in {None, seq.request.terms.tenant}
        ]
        return [emission for rid in rids for emission in self._cancel(rid)]

    @property
    def is_idle(self) -> bool:
        """No request is known, and no step is in flight."""
        return not self._live and not any(s.is_busy for s in self._schedulers.values())

    def reset_totals(self) -> None:
        """Forget what was counted: it was a rehearsal. The engine must be idle."""
        assert self.is_idle, "requests are live, or steps in flight"
        self._totals = Totals()
        for scheduler in self._schedulers.values():
            scheduler.forget(self._totals)
        self._finished.clear()
        self._kept.clear()
        self._num_submitted = 0

    def _forget(self, emission: Emission) -> None:
        """Out of the living; its tokens are kept for a while."""
        seq = self._live.pop(emission.rid)
        assert emission.finish is not None
        self._finished[emission.finish] += 1
        if emission.finish != "abort" and self.config.keep_s > 0:
            self._kept[emission.rid] = (self._now_s + self.config.keep_s, seq)

    def _forget_kept(self) -> None:
        while self._kept and (len(self._kept) > MAX_KEPT or next(iter(self._kept.values()))[0] <= self._now_s):
            self._kept.popitem(last=False)
