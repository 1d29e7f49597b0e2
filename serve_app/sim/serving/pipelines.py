"""The workers of a cell in virtual time: each replica's stages, each of which computes one step at a time.

Steps go through the stages in the order of their issue. Where workers share a machine, all that is under way is
slowed down alike, by how many are at work at the moment: so a clock of work is kept beside that of time, which runs
the slower the more there are, and a step's end lies fixed on it.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from serve_app.engine.plan import Plan
from serve_app.sim.serving.costs import StepCosts, StepWork, work_of

Watch = Callable[["Flight", float], None]  # a step leaves a stage, at a time in seconds


@dataclass(slots=True)
class Flight:
    """A step on its way."""

    plan: Plan
    work: StepWork
    stage: int = 0
    begun_s: float = 0.0  # on its present stage


@dataclass(slots=True)
class _Stage:
    waiting: deque[Flight] = field(default_factory=deque)
    is_busy: bool = False


class Pipelines:
    """`issue` begins a step; `next_s` tells when the next stage is done with one, `advance` lets it happen."""

    def __init__(self, costs: StepCosts, num_replicas: int, watch: Watch | None = None) -> None:
        self._costs = costs
        self._num_stages = costs.num_stages
        self._num_replicas = num_replicas
        self._watch = watch
        self.now_s = 0.0
        self._work_s = 0.0  # the clock of work
        self._order = 0
        self.halt()

    def halt(self) -> None:
        """Drop all that is under way."""
        self._stages = [[_Stage() for _ in range(self._num_stages)] for _ in range(self._num_replicas)]
        self._ends: list[tuple[float, int, Flight]] = []  # on the clock of work
        self._num_at_work = [0] * self._num_replicas  # stages
        self._set_slowdown()

    def _set_slowdown(self) -> None:
        self._slowdown = self._costs.slowdown(len(self._ends))

    @property
    def next_s(self) -> float:
        """When a stage will be done with a step; inf while nothing is under way."""
        if not self._ends:
            return math.inf
        return self.now_s + max(0.0, self._ends[0][0] - self._work_s) * self._slowdown

    def pass_until(self, now_s: float) -> None:
        """Time passes in which nothing ends."""
        self._work_s += (now_s - self.now_s) / self._slowdown
        self.now_s = now_s

    def issue(self, plan: Plan) -> None:
        flight = Flight(plan, work_of(plan.slices))
        stage = self._stages[plan.replica][0]
        if stage.is_busy:
            stage.waiting.append(flight)
        else:
            self._begin(flight, stage)

    def advance(self) -> Plan | None:
        """Let the next stage be done with its step, now; the plan if it was the last stage."""
        self._work_s, _, flight = heappop(self._ends)
        if self._watch is not None:
            self._watch(flight, self.now_s)
        replica, number = flight.plan.replica, flight.stage
        stages = self._stages[replica]
        stage = stages[number]
        stage.is_busy = False
        self._num_at_work[replica] -= 1
        is_last = number + 1 == self._num_stages
        if not is_last:
            flight.stage = number + 1
            following = stages[number + 1]
            if following.is_busy:
                following.waiting.append(flight)
            else:
                self._begin(flight, following)
        if stage.waiting:
            self._begin(stage.waiting.popleft(), stage)
        self._set_slowdown()
        return flight.plan if is_last else None

    def _begin(self, flight: Flight, stage: _Stage) -> None:
        replica = flight.plan.replica
        stage.is_busy = True
        self._num_at_work[replica] += 1
        num_busy = sum(map(bool, self._num_at_work))
        self._order += 1
        flight.begun_s = self.now_s
        took_s = self._costs.stage_s(flight.stage, flight.work, num_busy)
        heappush(self._ends, (self._work_s + took_s, self._order, flight))
        self._set_slowdown()
