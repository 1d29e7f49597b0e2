"""The in-process executor: the whole model in this process, driven by the same engine core. No Ray, no sockets."""

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from serve_app.config import OctavoConfig
from serve_app.engine.core import EngineConfig, EngineCore, EngineStats
from serve_app.engine.plan import Begin, Cancel, Emit, Event, Plan, Run, StepDone, Submit
from serve_app.engine.request import Emission, Request
from serve_app.model.batch import Batch
from serve_app.model.grammar import Grammars
from serve_app.model.moe import Experts, LocalExperts, Weights
from serve_app.model.sampling import sample
from serve_app.model.stage import Stage
from serve_app.model.timing import StepTimer
from serve_app.runtime.load import load_experts, load_grammars, load_stage
from serve_app.runtime.settings import engine_config
from serve_app.runtime.threads import ThreadGroup


class LocalEngine:
    """The whole model in one stage of `layout.tp` shards, and a core that plans for it. Use it from one thread."""

    def __init__(
        self, config: EngineConfig, stages: list[Stage], experts: Experts, grammars: Grammars | None = None
    ) -> None:
        self._core = EngineCore(config)
        self._stages = stages  # by shard; each is a thread where there are several
        self._group = ThreadGroup(len(stages)) if len(stages) > 1 else None
        self._experts = experts
        self._grammars = grammars
        self._plans: list[Plan] = []
        self._emissions: list[Emission] = []
        num_pages = min(stage.kv.num_pages for stage in stages)
        self._on(Begin(epoch=1, num_replicas=1, num_pages=num_pages))

    @classmethod
    def load(cls, weights: Weights, config: OctavoConfig, timer: StepTimer | None = None) -> "LocalEngine":
        """Read a model. Of the layout only `tp` is used: it alone decides the order of sums. OctavoError if it cannot.

        `timer`: of the first shard.
        """
        torch.set_num_threads(config.worker.num_threads)
        layers = range(weights.spec.num_layers)
        stages = [
            load_stage(weights, config, layers, shard, timer if shard == 0 else None)
            for shard in range(config.layout.tp)
        ]
        experts = LocalExperts(load_experts(weights, config))
        return cls(engine_config(config, weights.spec, num_stages=1), stages, experts, load_grammars(weights))

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
        first = self._stages[0]
        batch = Batch.from_plan(plan, first.page_tokens, first.device)
        chosen = sample(self._logits(batch), [part.sample for part in plan.slices if part.sample], self._grammars)
        return StepDone(plan.epoch, plan.replica, plan.step, *chosen)

    def _logits(self, batch: Batch) -> Tensor:
        if self._group is None:
            return self._stages[0].forward(batch, None, self._experts)
        shards = self._group.shards
        return self._group.run(lambda i: self._stages[i].forward(batch, None, self._experts, shards[i]))[0]

    def _on(self, event: Event) -> None:
        for command in self._core.on(event, time.monotonic()):
            match command:
                case Run(plan):
                    self._plans.append(plan)
                case Emit(emission):
                    self._emissions.append(emission)
