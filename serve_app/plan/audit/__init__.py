"""Declared figures that cannot all be true: each is computed again from the others.

    for finding in audit(read_declared(Path("declared.yaml"))): ...

A figure that does not hold comes with the reading that makes it true, found by trying other formulas, or with why none
does. No verdict is written down: other figures get other ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.errors import PlanError
from serve_app.plan.audit import alerts, goals, loss, memory, model, speed
from serve_app.plan.audit.declared import Declared, parse_declared, read_declared
from serve_app.plan.audit.facts import Check, Facts, UndeclaredError
from serve_app.plan.audit.readings import Judgement, Verdict

__all__ = ["Declared", "Finding", "Verdict", "audit", "parse_declared", "read_declared"]

_CHECKS: tuple[Check, ...] = (
    *model.CHECKS,
    *memory.CHECKS,
    *speed.CHECKS,
    *loss.CHECKS,
    *alerts.CHECKS,
    *goals.CHECKS,
)


@dataclass(frozen=True)
class Finding:
    """What is found of one declared figure, `field`. `reading`: what makes it true, or why nothing does."""

    row: str
    field: str
    declared: str
    computed: str
    verdict: Verdict
    reading: str

    @property
    def is_flagged(self) -> bool:
        return self.verdict != "holds"


def audit(declared: Declared) -> list[Finding]:
    """All findings, those that hold included. Raises PlanError where nothing can be checked, or no layout be made."""
    facts = Facts(declared)
    findings = [finding for check in _CHECKS for finding in _check(check, facts)]
    if not findings:
        raise PlanError("nothing of what is declared can be checked against anything else.")
    return findings


def _check(check: Check, facts: Facts) -> Iterator[Finding]:
    is_given = any(facts.given(field) for field in (check.field, *check.also))
    if not (is_given or check.speaks_up):
        return
    try:
        found = check.judge(facts)
    except UndeclaredError as error:
        if not is_given:  # nobody said it, and nothing says what it would be
            return
        found = Judgement(
            facts.shown(check.field), "", "undefined", f"it cannot be checked while {error.field} is not declared"
        )
    yield Finding(check.row, check.field, found.declared, found.computed, found.verdict, found.reading)
