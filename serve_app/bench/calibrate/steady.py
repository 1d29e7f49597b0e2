"""A cell under a steady load: as many requests at a time as asked, a new one for each that ends.

What `bench.cell` measures is a batch: all prompts first, then all answers. A server has them side by side. Tokens are
sampled at temperature 1: greedy answers repeat themselves sooner or later, and then touch few experts.
"""

import random
import time
from collections.abc import Collection, Sequence

import msgspec

from serve_app.bench.cell import NAME, CellBench
from serve_app.bench.measure import BenchError, Trace, Workload
from serve_app.engine.pace import Observed
from serve_app.engine.plan import Cancel, Submit
from serve_app.engine.request import Emission, Request, SamplingParams, Terms
from serve_app.runtime.names import ENGINE
from serve_app.runtime.wire import From, Tokens

MIN_ROUNDS = 1.0  # times that each place is filled anew, at least
PATIENCE, LEAST_PATIENCE_S = 6.0, 20.0  # times the seconds asked for, after which what was seen has to do


class Load(msgspec.Struct, frozen=True):
    """`concurrency` requests at a time, over all replicas. Tokens."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int

    @property
    def workload(self) -> Workload:
        return Workload(self.concurrency, self.prompt_tokens, self.output_tokens)


class Seen(msgspec.Struct, frozen=True):
    """Means over the requests that came and went while all places were taken."""

    load: Load
    num_requests: int
    ttft_s: float
    tpot_s: float
    output_tokens_s: float
    observed: list[Observed] = []  # the engine's steps


class SteadyCell(CellBench):
    """A running cell that is kept busy. Use as a context."""

    def __init__(
        self, model: str, layout: dict[str, int], threads: int, loads: Sequence[Load], kv_gib: float = 1.0
    ) -> None:
        super().__init__(model, layout, threads, [load.workload for load in loads], kv_gib)
        self._draw = random.Random(0)
        self._num_sent = 0
        self._traces: dict[str, Trace] = {}
        self._limits: dict[str, int] = {}

    def steady(self, load: Load, seconds: float) -> Seen:
        """For about `seconds`, and until each place was filled MIN_ROUNDS times. BenchError if nothing was seen.

        First answers are cut to different lengths: else all requests would go on ending together.
        """
        self._traces.clear()
        self._limits.clear()
        paces = self.core.paces
        paces.seed(self.core.num_replicas, [])
        for i in range(load.concurrency):
            self._send(load, 1 + i * load.output_tokens // load.concurrency)
        first = set(self._traces)
        begun_s = time.perf_counter()
        window_s = 0.0  # when all of the first were replaced
        num_ended = 0
        for message in self._messages():
            for emission in message.emissions if isinstance(message, Tokens) else ():
                self._take(emission)
                if emission.finish is not None:
                    num_ended += bool(window_s)
                    first.discard(emission.rid)
                    if not first and not window_s:
                        window_s = time.perf_counter()
                    self._send(load, load.output_tokens)
            now_s = time.perf_counter()
            is_enough = window_s and now_s - window_s > seconds and num_ended >= MIN_ROUNDS * load.concurrency
            if is_enough or now_s - begun_s > max(LEAST_PATIENCE_S, PATIENCE * seconds):
                break
        observed = [o for o in paces.of(self.core.num_replicas).observed if o.seconds > 0]
        self._clear()
        return seen(load, self._traces.values(), window_s, now_s, observed)

    def _send(self, load: Load, output_tokens: int) -> None:
        rid = f"steady-{self._num_sent}"
        self._num_sent += 1
        prompt = [self._draw.randrange(self._spec.vocab_size) for _ in range(load.prompt_tokens)]
        sampling = SamplingParams(max_new_tokens=output_tokens, seed=self._num_sent, ignore_eos=True)
        self._traces[rid] = Trace(time.perf_counter())
        self._mesh.send(ENGINE, From(NAME, Submit(Request(rid, prompt, sampling, terms=Terms(is_accepted=True)))))

    def _take(self, emission: Emission) -> None:
        self._traces[emission.rid].add(time.perf_counter(), len(emission.tokens))
        if emission.finish is not None:
            self._limits[emission.rid] = 0

    def _clear(self) -> None:
        """End what still runs, and wait until it has ended."""
        left = set(self._traces) - set(self._limits)
        for rid in left:
            self._mesh.send(ENGINE, From(NAME, Cancel(rid)))
        for message in self._messages():
            for emission in message.emissions if isinstance(message, Tokens) else ():
                if emission.finish is not None:
                    left.discard(emission.rid)
            if not left:
                return


def seen(load: Load, traces: Collection[Trace], from_s: float, to_s: float, observed: list[Observed]) -> Seen:
    """Of the window [from_s, to_s]: first tokens and rates within it, of requests sent within it."""
    first = [t.token_s[0] - t.sent_s for t in traces if t.token_s and from_s <= t.sent_s]
    gaps = [
        (t.token_s[-1] - t.token_s[0]) / (len(t.token_s) - 1)
        for t in traces
        if from_s and len(t.token_s) > 1 and from_s <= t.sent_s and t.token_s[-1] <= to_s
    ]
    num_tokens = sum(sum(1 for at_s in t.token_s if from_s < at_s <= to_s) for t in traces)
    if not first or not gaps or not from_s:
        raise BenchError(f"no request of {load} came and went while it was watched")
    return Seen(
        load, len(first), sum(first) / len(first), sum(gaps) / len(gaps), num_tokens / (to_s - from_s), observed
    )
