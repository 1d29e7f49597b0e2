"""A cell in virtual time: the real EngineCore, and pipelines whose steps take what hidden costs and some noise say.

Clients come in an open loop, at times of their own, and do what a refusal tells them: go, or come back then.
"""

import heapq
import math
import random
from dataclasses import dataclass, field

from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.pace import Observed, Work, dot, work_of
from serve_app.engine.plan import Arrivals, Begin, Emit, Refuse, Run, StepDone
from serve_app.engine.request import Emission, Refusal, Request, SamplingParams, Terms
from serve_app.engine.slo import SloConfig

HIDDEN = (0.02, 4e-4, 1e-3, 2e-5)  # seconds of a step, a prompt token, a decoding row, a thousand pairs
TTFT_S = 10.0
PAGES = 2_000


def slo_config(ttft_s=TTFT_S, **changes):
    target_s = math.inf if ttft_s is None else 0.85 * ttft_s
    return EngineConfig(
        **{
            "num_stages": 1,
            "page_tokens": 32,
            "max_running": 32,
            "max_step_tokens": 512,
            "max_context_tokens": 4_096,
            "slo": SloConfig(ttft_s=ttft_s, target_s=target_s),
            **changes,
        }
    )


def calibrated(costs=HIDDEN, slower=1.0):
    """What a calibration would have seen."""
    works = [Work(n, r, n * n / 2e3) for n, r in [(384, 0), (384, 4), (512, 0), (128, 8), (0, 8), (0, 4), (0, 1)]]
    return [Observed(work, slower * dot(costs, work.row)) for work in works]


@dataclass
class Visit:
    """A request, and what became of it."""

    request: Request
    came_s: float
    accepted_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    num_tokens: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    accepted_at_try: int | None = None
    late_refusal: bool = False

    @property
    def ttft_s(self):
        """Since it came for the time at which it was let in."""
        return math.inf if self.first_s is None else self.first_s - self.accepted_s


