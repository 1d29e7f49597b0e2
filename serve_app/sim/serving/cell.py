"""One cell in virtual time: the real engine core, its workers' pipelines, and losses.

It stands still between the calls of `advance`, so that many cells can be moved along as their clients need them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from serve_app.engine.bounds import EngineConfig
from serve_app.engine.core import EngineCore
from serve_app.engine.pace import Observed
from serve_app.engine.plan import Arrivals, Begin, Cancel, Emit, Event, Plan, Refuse, Run, StepDone
from serve_app.engine.request import Emission, Refusal, Request
from serve_app.experts.layout import Layout, Seat
from serve_app.sim.serving.costs import StepCosts
from serve_app.sim.serving.losses import Loss, Outage, Phases
from serve_app.sim.serving.pipelines import Flight, Pipelines
from serve_app.sim.serving.spans import Spans

TOKEN = 7  # that every step samples; it ends no answer

Hear = Callable[[Emission, float], None]


@dataclass(frozen=True)
class CellSetup:
    """What all cells of a simulation have in common."""

    engine: EngineConfig
    layout: Layout
    num_pages: int  # KV pages of one replica
    costs: StepCosts
    pace: tuple[Observed, ...] = ()  # what the engine knows of the whole cell's pace at first

    def __post_init__(self) -> None:
        assert self.engine.num_stages == self.costs.num_stages == self.layout.num_stages
        assert TOKEN not in self.engine.eos_token_ids, "answers must have the length that was asked for"


class Cell:
    """`submit` and `advance` drive it; `hear` is told of all tokens. Times are seconds of the run."""

    def __init__(self, number: int, setup: CellSetup, hear: Hear, spans: Spans | None = None) -> None:
        self.number = number
        self.core = EngineCore(setup.engine)
        self.outages: list[Outage] = []
        self.num_open = 0  # requests that are let in and have not ended
        self._setup = setup
        self._hear = hear
        self._spans = spans
        self._pipelines = Pipelines(setup.costs, setup.layout.num_replicas, None if spans is None else self._see)
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._seats = setup.layout.seats()
        self._vacant: set[Seat] = set()
        self._renewed: set[int] = set()  # replicas that have lost a worker since the present epoch began
        self._resting: set[int] = set()  # in the present epoch
        self._paused_s: float | None = None  # since when it stands still
        self._num_forms = 0
        self._form_s = 0.0  # when the last of these may begin
        if setup.pace:
            self.core.paces.seed(setup.layout.num_replicas, setup.pace)
        self._begin()

    @property
    def now_s(self) -> float:
        return self._pipelines.now_s

    # -- time ---------------------------------------------------------------------------------------------------------

    def at(self, when_s: float, action: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heappush(self._due, (when_s, self._order, action, args))

    def advance(self, until_s: float = math.inf) -> None:
        """Let all happen that is due until then; by default until nothing is left to happen."""
        pipelines, due = self._pipelines, self._due
        while True:
            end_s = pipelines.next_s
            due_s = due[0][0] if due else math.inf
            next_s = min(end_s, due_s)
            if next_s > until_s or next_s == math.inf:
                break
            pipelines.pass_until(next_s)
            if due_s <= end_s:
                _, _, action, args = heappop(due)
                action(*args)
            elif (plan := pipelines.advance()) is not None:
                self._done(plan)
        if until_s < math.inf:
            pipelines.pass_until(until_s)

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Refusal | None:
        """It arrives now. What it is refused with, or None."""
        self.num_open += 1
        refusals = self._on(Arrivals([request]))
        return next((refusal for refusal in refusals if refusal.rid == request.rid), None)

    def cancel(self, rid: str) -> None:
        """Its client has gone."""
        self._on(Cancel(rid))

    def _on(self, event: Event) -> list[Refusal]:
        refusals = []
        for command in self.core.on(event, self.now_s):
            match command:
                case Emit(emission):
                    self.num_open -= emission.finish is not None
                    self._hear(emission, self.now_s)
                case Run(plan):
                    if self._paused_s is None:  # a plan of an epoch that is being left reaches nobody
                        self._pipelines.issue(plan)
                case Refuse(refusal):
                    self.num_open -= 1
                    refusals.append(refusal)
        return refusals

    def _done(self, plan: Plan) -> None:
        num = sum(part.sample is not None for part in plan.slices)
        for outage in self.outages:
            if math.isnan(outage.token_s) and not math.isnan(outage.began_s):
                outage.token_s = self.now_s
        self._on(StepDone(plan.epoch, plan.replica, plan.step, [TOKEN] * num, [0.0] * num))

    # -- losses -------------------------------------------------------------------------------------------------------

    def expect(self, loss: Loss) -> None:
        """It is going to happen."""
        self.at(loss.at_s, self._lose, self._seats[loss.worker], loss)

    def _lose(self, seat: Seat, loss: Loss) -> None:
        """All stand still at once: each step needs experts of every worker of its stage."""
        if seat in self._vacant:
            return
        self.outages.append(Outage(self.number, loss.worker, seat.replica, self.now_s))
        self._vacant.add(seat)
        self._renewed.add(seat.replica)
        self._form(loss.phases.pause_s)
        self.at(self.now_s + loss.phases.notice_s + loss.phases.refill_s, self._refill, seat, loss.phases)

    def _refill(self, seat: Seat, phases: Phases) -> None:
        self._vacant.discard(seat)
        self._form(phases.form_s)

    def _form(self, after_s: float) -> None:
        """Stand still until a new epoch begins; of several that are called for only the last one does."""
        if self._paused_s is None:
            self._paused_s = self.now_s
        self._pipelines.halt()
        self._num_forms += 1
        self._form_s = max(self._form_s, self.now_s + after_s)
        self.at(self._form_s, self._formed, self._num_forms)

    def _formed(self, number: int) -> None:
        if number == self._num_forms and len(self._broken) < self._setup.layout.num_replicas:
            self._note("pause", self._paused_s)
            self._paused_s = None
            self._begin()

    @property
    def _broken(self) -> set[int]:
        return {seat.replica for seat in self._vacant}

    def _begin(self) -> None:
        num_replicas, resting = self._setup.layout.num_replicas, self._broken
        kept = set(range(num_replicas)) - resting - self._renewed - self._resting
        self._resting, self._renewed = resting, set()
        for outage in self._unsettled():
            outage.began_s = self.now_s if math.isnan(outage.began_s) else outage.began_s
            if self._seats[outage.worker] not in self._vacant:
                outage.whole_s = self.now_s
        epoch = self.core.epoch + 1
        self._on(Begin(epoch, num_replicas, self._setup.num_pages, tuple(sorted(resting)), tuple(sorted(kept))))

    def _unsettled(self) -> Iterator[Outage]:
        return (outage for outage in self.outages if math.isnan(outage.whole_s))

    # -- what is seen -------------------------------------------------------------------------------------------------

    def _see(self, flight: Flight, now_s: float) -> None:
        assert self._spans is not None
        self._spans.step(self.number, flight, now_s)

    def _note(self, name: str, begun_s: float | None) -> None:
        if self._spans is not None and begun_s is not None:
            self._spans.add(f"cell {self.number}", name, begun_s, self.now_s)
