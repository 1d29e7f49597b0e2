"""The in-process executor: the whole model in this process, driven by the same engine core. No Ray, no sockets."""

import time
from collections.abc import Iterable, Iterator

from serve_app.config import OctavoConfig
from serve_app.engine.core import EngineConfig, EngineCore, EngineStats
from serve_app.engine.plan import Begin, Cancel, Emit, Event, Plan, Run, StepDone, Submit
from serve_app.engine.request import Emission, Request
from serve_app.model.batch import Batch
from serve_app.model.moe import Experts, LocalExperts, Weights
from serve_app.model.sampling import sample
from serve_app.model.stage import Stage
from serve_app.model.timing import StepTimer
from serve_app.runtime.load import load_whole
from serve_app.runtime.settings import engine_config


class LocalEngine:
    """One stage that is the whole model, and an engine core that plans for it. Use it from one thread."""

    def __init__(self, config: EngineConfig, stage: Stage, experts: Experts, num_pages: int) -> None:
        self._core = EngineCore(config)
        self._stage = stage
        self._experts = experts
        self._plans: list[Plan] = []
        self._emissions: list[Emission] = []
        self._on(Begin(epoch=1, num_replicas=1, num_pages=num_pages))

    @classmethod
    def load(cls, weights: Weights, config: OctavoConfig, timer: StepTimer | None = None) -> "LocalEngine":
        """Read a model. The layout of `config` is not used: one stage, one replica. OctavoError if it cannot."""
        loaded = load_whole(weights, config, timer)
        settings = engine_config(config, weights.spec, num_stages=1)
        return cls(settings, loaded.stage, LocalExperts(loaded.host), loaded.num_pages)

    def submit(self, request: Request) -> None:
        self._on(Submit(request))

    def cancel(self, rid: str) -> None:
        self._on(Cancel(rid))

    def step(self) -> list[Emission]:
        """Run the next plan, if there is one, and return what was emitted since the last call."""
        if self._plans:
            self._on(self._execute(self._plans.pop(0)))
        emissions, self._emissions = self._emissions, []
        return emissions

    def generate(self, requests: Iterable[Request]) -> Iterator[Emission]:
        """Submit requests and yield their emissions until all have finished."""
        unfinished = set()
        for request in requests:
            unfinished.add(request.rid)
            self.submit(request)
        while unfinished:
            for emission in self.step():
                if emission.finish:
                    unfinished.discard(emission.rid)
                yield emission

    def stats(self) -> EngineStats:
        return self._core.stats()

    def check_integrity(self) -> None:
        self._core.check_integrity()

    def _execute(self, plan: Plan) -> StepDone:
        batch = Batch.from_plan(plan, self._stage.page_tokens, self._stage.device)
        logits = self._stage.forward(batch, None, self._experts)
        tokens, logprobs = sample(logits, [part.sample for part in plan.slices if part.sample])
        return StepDone(plan.epoch, plan.replica, plan.step, tokens, logprobs)

    def _on(self, event: Event) -> None:
        for command in self._core.on(event, time.monotonic()):
            match command:
                case Run(plan):
                    self._plans.append(plan)
                case Emit(emission):
                    self._emissions.append(emission)
