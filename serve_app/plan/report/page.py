"""The page as a whole."""

from collections.abc import Sequence

from serve_app.plan.answer import Answer
from serve_app.plan.audit import Finding
from serve_app.plan.report.candidates import candidates
from serve_app.plan.report.findings import admission, audited
from serve_app.plan.report.head import compared, head
from serve_app.plan.report.held import memory
from serve_app.plan.report.losses import lost
from serve_app.plan.report.markup import Html, join, tag
from serve_app.plan.report.operations import operations
from serve_app.plan.report.sources import sources
from serve_app.plan.report.style import STYLE
from serve_app.plan.seats import place_of


def page(answer: Answer, findings: Sequence[Finding], killed: int | None) -> Html:
    """Raises PlanError where there is no GPU `killed`."""
    if killed is not None:
        place_of(answer.deployment, answer.question.system.gpus_per_node, killed)
    sections = [
        ("figures", "Figures", compared(answer)),
        ("losses", "Losses", lost(answer, killed)),
        ("layouts", "Layouts", candidates(answer)),
        ("memory", "Memory", memory(answer)),
        ("operations", "Operations", operations(answer)),
        ("admission", "Admission", admission(answer)),
        ("audit", "Audit", audited(findings)),
        ("sources", "Sources", sources(answer)),
    ]
    shown = [(anchor, name, content) for anchor, name, content in sections if content]
    links = (tag("a", name, href=f"#{anchor}") for anchor, name, _ in shown)
    body = tag(
        "body",
        head(answer),
        tag("nav", *links, aria_label="Parts of this page"),
        tag("main", *(content for _, _, content in shown)),
    )
    top = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{answer.deployment} · {answer.question.model} · Octavo plan"),
        tag("style", STYLE),
    )
    return join([Html("<!DOCTYPE html>\n"), tag("html", top, body, lang="en")])
