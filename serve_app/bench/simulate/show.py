"""A simulation at the terminal: how far it is, its figures, its pictures."""

import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app.bench.serve.report import Report, read_report, remarks, tables, to_json
from serve_app.bench.simulate.figures import SimulatedReport
from serve_app.bench.simulate.run import Rehearsal
from serve_app.bench.trace import write_trace
from serve_app.model.timing import Span

INTERRUPTED = 130


@dataclass(frozen=True)
class Paper:
    """Where what is found goes, beside stdout."""

    plot: Path | None
    compare: Path | None  # an earlier report, of a server or of a simulation, to be drawn beside
    chrome_trace: Path | None
    is_json: bool


def run_rehearsal(rehearsal: Rehearsal, paper: Paper, err: Console) -> int:
    """Run it, print and draw what it found. The exit status: 0, 1 if a request failed, 130 after Ctrl-C."""
    other = read_report(paper.compare) if paper.compare else None
    began_s, interrupted = time.perf_counter(), False
    try:
        _run(rehearsal, err)
    except KeyboardInterrupt:
        interrupted = True
    took_s = time.perf_counter() - began_s
    report = rehearsal.report(interrupted=interrupted)
    _print(report, as_json=paper.is_json)
    num, steps = rehearsal.num_requests, rehearsal.num_steps
    _note(err, f"{num:,} requests, {steps:,} steps on {report.num_gpus:,} GPUs simulated in {took_s:.1f} s")
    if report.runs:
        _draw(paper, report, other, rehearsal)
    return INTERRUPTED if interrupted else int(report.errors > 0)


def _run(rehearsal: Rehearsal, err: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("")

        def tell(run: str, num_done: int, num: int) -> None:
            progress.update(task, description=f"{run}: requests", completed=num_done, total=num)

        rehearsal.run(lambda text: progress.update(task, description=text, total=None), tell)


def _print(report: SimulatedReport, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(to_json(report))
        return
    console = Console()
    for table in tables(report) if report.runs else []:
        console.print(table)
    for sentence in [*remarks(report), *_outages(report)]:
        console.print(escape(sentence), highlight=False, soft_wrap=True)


def _outages(report: SimulatedReport) -> list[str]:
    return [
        f"{outage.run}: worker {outage.worker} of cell {outage.cell} died at {outage.died_s:.1f} s: the cell went on"
        f" after {_seconds(outage.pause_s)}, its next token came after {_seconds(outage.token_s)}, its seat was filled"
        f" after {_seconds(outage.whole_s)}"
        for outage in report.outages
    ]


def _seconds(seconds: float | None) -> str:
    return "the run" if seconds is None else f"{seconds:.2f} s"


def _draw(paper: Paper, report: Report, other: Report | None, rehearsal: Rehearsal) -> None:
    if paper.plot:
        from serve_app.bench.serve.plot import draw  # noqa: PLC0415 - matplotlib, for those who want a picture

        draw(paper.plot, report, other, paper.compare.stem if paper.compare else "")
    if paper.chrome_trace:
        rows: defaultdict[str, list[Span]] = defaultdict(list)
        for span in rehearsal.spans:
            rows[span.row].append(Span(span.name, span.begin_s, span.end_s))
        write_trace(paper.chrome_trace, rows)


def _note(err: Console, text: str) -> None:
    err.print(escape(text), highlight=False, soft_wrap=True)
