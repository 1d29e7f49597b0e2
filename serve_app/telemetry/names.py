"""The names of all metrics, and the series that they are counted in.

A series of the ledger is called `name`, or `name|label` where the metric has a label besides the model. A histogram has
`name|bound`, one for each bucket and not cumulative, and `name|sum`.
"""

from bisect import bisect_left
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client.utils import floatToGoString

from serve_app.engine.core import EngineStats
from serve_app.engine.members import CellStats
from serve_app.telemetry.ledger import Row

MODEL = "model_name"  # the label that every sample has

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_INTER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_ERROR_STEPS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ERROR_S = (*(-step for step in reversed(_ERROR_STEPS_S)), 0, *_ERROR_STEPS_S)

TTFT = "vllm:time_to_first_token_seconds"
INTER_TOKEN = "vllm:inter_token_latency_seconds"
LATENCY = "vllm:e2e_request_latency_seconds"
QUEUE_TIME = "vllm:request_queue_time_seconds"
PROMPT_SIZE = "vllm:request_prompt_tokens"
ANSWER_SIZE = "vllm:request_generation_tokens"
PREDICTION_ERROR = "octavo:predicted_ttft_error_seconds"
SUCCESS = "vllm:request_success"
REJECTIONS = "vllm:admission_rejections"
VIOLATIONS = "octavo:slo_violations"
CLOSE_CALLS = "octavo:slo_close_calls"
FAILOVER = "octavo:failover_phase_seconds"


class HistogramName(NamedTuple):
    text: str
    bounds: tuple[float, ...]


class CounterName(NamedTuple):
    text: str
    label: str = ""  # besides the model; "" where there is none
    values: tuple[str, ...] = ()  # of the label, shown from the start: what begins at 0 shows its first increase


class StatName(NamedTuple):
    """Of a field of the engine's statistics, or its cell's."""

    field: str
    text: str


GAUGES: Mapping[str, StatName] = MappingProxyType(
    {
        "vllm:num_requests_running": StatName("running", "Requests that the engine is computing."),
        "vllm:num_requests_waiting": StatName("waiting", "Requests that wait for a place in the engine."),
        "vllm:kv_cache_usage_perc": StatName("kv_usage", "Share of the KV pages that are held; 1 is all of them."),
        "octavo:admission_budget_tokens": StatName(
            "budget_tokens", "Prompt tokens that would be let in now, by the objective; 0 without one."
        ),
    }
)
ENGINE_COUNTERS: Mapping[str, StatName] = MappingProxyType(
    {
        "vllm:prompt_tokens": StatName(
            "prompt_tokens_total", "Prompt tokens of admitted requests, cached ones included."
        ),
        "vllm:generation_tokens": StatName("generation_tokens_total", "Tokens generated."),
        "vllm:num_preemptions": StatName("preemptions_total", "Times a running request gave its pages up to others."),
        "vllm:prefix_cache_queries": StatName("prefix_queries_total", "Prompt tokens looked up in the prefix cache."),
        "vllm:prefix_cache_hits": StatName("prefix_hits_total", "Prompt tokens found in the prefix cache."),
        "octavo:requests_replayed": StatName("replayed_total", "Requests run again from their tokens after a loss."),
    }
)
CELL_COUNTERS: Mapping[str, StatName] = MappingProxyType(
    {
        "octavo:workers_lost": StatName("lost_total", "Workers that died or were given up."),
        "octavo:stale_messages": StatName("stale_total", "Messages of old epochs that workers dropped."),
    }
)
COUNTERS: Mapping[str, CounterName] = MappingProxyType(
    {
        SUCCESS: CounterName("Requests ended, by how.", "finished_reason", ("stop", "length", "abort", "error")),
        REJECTIONS: CounterName(
            "Requests that were not let in, by why.", "reason", ("ttft", "queue-full", "fair-share")
        ),
        VIOLATIONS: CounterName("Requests let in whose first token came after their objective, or not at all."),
        CLOSE_CALLS: CounterName("Requests whose first token came within their objective, but barely."),
        **{name: CounterName(stat.text) for name, stat in (*ENGINE_COUNTERS.items(), *CELL_COUNTERS.items())},
    }
)


def histograms(max_context_tokens: int) -> dict[str, HistogramName]:
    """All histograms of a model whose prompt and answer have so many tokens together, at most."""
    sizes = _one_two_five(max_context_tokens)
    return {
        TTFT: HistogramName("From accepted to the first token.", _TTFT_S),
        INTER_TOKEN: HistogramName("Between two tokens.", _INTER_TOKEN_S),
        LATENCY: HistogramName("From accepted to the last token.", _LATENCY_S),
        QUEUE_TIME: HistogramName("From accepted by the engine to the first step that computes it.", _LATENCY_S),
        PROMPT_SIZE: HistogramName("Tokens of a prompt.", sizes),
        ANSWER_SIZE: HistogramName("Tokens of an answer.", sizes),
        PREDICTION_ERROR: HistogramName(
            "How much later than predicted the first token came; negative: sooner.", _ERROR_S
        ),
    }


class Histogram:
    """Observations, counted in a row. They have no sum where they may be negative: it would not only grow."""

    def __init__(self, row: Row, name: str, bounds: tuple[float, ...]) -> None:
        self._row = row
        self._bounds = bounds
        self._keys = [series(name, bound) for bound in bound_labels(bounds)]
        self._sum = series(name, "sum") if has_sum(bounds) else ""
        row.update(dict.fromkeys(self._keys, 0.0))
        if self._sum:
            row[self._sum] = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._row[self._keys[bisect_left(self._bounds, value)]] += times
        if self._sum:
            self._row[self._sum] += times * max(value, 0.0)


def series(name: str, label: str) -> str:
    return f"{name}|{label}" if label else name


def bound_labels(bounds: tuple[float, ...]) -> list[str]:
    """The label `le` of each bucket."""
    return [*map(floatToGoString, bounds), "+Inf"]


def has_sum(bounds: tuple[float, ...]) -> bool:
    return bounds[0] >= 0


def engine_row(stats: EngineStats, cell: CellStats | None) -> Row:
    """What an engine counts itself, since it began."""
    row = {name: float(getattr(stats, stat.field)) for name, stat in ENGINE_COUNTERS.items()}
    if cell is not None:
        row |= {name: float(getattr(cell, stat.field)) for name, stat in CELL_COUNTERS.items()}
        for phase, (num, seconds) in cell.phase_seconds.items():
            row[series(f"{FAILOVER}_count", phase)] = num
            row[series(f"{FAILOVER}_sum", phase)] = seconds
    return row


def labels_of(row: Row, name: str) -> dict[str, float]:
    """{label: value} of the series of this name that have one."""
    start = f"{name}|"
    return {key[len(start) :]: value for key, value in row.items() if key.startswith(start)}


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, ... up to `most`."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= most)
