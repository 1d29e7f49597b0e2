"""Single steps of a whole model in this process: what computing costs, without engine and messages."""

import random
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from serve_app.bench.calibrate.machine import timed_s
from serve_app.bench.measure import Workload
from serve_app.bench.settings import bench_config
from serve_app.engine.plan import Plan, Sample, Slice
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.batch import Batch
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.moe import LocalExperts
from serve_app.model.sampling import sample
from serve_app.plan.fit import Case, Observation
from serve_app.plan.ops import Step
from serve_app.runtime.load import load_experts, load_stage
from serve_app.runtime.settings import check

MIN_REPEATS, MAX_REPEATS = 1, 12
SAMPLED = Sample(1.0, 0, 1.0, 0.0, 0, 0, False)

Part = tuple[int, int]  # (tokens, start) of one slice
PROMPTS: tuple[Part, ...] = ((16, 0), (64, 0), (128, 0), (256, 0), (512, 0), (128, 1024), (256, 2000))
DECODES = (
    (1, 64),
    (2, 64),
    (4, 64),
    (8, 64),
    (16, 64),
    (32, 64),
    (48, 128),
    (1, 1024),
    (8, 1024),
    (32, 512),
    (1, 4000),
)
MIXED = ((8, 256, 128), (16, 96, 64), (4, 1024, 256))  # rows, their context, tokens of a prompt beside


class StepBench:
    """A loaded model to run steps of. OctavoError where it cannot be."""

    def __init__(self, model: str, num_threads: int, kv_gib: float = 1.0) -> None:
        config = bench_config(model, {}, num_threads, [Workload(1, 1, 1)], kv_gib)
        self.spec = check(config)
        torch.set_num_threads(num_threads)
        weights = Checkpoint.open(resolve(config.model, silent, fetch=False))
        begun_s = time.perf_counter()
        self._stage = load_stage(weights, config, range(self.spec.num_layers), 0, None)
        self._experts = LocalExperts(load_experts(weights, config))
        self.load_s = time.perf_counter() - begun_s
        self._page = 0
        self._draw = random.Random(0)

    def observe(self, case: Case, seconds: float) -> Iterator[Observation]:
        """Each step several times within about `seconds` for all; the middle one counts."""
        shapes = list(self._shapes())
        for parts in shapes:
            yield Observation(case, step_of_parts(parts), self._middle_s(parts, seconds / len(shapes)), "alone")

    def _shapes(self) -> Iterator[list[Part]]:
        """Those that context and KV have room for."""
        most = min(self.spec.max_positions, self._num_tokens)
        every: list[list[Part]] = [[part] for part in PROMPTS]
        every += [[(1, context)] * rows for rows, context in DECODES]
        every += [[(1, context)] * rows + [(tokens, 0)] for rows, context, tokens in MIXED]
        for parts in every:
            if max(map(sum, parts)) <= most and sum(map(sum, parts)) <= self._num_tokens:
                yield parts

    @property
    def _num_tokens(self) -> int:
        """That the KV pages hold."""
        return self._stage.kv.num_pages * self._stage.page_tokens

    def _middle_s(self, parts: Sequence[Part], seconds: float) -> float:
        self._run(parts)  # kernels of new sizes are compiled, pages touched
        until_s = time.perf_counter() + seconds
        found: list[float] = []
        while len(found) < MIN_REPEATS or (len(found) < MAX_REPEATS and time.perf_counter() < until_s):
            found.append(timed_s(lambda: self._run(parts), self._stage.device))
        return statistics.median(found)

    def _run(self, parts: Sequence[Part]) -> None:
        plan = Plan(1, 0, 0, [self._slice(tokens, start) for tokens, start in parts])
        batch = Batch.from_plan(plan, self._stage.page_tokens, self._stage.device)
        logits = self._stage.forward(batch, None, self._experts)
        sample(logits, [part.sample for part in plan.slices if part.sample], None)

    def _slice(self, num_tokens: int, start: int) -> Slice:
        num_pages, total = -(-(start + num_tokens) // self._stage.page_tokens), self._stage.kv.num_pages
        pages = [(self._page + i) % total for i in range(num_pages)]
        self._page = (self._page + num_pages) % total
        tokens = [self._draw.randrange(self.spec.vocab_size) for _ in range(num_tokens)]
        return Slice(start, tokens, pages, SAMPLED)


def step_of_parts(parts: Sequence[Part]) -> Step:
    """The cost model's step. Each slice samples."""
    whole = Step()
    for num_tokens, start in parts:
        whole += Step.decode(1, start + 1) if num_tokens == 1 else Step.prompt(num_tokens, start, sampled=1)
    return whole
