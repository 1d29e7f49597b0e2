"""A benchmark of the whole model in this process: no HTTP, no cluster, only the engine core and the model step."""

import time
from collections.abc import Sequence
from pathlib import Path

from serve_app.bench.measure import Advance, Figures, Trace, Workload, figures
from serve_app.bench.settings import WARM_UP, bench_config, check_context, requests_of
from serve_app.bench.trace import write_trace
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.timing import StepTimer
from serve_app.runtime.local import LocalEngine
from serve_app.runtime.settings import check


class LocalBench:
    """A loaded model to run `workloads` on. OctavoError where it cannot be, or they do not fit its context."""

    def __init__(self, model: str, threads: int, workloads: Sequence[Workload]) -> None:
        config = bench_config(model, {}, threads, workloads)
        self._timer = StepTimer()
        spec = check(config)
        check_context(spec, workloads)
        self._vocab_size = spec.vocab_size
        weights = Checkpoint.open(resolve(config.model, silent, fetch=False))
        self._engine = LocalEngine.load(weights, config, self._timer)
        self.run(WARM_UP, lambda num_tokens: None)

    def run(self, workload: Workload, advance: Advance) -> Figures:
        """One batch, from submission to its last token."""
        self._timer.reset()
        traces = {}
        requests = requests_of(workload, self._vocab_size)
        for request in requests:
            traces[request.rid] = Trace(time.perf_counter())
        begun_s = time.perf_counter()
        for emission in self._engine.generate(requests):
            traces[emission.rid].add(time.perf_counter(), len(emission.tokens))
            advance(len(emission.tokens))
        return figures(workload, list(traces.values()), self._shares(time.perf_counter() - begun_s))

    def trace(self, workload: Workload, path: Path) -> None:
        """Run a workload while recording where its time goes, and write that as a Chrome trace."""
        self._timer.spans = []
        self.run(workload, lambda num_tokens: None)
        write_trace(path, {"engine": self._timer.take_spans()})

    def _shares(self, total_s: float) -> dict[str, float]:
        """Of all the time that passed; what the stage did not book is the engine's, the sampler's and this loop's."""
        shares = {part: seconds / total_s for part, seconds in sorted(self._timer.seconds.items())}
        return shares | {"engine": 1 - sum(shares.values())}
