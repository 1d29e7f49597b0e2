"""Run workloads one after another and show their figures as a table or as JSON."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve_app.bench.measure import Advance, BenchError, Figures, Workload


class Bench(Protocol):
    """Something loaded that runs workloads."""

    def run(self, workload: Workload, advance: Advance) -> Figures: ...

    def trace(self, workload: Workload, path: Path) -> None: ...


REDRAW_S = 0.1  # a bar drawn for each token would be measured too


class Target(msgspec.Struct, frozen=True):
    """What is to be measured."""

    model: str
    url: str | None  # a server; None: on this machine, without one
    layout: dict[str, Any]  # keys of `layout` in a config; empty: in this process
    threads: int  # that compute, of each worker

    @property
    def title(self) -> str:
        if self.url:
            return self.url
        if not self.layout:
            return f"{self.model}, in this process, threads: {self.threads}"
        cut = " x ".join(f"{key.upper()} {self.layout.get(key, 1)}" for key in ("tp", "pp", "dp"))
        return f"{self.model}, {cut}, a process for each worker, threads of each: {self.threads}"


def run_all(
    target: Target, workloads: Sequence[Workload], *, trace: Path | None, as_json: bool, console: Console
) -> None:
    """Measure each workload and print the figures to stdout. `trace`: where the first one, run again, is recorded."""
    if trace and target.url:
        raise BenchError("--trace is for runs on this machine: a server records no trace")
    if target.url and target.layout:
        raise BenchError(
            "--tp, --pp, --dp and --stage-layers are for runs on this machine: a server has its own layout"
        )
    if trace and (trace.is_dir() or not trace.parent.is_dir()):
        raise BenchError(f"the trace cannot be written: {trace} is a folder, or in none that there is")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        with _open(target, workloads) as bench:
            progress.update(task, total=sum(workload.num_output_tokens for workload in workloads))
            advance = _advance(progress, task)
            for workload in workloads:
                progress.update(task, description=f"batch {workload.batch}, {workload.prompt_tokens} prompt tokens")
                rows.append(bench.run(workload, advance))
            if trace:
                progress.update(task, description="recording")
                bench.trace(workloads[0], trace)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode({"of": target.title, "runs": rows})).decode() + "\n")
    else:
        for table in _tables(target.title, rows):
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


def _open(target: Target, workloads: Sequence[Workload]) -> AbstractContextManager[Bench]:
    # torch, and all that needs it, is for those that run a model
    if target.url:
        from serve_app.bench.remote import RemoteBench

        return nullcontext(RemoteBench(target.url))
    if target.layout:
        from serve_app.bench.cell import CellBench

        return CellBench(target.model, target.layout, target.threads, workloads)
    from serve_app.bench.local import LocalBench

    return nullcontext(LocalBench(target.model, target.threads, workloads))


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