class World:
    """`num_sharing`: replicas on one machine: their steps take as many times longer as of them are busy."""

    def __init__(self, config=None, seed=0, num_replicas=1, noise=0.05, shares_machine=False, seeded=True, stall=0.0):
        self.config = config or slo_config()
        self.core = EngineCore(self.config)
        self.random = random.Random(seed)
        self.noise, self.shares_machine, self.stall = noise, shares_machine, stall
        self.now = 0.0
        self.visits: dict[str, Visit] = {}
        self.returns = lambda visit: False
        self.hidden = HIDDEN
        self.end_s: dict[int, float] = {}
        self.num_steps = 0
        self._events: list = []
        self._count = 0
        if seeded:
            for num in range(1, num_replicas + 1):
                self.core.paces.seed(num, calibrated(slower=num if shares_machine else 1.0))
        self.begin(num_replicas)

    # -- what happens ---------------------------------------------------------------------------------------------

    def at(self, when_s, do):
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, do))

    def begin(self, num_replicas, resting=(), kept=()):
        self.end_s = {i: self.now for i in range(num_replicas) if i not in resting}
        self.on(Begin(self.core.epoch + 1, num_replicas, PAGES, resting, kept))

    def come(self, request, when_s=None):
        when_s = self.now if when_s is None else when_s
        visit = self.visits[request.rid] = Visit(request, when_s)
        self.at(when_s, lambda: self.enter(visit))
        return visit

    def enter(self, visit):
        visit.accepted_s = self.now
        self.on(Arrivals([visit.request]))
        if visit.refusals and visit.accepted_s is None:
            return
        if visit.accepted_at_try is None:
            visit.accepted_at_try = len(visit.refusals)

    def run(self, until_s=math.inf):
        while self._events and self._events[0][0] <= until_s:
            self.now, _, do = heapq.heappop(self._events)
            do()
        if until_s < math.inf:
            self.now = until_s

    # -- the cell -------------------------------------------------------------------------------------------------

    def on(self, event):
        commands = self.core.on(event, self.now)
        for command in commands:
            match command:
                case Run(plan):
                    self._issue(plan)
                case Emit(emission):
                    self._emit(emission)
                case Refuse(refusal):
                    self._refused(refusal)
        return commands

    def _issue(self, plan):
        num_busy = 1
        if self.shares_machine:
            num_busy = sum(end_s > self.now for i, end_s in self.end_s.items() if i != plan.replica) + 1
        took_s = dot(self.hidden, work_of(plan.slices).row) * num_busy * math.exp(self.random.gauss(0, self.noise))
        if self.random.random() < self.stall:
            took_s *= 5
        fill_s = (self.config.num_stages - 1) * took_s
        end_s = self.end_s[plan.replica] = max(self.now + fill_s, self.end_s[plan.replica]) + took_s
        self.at(end_s, lambda: self._done(plan))

    def _done(self, plan):
        num = sum(part.sample is not None for part in plan.slices)
        self.num_steps += 1
        self.on(StepDone(plan.epoch, plan.replica, plan.step, [7] * num, [0.0] * num))

    def _emit(self, emission: Emission):
        visit = self.visits[emission.rid]
        if emission.tokens and visit.first_s is None:
            visit.first_s = self.now
        visit.num_tokens += len(emission.tokens)
        if emission.finish is not None:
            visit.ended_s = self.now

    def _refused(self, refusal):
        visit = self.visits[refusal.rid]
        if visit.accepted_at_try is not None:
            visit.late_refusal = True
            return
        visit.refusals.append(refusal)
        visit.accepted_s = None
        if self.returns(visit):
            self.at(self.now + refusal.retry_after_s, lambda: self.enter(visit))

    # -- what is seen ---------------------------------------------------------------------------------------------

    def accepted(self, since_s=0.0):
        return [v for v in self.visits.values() if v.accepted_at_try is not None and v.accepted_s >= since_s]

    def attainment(self, since_s=0.0):
        """Share of those let in whose first token came in time."""
        accepted = self.accepted(since_s)
        return sum(v.ttft_s <= (v.request.terms.ttft_s or TTFT_S) for v in accepted) / max(1, len(accepted))

    def goodput(self, since_s, until_s):
        """First tokens in time, a second."""
        good = [v for v in self.accepted() if since_s <= (v.first_s or 0) < until_s and v.ttft_s <= TTFT_S]
        return len(good) / (until_s - since_s)

    def served_tokens(self, since_s, until_s):
        """Of the prompts with a first token then, in time or not: the same whoever is let in, where all is used."""
        return sum(len(v.request.prompt) for v in self.visits.values() if since_s <= (v.first_s or 0) < until_s)

    def lost(self):
        return [v for v in self.accepted() if v.ended_s is None and not v.late_refusal]


def mixed(rng, i, tenant="", most=2_000, **terms):
    """A request of 16 to 2,000 prompt tokens, and 4 to 64 of answer."""
    num = int(math.exp(rng.uniform(math.log(16), math.log(most))))
    prompt = [i % 50_000, *(rng.randrange(100) for _ in range(3)), *([5] * (num - 4))]
    sampling = SamplingParams(max_new_tokens=rng.randint(4, 64))
    return Request(f"{tenant}{i}", prompt, sampling, terms=Terms(tenant=tenant, **terms))


def crowd(world, rate, until_s, rng, since_s=0.0, make=mixed, **terms):
    """Poisson arrivals."""
    when_s, i = since_s, len(world.visits)
    while (when_s := when_s + rng.expovariate(rate)) < until_s:
        world.come(make(rng, i, **terms), when_s)
        i += 1


def capacity(config=None, seed=1, **world):
    """Requests a second that are served where there are always more, and none is refused."""
    made = World(slo_config(None) if config is None else config, seed, **world)
    crowd(made, 20.0, 60.0, random.Random(seed))
    made.run(60.0)
    return sum(v.first_s is not None for v in made.visits.values()) / 60.0
