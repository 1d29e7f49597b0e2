"""The audit of declared figures, at the terminal and as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from serve_app.plan.show import words

if TYPE_CHECKING:  # a pydantic model of each section, which a plan without an audit need not build
    from serve_app.plan.audit import Finding

_COLUMNS = {"figure": 2, "declared": 2, "computed": 3, "verdict": 2, "what makes it true": 7}  # and their widths


def audit_table(findings: "Sequence[Finding]") -> Table:
    made = Table(title="Declared figures", title_justify="left", title_style="bold", box=SIMPLE, expand=True)
    for name, width in _COLUMNS.items():
        made.add_column(name, ratio=width)
    for found in findings:
        style = "" if not found.is_flagged else "yellow"
        row = (found.row, found.declared, found.computed, found.verdict, found.reading)
        made.add_row(*map(escape, row), style=style)
    return made


def audit_sentence(findings: "Sequence[Finding]") -> str:
    counts = Counter(found.verdict for found in findings)
    told = words.listed([f"{num} {verdict}" for verdict, num in counts.most_common()])
    return f"{words.num(len(findings), 'figure')}: {told}."


def audit_figures(findings: "Sequence[Finding]") -> dict[str, Any]:
    return {
        "findings": [
            {
                "figure": found.row,
                "field": found.field,
                "declared": found.declared,
                "computed": found.computed,
                "verdict": found.verdict,
                "reading": found.reading,
            }
            for found in findings
        ],
        "num_findings": len(findings),
        "num_flagged": sum(found.is_flagged for found in findings),
    }
