"""Prometheus metrics under the names that dashboards, KEDA scalers and the Gateway API extension already read.

What a client feels (latencies, sizes, outcomes) is counted where it is served, in this process's row of the cell's
ledger; shown are the sums over all rows, so that it does not matter which ingress replica is asked. How things stand
(queues, pages) is copied from the engine's last statistics.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from serve_app.engine.core import EngineStats
from serve_app.engine.members import CellStats
from serve_app.engine.request import Emission, Request
from serve_app.telemetry import names
from serve_app.telemetry.ledger import Book, LocalBook, Row
from serve_app.telemetry.names import MODEL, series
from serve_app.telemetry.traces import TRACE, Timing

_WORKER_STATES = ("starting", "loaded", "serving", "hosting", "spare")


class Objective(NamedTuple):
    """Of the time to the first token, in seconds."""

    ttft_s: float | None = None  # what is promised; None: nothing, but to requests that ask for it
    alert_s: float | None = None  # from here on it is a close call; None: never


class ServingMetrics:
    """All metrics of one ingress process. `clock` gives seconds."""

    def __init__(
        self,
        model_name: str,
        max_context_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        book: Book | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.objective = objective or Objective()
        self._clock = clock
        self._book = book or LocalBook()
        self._model_name = model_name
        self._histogram_names = names.histograms(max_context_tokens)
        row = self._book.row
        self._histograms = {
            name: names.Histogram(row, name, histogram.bounds) for name, histogram in self._histogram_names.items()
        }
        for name, counter in names.COUNTERS.items():
            row.update(dict.fromkeys((series(name, value) for value in counter.values), 0.0))

    @contextmanager
    def watch(self, request: Request) -> Iterator["Watch"]:
        """Observe one request. Left without `finished` it was aborted, or failed if by an Exception."""
        watch = Watch(self, request, self._clock)
        try:
            yield watch
        except Exception:
            watch.fail()
            raise
        finally:
            watch.close()

    def observe(self, name: str, value: float, times: int = 1) -> None:
        self._histograms[name].observe(value, times)

    def count(self, name: str, label: str = "") -> None:
        key = series(name, label)
        self._book.row[key] = self._book.row.get(key, 0.0) + 1

    async def refresh(self) -> None:
        """Before `render`: learn what others have counted."""
        await self._book.refresh()

    def render(
        self, stats: EngineStats | None, page_tokens: int, *, epoch: int = 0, cell: CellStats | None = None
    ) -> bytes:
        """The text format. Without `stats` the engine's gauges are left out; so are, without `cell`, its workers'.

        So are all counts as long as nobody has told this process what those before it have counted.
        """
        if stats is not None:
            self._book.note_engine(names.engine_row(stats, cell))
        registry = CollectorRegistry()
        totals = self._book.totals()
        if totals is not None:
            registry.register(_Counts(self._model_name, totals, self._histogram_names))
        registry.register(_Gauges(self._model_name, stats, page_tokens, epoch, cell))
        return generate_latest(registry)


class Watch:
    """The times of one request."""

    def __init__(self, metrics: ServingMetrics, request: Request, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._terms = request.terms
        now = clock()
        self._timing = Timing(now, len(request.prompt), request.sampling, last_s=now)
        self._trace = TRACE.get()  # here: who closes the watch may be anybody
        self._is_ended = False

    def generated(self, num_tokens: int, emission: Emission | None = None) -> None:
        """Tokens came, all at once, with this emission. What they took is shared between them."""
        if num_tokens == 0:
            return
        timing, now = self._timing, self._clock()
        num_gaps = num_tokens
        if timing.first_s is None:
            self._began(now, emission)
            num_gaps -= 1
        if num_gaps:
            self._metrics.observe(names.INTER_TOKEN, (now - timing.last_s) / num_gaps, num_gaps)
        timing.last_s = now
        timing.num_tokens += num_tokens

    def finished(self, reason: str) -> None:
        """It ended so: "stop", "length", "abort" or "error"."""
        self._is_ended = True
        self._timing.outcome = reason
        if reason in {"stop", "length"}:
            self._metrics.observe(names.LATENCY, self._clock() - self._timing.accepted_s)

    def refused(self, reason: str) -> None:
        """It was not let in."""
        self._is_ended = True
        self._timing.refused = reason

    def fail(self) -> None:
        """By an Exception, if nothing else was said of its end."""
        if not self._is_ended:
            self.finished("error")

    def close(self) -> None:
        """Count how it ended."""
        timing, metrics = self._timing, self._metrics
        timing.ended_s = self._clock()
        if timing.refused:
            metrics.count(names.REJECTIONS, timing.refused)
        else:
            metrics.observe(names.PROMPT_SIZE, timing.num_prompt_tokens)
            metrics.observe(names.ANSWER_SIZE, timing.num_tokens)
            metrics.count(names.SUCCESS, timing.outcome)
            if timing.first_s is None:
                self._judge(timing.ended_s - timing.accepted_s)
        if self._trace is not None:
            self._trace.add(timing)

    def _began(self, now: float, emission: Emission | None) -> None:
        """The first token came."""
        timing = self._timing
        ttft_s = now - timing.accepted_s
        timing.first_s = timing.last_s = now
        self._metrics.observe(names.TTFT, ttft_s)
        self._judge(ttft_s, has_begun=True)
        if emission is None:
            return
        timing.queued_s = emission.queued_s
        if emission.queued_s is not None:
            self._metrics.observe(names.QUEUE_TIME, emission.queued_s)
        if emission.predicted_ttft_s is not None:
            self._metrics.observe(names.PREDICTION_ERROR, ttft_s - emission.predicted_ttft_s)

    def _judge(self, ttft_s: float, *, has_begun: bool = False) -> None:
        """Against its own objective, or the server's. Without a token it can but be too late."""
        promised = self._metrics.objective
        objective_s = self._terms.ttft_s or promised.ttft_s
        if not objective_s:
            return
        share = promised.alert_s / promised.ttft_s if promised.alert_s and promised.ttft_s else math.inf
        if ttft_s > objective_s:
            self._metrics.count(names.VIOLATIONS)
        elif has_begun and ttft_s >= share * objective_s:
            self._metrics.count(names.CLOSE_CALLS)


