"""What a benchmark run is made of, and the figures that come out of it. Seconds and tokens; no engine, no HTTP."""

import math
import random
from collections.abc import Callable, Sequence

import msgspec

from serve_app.errors import OctavoError

Advance = Callable[[int], None]  # called with the number of tokens that have just come


class BenchError(OctavoError):
    """What was to be measured could not be."""


class Workload(msgspec.Struct, frozen=True):
    """`batch` requests at a time, each of random tokens: nothing is shared, so no prefix cache helps."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Of all requests."""
        return self.batch * self.output_tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same for the same workload; those of another batch or seed begin otherwise."""
        draw = random.Random(f"{self.seed} {self.batch} {self.prompt_tokens}")
        return [[draw.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


class Trace(msgspec.Struct):
    """When one request was sent and when its tokens came, in seconds of one clock."""

    sent_s: float
    token_s: list[float] = []

    def add(self, now_s: float, num_tokens: int) -> None:
        self.token_s.extend([now_s] * num_tokens)


class Figures(msgspec.Struct, frozen=True):
    """One row of a report."""

    batch: int
    prompt_tokens: int
    output_tokens: int  # per request
    output_tokens_per_s: float  # all requests, first send to last token
    decode_tokens_per_s: float  # all tokens but the first of each request, from the last first token on
    prompt_tokens_per_s: float  # first send to last first token
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    shares: dict[str, float] = {}  # of the steps' time; in-process only


def figures(workload: Workload, traces: Sequence[Trace], shares: dict[str, float] | None = None) -> Figures:
    """The row of one run. BenchError if a request came back without a token."""
    if not all(trace.token_s for trace in traces):
        raise BenchError("a request came back without a token")
    begun_s = min(trace.sent_s for trace in traces)
    prefilled_s = max(trace.token_s[0] for trace in traces)
    ended_s = max(trace.token_s[-1] for trace in traces)
    num_tokens = sum(len(trace.token_s) for trace in traces)
    num_late = sum(1 for trace in traces for at_s in trace.token_s if at_s > prefilled_s)
    ttfts = [trace.token_s[0] - trace.sent_s for trace in traces]
    gaps = [b - a for trace in traces for a, b in zip(trace.token_s, trace.token_s[1:], strict=False)]
    return Figures(
        batch=workload.batch,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        output_tokens_per_s=num_tokens / (ended_s - begun_s),
        decode_tokens_per_s=num_late / (ended_s - prefilled_s) if ended_s > prefilled_s else 0.0,
        prompt_tokens_per_s=workload.batch * workload.prompt_tokens / (prefilled_s - begun_s),
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p99_s=quantile(ttfts, 0.99),
        itl_p50_s=quantile(gaps, 0.5) if gaps else 0.0,
        itl_p99_s=quantile(gaps, 0.99) if gaps else 0.0,
        shares=shares or {},
    )


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share `q` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
