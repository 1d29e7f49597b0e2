"""From the records of a run to its figures.

Goodput counts what met the objective: let in, its first token in time, and then all of it. It is divided by the time
from the begin of the run to the end of its arrivals, or to the last token of those that met the objective where that is
later. So a run whose queue is worked off after its arrivals is not flattered, nor is one punished for what it went on
to serve in vain.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from serve_app.bench.measure import quantile
from serve_app.bench.serve.record import Record

MAX_DOTS = 2000
MAX_ERRORS = 5  # different ones that are told


class Capacity(msgspec.Struct, frozen=True):
    """What the server sustains of this mix of requests, within the objective."""

    requests_per_s: float
    output_tokens_per_s: float | None = None  # None: it was given, not measured; so for the others
    streams: int | None = None  # that were under way
    measured_s: float | None = None
    attainment: float | None = None


class Run(msgspec.Struct, frozen=True):
    """What was asked of one run."""

    rate: str  # as it was written
    rate_per_s: float
    pattern: str
    arrivals_s: float  # from the begin to the end of the arrivals


class Timeline(msgspec.Struct, frozen=True):
    """By the second in which they were sent; retries are sent, too."""

    sent: list[int]
    let_in: list[int]
    refused: list[int]


class RunFigures(msgspec.Struct, frozen=True):
    """One run. Seconds; None where there is nothing to tell of."""

    rate: str
    rate_per_s: float
    pattern: str
    arrivals_s: float
    sent: int  # requests; one that comes back is one
    admitted: int  # not refused, and at an end
    refused: int  # for good
    errors: int  # of the admitted: broken, cut short, answered with another status
    gave_up: int  # of the admitted: without a token for so long that the client hung up
    unfinished: int  # when the run was cut short; in none of the others
    attainment: float | None  # the share of the admitted whose first token came in time, and the rest after it
    goodput_per_s: float  # requests
    goodput_tokens_per_s: float  # output tokens
    goodput_ratio: float | None  # to the best run; to the capacity where there is one run only
    ttft_p50_s: float | None  # of who gave up: as long as they waited
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p99_s: float | None
    refusals: int  # answers, those to retries included
    refusal_p50_s: float | None  # from sending to the status
    refusal_p99_s: float | None
    reasons: dict[str, int]  # of refusals
    retried: int  # requests that were refused, waited as they were told, and came back
    retry_admitted: float | None  # the share of these that were let in when they first came back
    lateness_p99_s: float | None  # of the generator: sent so long after its time
    lateness_max_s: float | None
    first_errors: list[str]
    timeline: Timeline
    ttfts: list[tuple[float, float]]  # (sent, time to first token) of the admitted; a sample of them if many


def judge(run: Run, records: Sequence[Record], objective_s: float) -> RunFigures:
    """All but `goodput_ratio`, which takes the other runs."""
    ended = [record for record in records if record.ended_s is not None]
    admitted = [record for record in ended if not record.is_refused]
    good = [record for record in admitted if is_good(record, objective_s)]
    span_s = max([run.arrivals_s, *(record.token_s[-1] for record in good)])
    refusals = [attempt for record in records for attempt in record.tries if attempt.is_refused]
    refusal_s = [attempt.answered_s - attempt.sent_s for attempt in refusals if attempt.answered_s is not None]
    dots = [(record.tries[-1].sent_s, wait_s) for record in admitted if (wait_s := _waited_s(record)) is not None]
    ttfts = [wait_s for _, wait_s in dots]
    gaps = [b - a for record in admitted for a, b in zip(record.token_s, record.token_s[1:], strict=False)]
    whole_s = [record.token_s[-1] - record.tries[-1].sent_s for record in admitted if record.is_whole]
    late_s = [record.tries[0].sent_s - record.arrival.at_s for record in records if record.tries]
    num_retried, retry_admitted = _retries(ended)
    return RunFigures(
        **msgspec.structs.asdict(run),
        sent=len(records),
        admitted=len(admitted),
        refused=len(ended) - len(admitted),
        errors=sum(bool(record.error) for record in admitted),
        gave_up=sum(record.gave_up for record in admitted),
        unfinished=len(records) - len(ended),
        attainment=attainment(admitted, objective_s),
        goodput_per_s=len(good) / span_s if good else 0.0,
        goodput_tokens_per_s=sum(len(record.token_s) for record in good) / span_s if good else 0.0,
        goodput_ratio=None,
        ttft_p50_s=_quantile(ttfts, 0.5),
        ttft_p90_s=_quantile(ttfts, 0.9),
        ttft_p99_s=_quantile(ttfts, 0.99),
        itl_p50_s=_quantile(gaps, 0.5),
        itl_p99_s=_quantile(gaps, 0.99),
        e2e_p50_s=_quantile(whole_s, 0.5),
        e2e_p99_s=_quantile(whole_s, 0.99),
        refusals=len(refusals),
        refusal_p50_s=_quantile(refusal_s, 0.5),
        refusal_p99_s=_quantile(refusal_s, 0.99),
        reasons=dict(Counter(attempt.reason or f"status {attempt.status}" for attempt in refusals)),
        retried=num_retried,
        retry_admitted=retry_admitted,
        lateness_p99_s=_quantile(late_s, 0.99),
        lateness_max_s=max(late_s, default=None),
        first_errors=list(dict.fromkeys(record.error for record in admitted if record.error))[:MAX_ERRORS],
        timeline=_timeline(records),
        ttfts=[(round(sent_s, 3), round(wait_s, 4)) for sent_s, wait_s in dots[:: 1 + len(dots) // MAX_DOTS]],
    )


def is_good(record: Record, objective_s: float) -> bool:
    """It met the objective, and all of it came."""
    return record.is_whole and record.ttft_s is not None and record.ttft_s <= objective_s


def attainment(admitted: Sequence[Record], objective_s: float) -> float | None:
    """The share of them that met the objective."""
    return sum(is_good(record, objective_s) for record in admitted) / len(admitted) if admitted else None


def capacity_of(
    records: Iterable[Record], begin_s: float, end_s: float, objective_s: float, num_streams: int
) -> Capacity:
    """From what ended in [begin_s, end_s) of a closed loop."""
    inside = [record for record in records if record.ended_s is not None and begin_s <= record.ended_s < end_s]
    admitted = [record for record in inside if not record.is_refused]
    good = [record for record in admitted if is_good(record, objective_s)]
    return Capacity(
        len(good) / (end_s - begin_s),
        sum(len(record.token_s) for record in good) / (end_s - begin_s),
        num_streams,
        end_s - begin_s,
        attainment(admitted, objective_s),
    )


def with_ratios(runs: Sequence[RunFigures], capacity: Capacity | None) -> list[RunFigures]:
    """Goodput beside that of the best run; beside the capacity, if it is known, where there is one run only."""
    best_per_s = max((run.goodput_per_s for run in runs), default=0.0)
    if len(runs) == 1:
        best_per_s = capacity.requests_per_s if capacity else 0.0
    ratios = [run.goodput_per_s / best_per_s if best_per_s else None for run in runs]
    return [msgspec.structs.replace(run, goodput_ratio=ratio) for run, ratio in zip(runs, ratios, strict=True)]


def _waited_s(record: Record) -> float | None:
    """For the first token; of who gave up, until then."""
    if record.gave_up and record.ended_s is not None:
        return record.ended_s - record.tries[-1].sent_s
    return record.ttft_s


def _retries(ended: Sequence[Record]) -> tuple[int, float | None]:
    """How many came back, and which share of these was let in at once."""
    came_back = [record for record in ended if len(record.tries) > 1]
    let_in = sum(not record.tries[1].is_refused and not record.error for record in came_back)
    return len(came_back), let_in / len(came_back) if came_back else None


def _timeline(records: Sequence[Record]) -> Timeline:
    tries = [attempt for record in records for attempt in record.tries]
    num_s = 1 + int(max((attempt.sent_s for attempt in tries), default=0.0))
    sent, let_in, refused = ([0] * num_s for _ in range(3))
    for attempt in tries:
        second = int(attempt.sent_s)
        sent[second] += 1
        refused[second] += attempt.is_refused
        let_in[second] += attempt.status == 200
    return Timeline(sent, let_in, refused)


def _quantile(values: Sequence[float], q: float) -> float | None:
    return quantile(values, q) if values else None