class _Counts(Collector):
    """Sums over the ledger."""

    def __init__(self, model_name: str, totals: Row, histograms: Mapping[str, names.HistogramName]) -> None:
        self._model_name = model_name
        self._totals = totals
        self._histograms = histograms

    def collect(self) -> Iterator[Metric]:
        for name, counter in names.COUNTERS.items():
            yield self._counter(name, counter)
        for name, histogram in self._histograms.items():
            yield self._histogram(name, histogram)
        yield self._failovers()

    def _counter(self, name: str, counter: names.CounterName) -> Metric:
        labels = [MODEL, counter.label] if counter.label else [MODEL]
        family = CounterMetricFamily(name, counter.text, labels=labels)
        if not counter.label:
            family.add_metric([self._model_name], self._totals.get(name, 0.0))
            return family
        values = dict.fromkeys(counter.values, 0.0) | names.labels_of(self._totals, name)
        for label, value in values.items():
            family.add_metric([self._model_name, label], value)
        return family

    def _histogram(self, name: str, histogram: names.HistogramName) -> Metric:
        family = HistogramMetricFamily(name, histogram.text, labels=[MODEL])
        bounds = names.bound_labels(histogram.bounds)
        counts = accumulate(self._totals.get(series(name, bound), 0.0) for bound in bounds)
        buckets = list(zip(bounds, counts, strict=True))
        family.add_metric([self._model_name], buckets, self._totals.get(series(name, "sum"), 0.0))
        if not names.has_sum(histogram.bounds):
            family.add_sample(f"{name}_count", {MODEL: self._model_name}, buckets[-1][1])
        return family

    def _failovers(self) -> Metric:
        text = "What each phase of a failover took."
        summary = SummaryMetricFamily(names.FAILOVER, text, labels=[MODEL, "phase"])
        seconds = names.labels_of(self._totals, f"{names.FAILOVER}_sum")
        for phase, num in sorted(names.labels_of(self._totals, f"{names.FAILOVER}_count").items()):
            summary.add_metric([self._model_name, phase], count_value=int(num), sum_value=seconds.get(phase, 0.0))
        return summary


class _Gauges(Collector):
    """How things stand, by the statistics of the engine and its cell."""

    def __init__(
        self, model_name: str, stats: EngineStats | None, page_tokens: int, epoch: int, cell: CellStats | None
    ) -> None:
        self._model_name = model_name
        self._stats = stats
        self._page_tokens = page_tokens
        self._epoch = epoch
        self._cell = cell

    def collect(self) -> Iterator[Metric]:
        if self._stats is not None:
            yield from self._of_engine(self._stats)
        if self._cell is not None:
            yield from self._of_cell(self._cell)

    def _of_engine(self, stats: EngineStats) -> Iterator[Metric]:
        for name, stat in names.GAUGES.items():
            yield self._gauge(name, stat.text, getattr(stats, stat.field))
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache, in its labels.",
            labels=[MODEL, "block_size", "num_gpu_blocks"],
        )
        info.add_metric([self._model_name, str(self._page_tokens), str(stats.num_pages)], 1)
        yield info
        yield self._gauge("octavo:epoch", "Grows with each change of membership; 0 before the first.", self._epoch)

    def _of_cell(self, cell: CellStats) -> Iterator[Metric]:
        text = "Experts of a layer that no living worker hosts."
        yield self._gauge("octavo:experts_uncovered", text, cell.experts_uncovered)
        workers = GaugeMetricFamily("octavo:workers", "Workers by state.", labels=[MODEL, "state"])
        for state, num in (dict.fromkeys(_WORKER_STATES, 0) | cell.workers).items():
            workers.add_metric([self._model_name, state], num)
        yield workers

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=[MODEL])
        gauge.add_metric([self._model_name], value)
        return gauge
