"""A load test's figures: as JSON, and as tables."""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE
from rich.table import Table

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.verdict import Capacity, RunFigures

LATE_S = 0.05  # from which on the generator's lateness is worth a word


class Report(msgspec.Struct, frozen=True):
    """What `--json` prints. The first four are of all runs taken together; see each for how."""

    attainment: float | None  # the worst
    goodput_ratio: float | None  # the last run's
    refused: int  # of all runs
    errors: int  # of all runs
    retry_admitted: float | None  # the worst
    interrupted: bool
    url: str
    ttft_s: float  # the objective
    seed: int
    capacity: Capacity | None
    runs: list[RunFigures]


def report_of(
    runs: list[RunFigures], capacity: Capacity | None, url: str, ttft_s: float, seed: int, *, interrupted: bool
) -> Report:
    return Report(
        attainment=min((run.attainment for run in runs if run.attainment is not None), default=None),
        goodput_ratio=runs[-1].goodput_ratio if runs else None,
        refused=sum(run.refused for run in runs),
        errors=sum(run.errors for run in runs),
        retry_admitted=min((run.retry_admitted for run in runs if run.retry_admitted is not None), default=None),
        interrupted=interrupted,
        url=url,
        ttft_s=ttft_s,
        seed=seed,
        capacity=capacity,
        runs=runs,
    )


def to_json(report: Report) -> str:
    """A line for each field, and one for each run: there are hundreds of numbers in it."""
    fields = [f' "{name}": {_json(getattr(report, name))}' for name in report.__struct_fields__ if name != "runs"]
    runs = ",\n  ".join(map(_json, report.runs))
    return "{\n" + ",\n".join([*fields, f' "runs": [\n  {runs}\n ]']) + "\n}\n"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def read_report(path: Path) -> Report:
    """What `--json` printed once. BenchError if it is something else."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BenchError(f"{path} is no report of octavo bench serve --json: {error}") from None
    if not report.runs:
        raise BenchError(f"{path} is a report of no run")
    return report


def tables(report: Report) -> list[Table]:
    """Two narrow ones fit a terminal of 80 columns where one does not."""
    served = _table(
        "What was served", ["per s", "sent", "let in", "refused", "errors", "in time", "goodput", "of best"]
    )
    times = _table("Seconds", ["TTFT p50", "p90", "p99", "ITL p50", "p99", "e2e p99", "refusal p50", "p99"])
    for run in report.runs:
        counts = map(str, (run.sent, run.admitted, run.refused, run.errors))
        shares = (_share(run.attainment), f"{run.goodput_per_s:.3g}", _share(run.goodput_ratio))
        served.add_row(run.rate, f"{run.rate_per_s:.3g}", *counts, *shares)
        ttfts = map(_seconds, (run.ttft_p50_s, run.ttft_p90_s, run.ttft_p99_s))
        rest = map(_seconds, (run.itl_p50_s, run.itl_p99_s, run.e2e_p99_s, run.refusal_p50_s, run.refusal_p99_s))
        times.add_row(run.rate, *ttfts, *rest)
    return [served, times]


def remarks(report: Report) -> list[str]:
    """Sentences for what no table has."""
    sentences = [f"in time: the first token within {report.ttft_s:g} s of sending, and then all the others"]
    for run in report.runs:
        sentences += [f"{run.rate}: {sentence}" for sentence in _remarks(run)]
    return sentences


def _remarks(run: RunFigures) -> Sequence[str]:
    found = []
    if run.retry_admitted is not None:
        found.append(f"{run.retried} refused requests came back when told; {_share(run.retry_admitted)} % were let in")
    if run.gave_up:
        found.append(f"{run.gave_up} requests got no token for so long that the client hung up")
    if run.unfinished:
        found.append(f"{run.unfinished} requests were under way when the run was cut short")
    if run.lateness_p99_s is not None and run.lateness_p99_s > LATE_S:
        found.append(f"the generator was late: p99 {run.lateness_p99_s:.3f} s; this machine is too small for it")
    return found + [f"error: {error}" for error in run.first_errors]


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table("rate", *headings, title=title, title_justify="left", box=SIMPLE, padding=(0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _share(share: float | None) -> str:
    """In percent, rounded down: 100 is all of them."""
    return "-" if share is None else f"{math.floor(1000 * share) / 10:.1f}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"
