"""Prometheus metrics under the names that dashboards, KEDA scalers and the Gateway API extension already read.

What a client feels (latencies, sizes, outcomes) is observed where it is served; what the engine knows (queues, pages,
totals) is copied from its last statistics at each scrape.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from serve_app.engine.core import EngineStats
from serve_app.engine.members import CellStats

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_INTER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

_GAUGES = MappingProxyType(
    {
        "vllm:num_requests_running": ("running", "Requests that the engine is computing."),
        "vllm:num_requests_waiting": ("waiting", "Requests that wait for a place in the engine."),
        "vllm:kv_cache_usage_perc": ("kv_usage", "Share of the KV pages that are held; 1 is all of them."),
    }
)
_COUNTERS = MappingProxyType(
    {
        "vllm:prompt_tokens": ("prompt_tokens_total", "Prompt tokens of admitted requests, cached ones included."),
        "vllm:generation_tokens": ("generation_tokens_total", "Tokens generated."),
        "vllm:num_preemptions": ("preemptions_total", "Times a running request gave its pages up to others."),
        "vllm:prefix_cache_queries": ("prefix_queries_total", "Prompt tokens looked up in the prefix cache."),
        "vllm:prefix_cache_hits": ("prefix_hits_total", "Prompt tokens found in the prefix cache."),
        "octavo:requests_replayed": ("replayed_total", "Requests run again from their tokens after a loss."),
    }
)
_CELL_COUNTERS = MappingProxyType(
    {
        "octavo:workers_lost": ("lost_total", "Workers that died or were given up."),
        "octavo:stale_messages": ("stale_total", "Messages of old epochs that workers dropped."),
    }
)
_WORKER_STATES = ("starting", "loaded", "serving", "hosting", "spare")


class ServingMetrics:
    """All metrics of one ingress process, in a registry of their own. `clock` gives seconds."""

    def __init__(
        self, model_name: str, max_context_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name)
        self._registry.register(self._engine)
        sizes = _one_two_five(max_context_tokens)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry).labels(model_name)

        self.ttft_s = histogram("vllm:time_to_first_token_seconds", "From accepted to the first token.", _TTFT_S)
        self.inter_token_s = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _INTER_TOKEN_S)
        self.latency_s = histogram("vllm:e2e_request_latency_seconds", "From accepted to the last token.", _LATENCY_S)
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", sizes)
        self.generation_tokens = histogram("vllm:request_generation_tokens", "Tokens of an answer.", sizes)
        self._outcomes = Counter(
            "vllm:request_success",
            "Requests ended, by how.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._model_name = model_name
        for reason in ("stop", "length", "abort", "error"):  # a series that begins at 0 shows its first increase
            self._outcomes.labels(model_name, reason)

    @contextmanager
    def watch(self, num_prompt_tokens: int) -> Iterator["Watch"]:
        """Observe one request. Left without `finished`, it was aborted, or failed if by an Exception."""
        watch = Watch(self, self._clock)
        try:
            yield watch
        except Exception:
            watch.finished("error")
            raise
        finally:
            self.prompt_tokens.observe(num_prompt_tokens)
            self.generation_tokens.observe(watch.num_tokens)
            self._outcomes.labels(self._model_name, watch.outcome).inc()

    def render(
        self, stats: EngineStats | None, page_tokens: int, *, epoch: int = 0, cell: CellStats | None = None
    ) -> bytes:
        """The text format. Without `stats` the engine's gauges are left out and its counters stand still.

        So are, without `cell`, those of its workers.
        """
        self._engine.update(stats, page_tokens, epoch, cell)
        return generate_latest(self._registry)


class Watch:
    """The times of one request."""

    def __init__(self, metrics: ServingMetrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._accepted_s = self._last_s = clock()
        self.num_tokens = 0
        self.outcome = "abort"

    def generated(self, num_tokens: int) -> None:
        """Tokens came, all at once. What they took is shared between them."""
        if num_tokens == 0:
            return
        now = self._clock()
        num_gaps = num_tokens
        if self.num_tokens == 0:
            self._metrics.ttft_s.observe(now - self._accepted_s)
            num_gaps -= 1
            self._last_s = now
        for _ in range(num_gaps):
            self._metrics.inter_token_s.observe((now - self._last_s) / num_gaps)
        self._last_s = now
        self.num_tokens += num_tokens

    def finished(self, reason: str) -> None:
        self.outcome = reason
        if reason in {"stop", "length"}:
            self._metrics.latency_s.observe(self._clock() - self._accepted_s)


class _Total:
    """Numbers that only grow. They go on where they were when who counts them starts anew from zero."""

    def __init__(self, size: int = 1) -> None:
        self._last = [0.0] * size
        self._before = [0.0] * size  # of those who counted before

    def update(self, *values: float) -> None:
        """The first one falls when they start anew."""
        if values[0] < self._last[0]:
            self._before = self.values
        self._last = list(values)

    @property
    def values(self) -> list[float]:
        return [before + last for before, last in zip(self._before, self._last, strict=True)]


class _EngineCollector(Collector):
    """The engine's statistics and its cell's."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._stats: EngineStats | None = None
        self._page_tokens = 0
        self._epoch = 0
        self._cell: CellStats | None = None
        self._totals = {name: _Total() for name in (*_COUNTERS, *_CELL_COUNTERS)}
        self._phases: dict[str, _Total] = {}  # how many, seconds together

    def update(self, stats: EngineStats | None, page_tokens: int, epoch: int, cell: CellStats | None) -> None:
        self._stats = stats
        self._page_tokens = page_tokens
        self._epoch = epoch
        self._cell = cell
        for source, counters in ((stats, _COUNTERS), (cell, _CELL_COUNTERS)):
            for name, (field, _) in counters.items() if source is not None else ():
                self._totals[name].update(getattr(source, field))
        if cell is not None:
            for phase in self._phases.keys() | cell.phase_seconds.keys():  # one that is gone began anew
                self._phases.setdefault(phase, _Total(2)).update(*cell.phase_seconds.get(phase, (0, 0.0)))

    def collect(self) -> Iterator[Metric]:
        for name, (_, text) in (_COUNTERS | _CELL_COUNTERS).items():
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], self._totals[name].values[0])
            yield counter
        yield self._failovers()
        if self._stats is not None:
            yield from self._gauges(self._stats)
        if self._cell is not None:
            yield from self._cell_gauges(self._cell)

    def _failovers(self) -> Metric:
        name, text = "octavo:failover_phase_seconds", "What each phase of a failover took."
        summary = SummaryMetricFamily(name, text, labels=["model_name", "phase"])
        for phase, total in sorted(self._phases.items()):
            num, seconds = total.values
            summary.add_metric([self._model_name, phase], count_value=int(num), sum_value=seconds)
        return summary

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        for name, (field, text) in _GAUGES.items():
            yield self._gauge(name, text, getattr(stats, field))
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache, in its labels.",
            labels=["model_name", "block_size", "num_gpu_blocks"],
        )
        info.add_metric([self._model_name, str(self._page_tokens), str(stats.num_pages)], 1)
        yield info
        yield self._gauge("octavo:epoch", "Grows with each change of membership; 0 before the first.", self._epoch)

    def _cell_gauges(self, cell: CellStats) -> Iterator[Metric]:
        text = "Experts of a layer that no living worker hosts."
        yield self._gauge("octavo:experts_uncovered", text, cell.experts_uncovered)
        workers = GaugeMetricFamily("octavo:workers", "Workers by state.", labels=["model_name", "state"])
        for state, num in (dict.fromkeys(_WORKER_STATES, 0) | cell.workers).items():
            workers.add_metric([self._model_name, state], num)
        yield workers

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._model_name], value)
        return gauge


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, ... up to `most`."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= most)
