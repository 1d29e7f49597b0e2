"""A drill at the terminal: what it is going to do, how it goes, what it found."""

import asyncio
import sys
from collections.abc import Sequence

import msgspec
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve_app.cluster.strike import Strikers
from serve_app.drill.ask import DrillError
from serve_app.drill.drill import Drill, Settings, inspect
from serve_app.drill.report import KillFigures, Report
from serve_app.drill.targets import targets
from serve_app.runtime.snapshot import ProcessView

INTERRUPTED = 130
_PHASES = ("notice", "fence", "repair", "load", "first token", "restored")  # in this order; then whatever else there is


def run_drill(settings: Settings, *, yes: bool, as_json: bool, console: Console) -> int:
    """Hold a drill and print what it found to stdout. The exit status: 0, or 130 after Ctrl-C.

    DrillError if it found a fault, or could not be held.
    """
    _check(settings)
    processes = asyncio.run(inspect(settings))
    if not yes:
        _confirm(_intent(settings, processes), console)
    interrupted = False
    with console.status("finding the processes") as status, Strikers() as hand:
        hand.warm()
        drill = Drill(settings, hand, lambda text: status.update(escape(text)))
        try:
            asyncio.run(drill.run())
        except KeyboardInterrupt:
            interrupted = True
        finally:
            drill.thaw()
        report = drill.report()
    _print(report, as_json=as_json)
    if interrupted:
        return INTERRUPTED
    if not report.passed:
        raise DrillError("; ".join(report.problems))
    return 0


def _check(settings: Settings) -> None:
    if settings.thaw_after_s is not None and not settings.freeze:
        raise DrillError("--thaw-after is for what --freeze froze")
    if settings.freeze and "node" in settings.roles:
        raise DrillError("a node is killed, not frozen: leave --freeze or --kill node out")


def _intent(settings: Settings, processes: Sequence[ProcessView]) -> str:
    verb = "freeze" if settings.freeze else "kill"
    what = [
        f"{settings.count} x a node with all that Ray runs on it"
        if role == "node"
        else f"{settings.count} x {role} (of {len(targets(role, processes, ()))})"
        for role in settings.roles
    ]
    return f"This will {verb}, at {settings.url}, under load, one after another: {', '.join(what)}."


def _confirm(intent: str, console: Console) -> None:
    if not sys.stdin.isatty():
        raise DrillError(f"{intent} Say --yes: there is nobody to ask")
    console.print(escape(intent), highlight=False)
    typer.confirm("Go on?", abort=True, err=True)


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
        return
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = Console()
    if report.kills:
        console.print(_gaps(report))
        console.print(_phases(report))
    console.print(_summary(report), highlight=False)


def _gaps(report: Report) -> Table:
    """A row for each kill: what clients felt."""
    table = _table("Longest gap of each stream, seconds", ["streams", "p50", "p99", "max", "whole again"])
    for kill in report.kills:
        gaps = (kill.p50_gap_s, kill.p99_gap_s, kill.max_gap_s)
        is_whole = "yes" if kill.restored else "no"
        table.add_row(escape(_name(kill)), str(kill.num_streams), *map(_seconds, gaps), is_whole)
    return table


def _phases(report: Report) -> Table:
    """A row for each kill: where the time went."""
    phases = [phase for phase in _PHASES if phase in report.phases]
    phases += sorted(report.phases.keys() - set(phases))
    table = _table("Phases, seconds", phases)
    for kill in report.kills:
        seconds = [_seconds(kill.phases[phase]) if phase in kill.phases else "-" for phase in phases]
        table.add_row(escape(_name(kill)), *seconds)
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    """Two narrow ones fit a terminal of 80 columns where one does not."""
    table = Table("struck", *headings, title=title, title_justify="left", box=SIMPLE, padding=(0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _name(kill: KillFigures) -> str:
    return f"{kill.role} {kill.name}" + (", frozen" if kill.frozen else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 9.995 else f"{seconds:.1f}"


def _summary(report: Report) -> str:
    return (
        f"{report.num_streams} streams: {report.failed} failed, {report.different} differ from the undisturbed run; "
        f"{report.num_resumed} times one went on over another connection; longest gap {_seconds(report.max_gap_s)} s"
    )
