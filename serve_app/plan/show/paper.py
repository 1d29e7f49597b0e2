"""Where a plan goes: the terminal, stdout as JSON, files. What cannot be written is a PlanError."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve_app.errors import PlanError
from serve_app.plan.answer import Answer
from serve_app.plan.files import shown
from serve_app.plan.search import Candidate
from serve_app.plan.show.figures import clean, row

WIDTH = 120  # of what is no terminal


def to_json(value: dict[str, Any]) -> str:
    """The same value is the same text."""
    return json.dumps(clean(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def console(*, is_terminal: bool, has_columns: bool) -> Console:
    """A file has no width of its own."""
    return Console(highlight=False, width=None if is_terminal or has_columns else WIDTH)


def lines(of: Iterable[tuple[str, str]]) -> Table:
    """A word, and what there is to say of it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for word, text in of:
        grid.add_row(escape(word), escape(text))
    return grid


def pareto_csv(answer: Answer) -> str:
    """Of the layouts that no other beats in all of throughput on each GPU, TTFT, TPOT, GPUs and blast radius."""
    text = io.StringIO()
    records = [_record(candidate) for candidate in answer.pareto]
    writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else ["layout"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(candidate: Candidate) -> dict[str, Any]:
    flat = row(candidate)
    sizes = flat.pop("layout")
    return {
        "layout": sizes.pop("text"),
        **sizes,
        **{key: "; ".join(value) if isinstance(value, list) else _cell(value) for key, value in flat.items()},
    }


def _cell(value: Any) -> Any:
    value = clean(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise PlanError(f"{option} {shown(path)} cannot be written: {error.strerror}") from None
