"""A planner's answer as one HTML page that needs nothing else: no network, no script."""

from collections.abc import Sequence
from pathlib import Path

from serve_app.errors import PlanError
from serve_app.plan.answer import Answer
from serve_app.plan.audit import Finding
from serve_app.plan.report.page import page


def write_report(path: Path, answer: Answer, findings: Sequence[Finding] = (), *, killed: int | None = None) -> None:
    """The same bytes for the same answer. `killed`: a GPU whose loss is shown first.

    Raises PlanError where the file cannot be written, or there is no such GPU.
    """
    text = page(answer, findings, killed)
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror or error}") from None
