"""The load of a steady cell in virtual time: the real engine core, each step at the price of the cost model.

Beside `plan.estimate`, which is a formula of means, it has the engine's own order of steps: who comes waits for the
step that has just begun, prompts that come together are computed together.
"""

import msgspec

from serve_app.bench.calibrate.steady import Load, Seen, seen
from serve_app.bench.measure import Trace
from serve_app.bench.settings import bench_config
from serve_app.bench.simulate.plan_costs import PlanCosts
from serve_app.engine.request import Emission, Request, SamplingParams, Terms
from serve_app.engine.slo import SloConfig
from serve_app.plan.fit import Case
from serve_app.plan.system import System
from serve_app.runtime.settings import engine_config
from serve_app.sim.serving.cell import Cell, CellSetup

ROUNDS = 6  # times that each place is filled
CLIENT_S = 0.002  # from an answer's end until the engine has the next request
EXTRA_PAGES = 2


def rehearse(case: Case, system: System, load: Load) -> Seen:
    """What `SteadyCell.steady` would see."""
    return _Rehearsal(case, system, load).run()


class _Rehearsal:
    def __init__(self, case: Case, system: System, load: Load) -> None:
        layout = case.deployment.layout
        config = bench_config("none", {}, 1, [load.workload])
        engine = msgspec.structs.replace(
            engine_config(config, case.spec, layout.num_stages), eos_token_ids=(), slo=SloConfig()
        )
        of_one = -(-(load.prompt_tokens + load.output_tokens) // engine.page_tokens) + EXTRA_PAGES
        setup = CellSetup(engine, layout, load.concurrency * of_one, PlanCosts(case.cost(system)))
        self._load = load
        self._traces: dict[str, Trace] = {}
        self._num_ended = 0
        self._window_s = 0.0
        self._cell = Cell(0, setup, self._hear)

    def run(self) -> Seen:
        load = self._load
        for i in range(load.concurrency):
            self._send(1 + i * load.output_tokens // load.concurrency)
        self._cell.advance()
        return seen(load, self._traces.values(), self._window_s, self._cell.now_s, [])

    def _send(self, output_tokens: int) -> None:
        rid = f"{len(self._traces)}"
        sampling = SamplingParams(max_new_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        self._traces[rid] = Trace(self._cell.now_s)
        prompt = [0] * self._load.prompt_tokens
        self._cell.submit(Request(rid, prompt, sampling, terms=Terms(is_accepted=True)))

    def _hear(self, emission: Emission, now_s: float) -> None:
        self._traces[emission.rid].add(now_s, len(emission.tokens))
        if emission.finish is None:
            return
        self._num_ended += 1
        if self._num_ended == self._load.concurrency:
            self._window_s = now_s
        if self._num_ended < (ROUNDS + 1) * self._load.concurrency:
            self._cell.at(now_s + CLIENT_S, self._send, self._load.output_tokens)
