"""The admission budgets, and what the audit finds of declared figures."""

from collections.abc import Iterator, Sequence

from serve_app.plan.answer import Answer
from serve_app.plan.audit import Finding
from serve_app.plan.report.figures import number, plural, time
from serve_app.plan.report.markup import Html, section, table, tag

_SIGNS = {"holds": "✓", "does not hold": "✕", "holds only if": "?"}


def admission(answer: Answer) -> Html:
    """Empty without a TTFT objective: then nothing limits the queue."""
    ttft_s, deployment = answer.question.workload.objective.ttft_s, answer.deployment
    if ttft_s is None:
        return Html()
    told = (
        f"Prompt tokens that may wait in a cell so that the last of them has its first token within {time(ttft_s)};"
        " what comes on top is refused at the door. The bound is what the hardware allows at most."
    )
    rows = [
        [
            f"{num} of {deployment.dp}" + (" (all)" if num == deployment.dp else ""),
            number(tokens),
            number(round(answer.bound_tokens[num])),
        ]
        for num, tokens in sorted(answer.budgets.items(), reverse=True)
    ]
    heads = ["replicas that serve", "tokens that may wait", "bound"]
    made = table("Admission budget of a cell", heads, rows, numbers=[1, 2], wide=False)
    return section("admission", "Admission", tag("p", told), made)


def audited(findings: Sequence[Finding]) -> Html:
    """Empty where nothing was declared."""
    if not findings:
        return Html()
    flagged = [finding for finding in findings if finding.is_flagged]
    others = [finding for finding in findings if not finding.is_flagged]
    told = (
        f"{plural(len(findings), 'declared figure')} computed again from the others:"
        f" {len(flagged)} of them are flagged, {len(others)} hold."
    )
    parts = [_table("Flagged figures", flagged)] if flagged else []
    if others:
        parts.append(
            tag("details", tag("summary", f"The {len(others)} that hold"), _table("Figures that hold", others))
        )
    return section("audit", "Audit", tag("p", told), *parts)


def _table(caption: str, findings: Sequence[Finding]) -> Html:
    return table(caption, ["figure", "declared", "computed", "verdict", "what would make it true"], _rows(findings))


def _rows(findings: Sequence[Finding]) -> Iterator[list[str]]:
    for finding in findings:
        sign, kind = _SIGNS.get(finding.verdict, "–"), "bad" if finding.is_flagged else "good"
        verdict = tag("span", f"{sign} {finding.verdict}", class_=f"verdict {kind}")
        figure = tag("span", finding.row, " ", tag("small", finding.field, class_="note"))
        yield [figure, finding.declared, finding.computed or "–", verdict, finding.reading]
