"""How a fetch says how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

Report = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0: not known)


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """A report that goes nowhere."""


def counted(report: Report, what: str, total_bytes: int) -> Callable[[int], None]:
    """`report` for who knows only how many bytes are done each time."""
    done_bytes = 0

    def advance(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        report(what, done_bytes, total_bytes)

    return advance


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A report drawn on standard error, with one line for each thing that is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def report(what: str, done_bytes: int, total_bytes: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=None)
            progress.start()  # no sooner: a bar without lines would print an empty one
        progress.update(tasks[what], completed=done_bytes, total=total_bytes or None)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()
