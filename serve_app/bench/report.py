"""Run workloads one after another and show their figures as a table or as JSON."""

import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve_app.bench.measure import Figures, Workload

REMOTE_VOCABULARY = 1_000  # token ids that any served model has; a server does not tell its vocabulary


def run_all(
    model: str, url: str | None, workloads: Sequence[Workload], threads: int, *, as_json: bool, console: Console
) -> None:
    """Measure each workload, in this process or at `url`, and print the figures to stdout."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        measure = _remote(url) if url else _local(model, threads)
        for workload in workloads:
            progress.update(task, description=f"batch {workload.batch}, {workload.prompt_tokens} prompt tokens")
            rows.append(measure(workload))
    title = url or f"{model}, in this process, {threads} threads"
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode({"of": title, "runs": rows})).decode() + "\n")
    else:
        Console().print(_table(title, rows))


def _remote(url: str):  # type: ignore[no-untyped-def]
    from serve_app.bench.remote import run_remote

    return lambda workload: run_remote(url, workload, REMOTE_VOCABULARY)


def _local(model: str, threads: int):  # type: ignore[no-untyped-def]
    from serve_app.bench.local import LocalBench

    return LocalBench(model, threads).run


def _table(title: str, rows: Sequence[Figures]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in (
        "batch", "prompt", "output", "output tok/s", "decode tok/s", "prompt tok/s",
        "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms", "ITL p99 ms", "share of step time",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading.startswith("share") else "right")
    for row in rows:
        times = (row.ttft_p50_s, row.ttft_p99_s, row.itl_p50_s, row.itl_p99_s)
        rates = (row.output_tokens_per_s, row.decode_tokens_per_s, row.prompt_tokens_per_s)
        table.add_row(
            *(str(n) for n in (row.batch, row.prompt_tokens, row.output_tokens)),
            *(f"{rate:.0f}" for rate in rates),
            *(f"{1e3 * time_s:.1f}" for time_s in times),
            ", ".join(f"{part} {100 * share:.0f} %" for part, share in row.shares.items()),
        )
    return table
