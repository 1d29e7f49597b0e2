"""Run workloads one after another and show their figures as a table or as JSON."""

import itertools
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve_app.bench.measure import Advance, Figures, Workload

Measure = Callable[[Workload, Advance], Figures]
REMOTE_VOCABULARY = 1_000  # token ids that any served model has; a server does not tell its vocabulary
REDRAW_S = 0.1  # a bar drawn for each token would be measured too


def run_all(
    model: str, url: str | None, workloads: Sequence[Workload], threads: int, *, as_json: bool, console: Console
) -> None:
    """Measure each workload, in this process or at `url`, and print the figures to stdout."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        measure = _remote(url) if url else _local(model, threads, workloads)
        progress.update(task, total=sum(workload.num_output_tokens for workload in workloads))
        advance = _advance(progress, task)
        for workload in workloads:
            progress.update(task, description=f"batch {workload.batch}, {workload.prompt_tokens} prompt tokens")
            rows.append(measure(workload, advance))
    title = url or f"{model}, in this process, {threads} threads"
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode({"of": title, "runs": rows})).decode() + "\n")
    else:
        for table in _tables(title, rows):
            Console().print(table)


def _advance(progress: Progress, task: TaskID) -> Advance:
    """Moves the bar by output tokens."""
    num_done, drawn_s = 0, 0.0

    def advance(num_tokens: int) -> None:
        nonlocal num_done, drawn_s
        num_done += num_tokens
        if time.perf_counter() - drawn_s > REDRAW_S:
            progress.update(task, completed=num_done)
            drawn_s = time.perf_counter()

    return advance


def _remote(url: str) -> Measure:
    """Each run has prompts of its own: the server may still hold the KV of any that it has seen before."""
    from serve_app.bench.remote import run_remote

    seeds = itertools.count(secrets.randbits(62))
    return lambda workload, advance: run_remote(
        url, msgspec.structs.replace(workload, seed=next(seeds)), REMOTE_VOCABULARY, advance
    )


def _local(model: str, threads: int, workloads: Sequence[Workload]) -> Measure:
    from serve_app.bench.local import LocalBench

    return LocalBench(model, threads, workloads).run


def _tables(title: str, rows: Sequence[Figures]) -> Iterator[Table]:
    headings = ("batch", "prompt", "output", "out/s", "decode/s", "in/s", "TTFT p50", "p99", "ITL p50", "p99")
    table = Table(
        *headings, title=f"{title}: tokens, tokens per second, milliseconds", title_justify="left", box=SIMPLE
    )
    for row in rows:
        counts = (row.batch, row.prompt_tokens, row.output_tokens)
        rates = (row.output_tokens_per_s, row.decode_tokens_per_s, row.prompt_tokens_per_s)
        times = (row.ttft_p50_s, row.ttft_p99_s, row.itl_p50_s, row.itl_p99_s)
        figures = [f"{count}" for count in counts] + [f"{rate:.0f}" for rate in rates]
        table.add_row(*figures, *(f"{1e3 * time_s:.1f}" for time_s in times))
    for column in table.columns:
        column.justify = "right"
    yield table
    if rows[0].shares:
        yield _shares(rows)


def _shares(rows: Sequence[Figures]) -> Table:
    table = Table("batch", "prompt", *rows[0].shares, title="where the time goes, %", title_justify="left", box=SIMPLE)
    for row in rows:
        shares = [f"{100 * share:.0f}" for share in row.shares.values()]
        table.add_row(str(row.batch), str(row.prompt_tokens), *shares)
    for column in table.columns:
        column.justify = "right"
    return table
