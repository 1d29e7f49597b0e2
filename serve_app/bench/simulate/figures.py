"""From what became of simulated requests to the figures of a load test: the same as those of a real server."""

import math
from collections.abc import Sequence

import msgspec

from serve_app.bench.measure import quantile
from serve_app.bench.serve.report import Report
from serve_app.bench.serve.verdict import MAX_DOTS, Run, RunFigures, Timeline
from serve_app.sim.serving.ledger import Ledger, Load, Outcome


class SimulatedOutage(msgspec.Struct, frozen=True):
    """A worker's loss; None where it did not come to that before the run was over."""

    run: str  # its rate, as it was written
    cell: int
    worker: int
    replica: int
    died_s: float
    pause_s: float | None  # from the death until the cell goes on without it, or with a new one
    token_s: float | None  # from the death until the cell's next tokens
    whole_s: float | None  # from the death until its seat is filled again


class SimulatedReport(Report, frozen=True):
    """What `--json` prints: what `octavo bench serve --json` does, and what it was that was simulated."""

    system: str
    deployment: str
    num_gpus: int
    routers: int
    replayed: int  # requests that were computed again, because their replica was lost; of all runs
    outages: list[SimulatedOutage]


def judge(run: Run, load: Load, ledger: Ledger, objective_s: float) -> RunFigures:
    """All but `goodput_ratio`, which takes the other runs."""
    outcome, asked_s, first_s, last_s = ledger.outcome, ledger.asked_s, ledger.first_s, ledger.last_s
    admitted = [i for i in range(len(load)) if outcome[i] != Outcome.REFUSED]
    whole = [i for i in admitted if ledger.num_tokens[i] == load.output_tokens[i]]
    good = [i for i in whole if first_s[i] - asked_s[i] <= objective_s]
    span_s = max([run.arrivals_s, *(last_s[i] for i in good)])
    dots = [(asked_s[i], _waited_s(ledger, i)) for i in admitted]
    dots = [(sent_s, wait_s) for sent_s, wait_s in dots if not math.isnan(wait_s)]
    ttfts = sorted(wait_s for _, wait_s in dots)
    whole_s = sorted(last_s[i] - asked_s[i] for i in whole)
    came_back = [i for i in range(len(load)) if ledger.num_tries[i] > 1]
    let_in = sum(ledger.num_tries[i] == 2 and outcome[i] != Outcome.REFUSED for i in came_back)
    num_gave_up = sum(outcome[i] == Outcome.GAVE_UP for i in admitted)
    return RunFigures(
        **msgspec.structs.asdict(run),
        sent=len(load),
        admitted=len(admitted),
        refused=len(load) - len(admitted),
        errors=len(admitted) - len(whole) - num_gave_up,
        gave_up=num_gave_up,
        unfinished=0,
        attainment=len(good) / len(admitted) if admitted else None,
        goodput_per_s=len(good) / span_s if good else 0.0,
        goodput_tokens_per_s=sum(load.output_tokens[i] for i in good) / span_s if good else 0.0,
        goodput_ratio=None,
        ttft_p50_s=_quantile(ttfts, 0.5),
        ttft_p90_s=_quantile(ttfts, 0.9),
        ttft_p99_s=_quantile(ttfts, 0.99),
        itl_p50_s=ledger.gaps.quantile(0.5),
        itl_p99_s=ledger.gaps.quantile(0.99),
        e2e_p50_s=_quantile(whole_s, 0.5),
        e2e_p99_s=_quantile(whole_s, 0.99),
        refusals=ledger.reasons.total(),
        refusal_p50_s=None,  # they take no time here
        refusal_p99_s=None,
        reasons=dict(sorted(ledger.reasons.items())),
        retried=len(came_back),
        retry_admitted=let_in / len(came_back) if came_back else None,
        lateness_p99_s=None,
        lateness_max_s=None,
        first_errors=[],
        timeline=_timeline(ledger),
        ttfts=[(round(sent_s, 3), round(wait_s, 4)) for sent_s, wait_s in dots[:: 1 + len(dots) // MAX_DOTS]],
    )


def _waited_s(ledger: Ledger, number: int) -> float:
    """For the first token; of who gave up, until then."""
    first_s = ledger.first_s[number]
    return (ledger.ended_s[number] if math.isnan(first_s) else first_s) - ledger.asked_s[number]


def _timeline(ledger: Ledger) -> Timeline:
    seconds = range(1 + max(ledger.sent, default=0))
    sent, refused = ([counts[second] for second in seconds] for counts in (ledger.sent, ledger.refused))
    return Timeline(sent, [num - back for num, back in zip(sent, refused, strict=True)], refused)


def outages_of(run: str, ledger: Ledger) -> list[SimulatedOutage]:
    return [
        SimulatedOutage(
            run,
            outage.cell,
            outage.worker,
            outage.replica,
            outage.died_s,
            *(
                None if math.isnan(at_s) else at_s - outage.died_s
                for at_s in (outage.began_s, outage.token_s, outage.whole_s)
            ),
        )
        for outage in ledger.outages
    ]


def _quantile(values: Sequence[float], q: float) -> float | None:
    return quantile(values, q) if values else None
