"""A load test at the terminal: asks, runs, prints, and tells by its status how it went."""

import asyncio
import ipaddress
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.report import Report, read_report, remarks, report_of, tables, to_json
from serve_app.bench.serve.run import LoadTest
from serve_app.bench.serve.settings import Settings, check, check_writable

INTERRUPTED = 130

Draw = Callable[[Path, Report, Report | None, str], None]


@dataclass(frozen=True)
class Paper:
    """Where the figures go, beside stdout."""

    plot: Path | None
    compare: Path | None  # an earlier report, to be drawn beside
    draw: Draw | None
    is_json: bool


def run_load_test(settings: Settings, paper: Paper, *, yes: bool, err: Console) -> int:
    """Print the figures to stdout, and draw them. BenchError if it cannot be run.

    The exit status: 0, 1 if there were errors, 130 after Ctrl-C.
    """
    check(settings)
    if paper.plot:
        check_writable(paper.plot, "--plot")
    other = read_report(paper.compare) if paper.compare else None
    test = LoadTest(settings, lambda text: status.update(escape(text)), lambda text: _note(err, text))
    if not yes:
        _confirm(settings, err)
    _allow_many_connections()
    interrupted = False
    with err.status("beginning") as status:
        try:
            asyncio.run(test.run())
        except KeyboardInterrupt:
            interrupted = True
    runs = test.figures()
    report = report_of(runs, test.capacity, settings.url, settings.ttft_s, settings.seed, interrupted=interrupted)
    _print(report, as_json=paper.is_json)
    if paper.plot and paper.draw and runs:
        paper.draw(paper.plot, report, other, paper.compare.stem if paper.compare else "")
    return INTERRUPTED if interrupted else int(report.errors > 0)


def _note(err: Console, text: str) -> None:
    err.print(escape(text), highlight=False, soft_wrap=True)


def _confirm(settings: Settings, err: Console) -> None:
    """A server of one's own machine may be overloaded without a question."""
    if _is_here(settings.url):
        return
    intent = f"This will load {settings.url} for minutes, with more than it can carry if the rate says so."
    if not sys.stdin.isatty():
        raise BenchError(f"{intent} Say --yes: there is nobody to ask")
    _note(err, intent)
    typer.confirm("Go on?", abort=True, err=True)


def _is_here(url: str) -> bool:
    try:
        host = httpx.URL(url).host
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (httpx.InvalidURL, UnicodeError):
        return True  # it will be found to be none
    except ValueError:
        return False


def _allow_many_connections() -> None:
    """Each request under way is an open file; shells often begin with 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(to_json(report))
        return
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = Console()
    for table in tables(report) if report.runs else []:
        console.print(table)
    for sentence in remarks(report):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
