"""A simulation at the terminal: how far it is, what it ran through, and how to see a failure again."""

import os
import sys

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app.sim.many import Outcome, run_many
from serve_app.sim.simulation import SimulationError, simulate
from serve_app.sim.world import Tally

INTERRUPTED = 130
MOST_SHOWN = 10  # failures


def run_simulation(seeds: range, *, as_json: bool, console: Console) -> int:
    """Run the seeds and print what they add up to. The exit status: 0, 1 if any failed, 130 after Ctrl-C."""
    total, interrupted = Outcome(Tally(), {}), False
    columns = (TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(seeds))
        outcomes = run_many(seeds, os.cpu_count() or 1)
        try:
            for outcome in outcomes:
                total.tally.add(outcome.tally)
                total.failures.update(outcome.failures)
                progress.update(task, completed=total.tally.seeds)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            outcomes.close()
    _print(total, as_json=as_json)
    _show_failures(total.failures, console)
    return INTERRUPTED if interrupted else int(bool(total.failures))


def trace_seeds(seeds: range, console: Console) -> int:
    """Run the seeds one by one, with each event on a line of stdout. The exit status: 0, 1 if any failed."""
    failures = {}
    for seed in seeds:
        try:
            simulate(seed, trace=print)
        except SimulationError as error:
            failures[seed] = error.text
    _show_failures(failures, console)
    return int(bool(failures))


def replay_command(seed: int) -> str:
    return f"octavo simulate --seeds 1 --first-seed {seed} --trace"


def _print(total: Outcome, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(total)).decode() + "\n")
        return
    figures = msgspec.structs.asdict(total.tally)
    print(", ".join(f"{num:,} {name.replace('_', ' ')}" for name, num in figures.items()))


def _show_failures(failures: dict[int, str], console: Console) -> None:
    for seed, text in sorted(failures.items())[:MOST_SHOWN]:
        console.print(f"[red]seed {seed}:[/red] {escape(text)}", highlight=False, soft_wrap=True)
        console.print(f"  replay it: {replay_command(seed)}", highlight=False, soft_wrap=True)
    if len(failures) > MOST_SHOWN:
        console.print(f"and {len(failures) - MOST_SHOWN} more seeds failed")
