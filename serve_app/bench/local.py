"""A benchmark of the whole model in this process: no HTTP, no cluster, only the engine core and the model step."""

import time
from collections.abc import Sequence

from serve_app.bench.measure import Advance, BenchError, Figures, Trace, Workload, figures
from serve_app.config import parse_config
from serve_app.engine.request import Request, SamplingParams
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.spec import ModelSpec
from serve_app.model.timing import StepTimer
from serve_app.runtime.local import LocalEngine
from serve_app.runtime.settings import check

_WARM_UP = Workload(2, 16, 4)  # first touches are slow


class LocalBench:
    """A loaded model to run `workloads` on. OctavoError where it cannot be, or they do not fit its context."""

    def __init__(self, model: str, threads: int, workloads: Sequence[Workload]) -> None:
        config = parse_config(
            {
                "model": model,
                "worker": {"num_threads": threads},
                "scheduler": {
                    "max_running": 1024,
                    "max_context_tokens": max(map(_num_tokens, (_WARM_UP, *workloads))),
                    "prefix_cache": False,
                },
            }
        )
        self._timer = StepTimer()
        spec = check(config)
        _check_context(spec, workloads)
        self._vocab_size = spec.vocab_size
        weights = Checkpoint.open(resolve(config.model, silent, fetch=False))
        self._engine = LocalEngine.load(weights, config, self._timer)
        self.run(_WARM_UP, lambda num_tokens: None)

    def run(self, workload: Workload, advance: Advance) -> Figures:
        """One batch, from submission to its last token."""
        self._timer.reset()
        traces = {}
        requests = []
        sampling = SamplingParams(max_new_tokens=workload.output_tokens, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(workload.prompts(self._vocab_size)):
            rid = f"bench-{index}"
            requests.append(Request(rid, prompt, sampling))
            traces[rid] = Trace(time.perf_counter())
        begun_s = time.perf_counter()
        for emission in self._engine.generate(requests):
            traces[emission.rid].add(time.perf_counter(), len(emission.tokens))
            advance(len(emission.tokens))
        return figures(workload, list(traces.values()), self._shares(time.perf_counter() - begun_s))

    def _shares(self, total_s: float) -> dict[str, float]:
        """Of all the time that passed; what the stage did not book is the engine's, the sampler's and this loop's."""
        shares = {part: seconds / total_s for part, seconds in sorted(self._timer.seconds.items())}
        return shares | {"engine": 1 - sum(shares.values())}


def _num_tokens(workload: Workload) -> int:
    """Of one sequence."""
    return workload.prompt_tokens + workload.output_tokens


def _check_context(spec: ModelSpec, workloads: Sequence[Workload]) -> None:
    for workload in workloads:
        if _num_tokens(workload) > spec.max_positions:
            raise BenchError(
                f"{workload.prompt_tokens} prompt tokens and {workload.output_tokens} output tokens do not fit the"
                f" model's context of {spec.max_positions}"
            )
