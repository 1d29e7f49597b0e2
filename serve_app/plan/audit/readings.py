"""Verdicts on declared figures, and the search for what an author may have computed: a few formulas, tried in turn."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Literal

Verdict = Literal["holds", "does not hold", "holds only if", "missing", "undefined", "not applicable in serving"]

TOLERANCE = 0.01
DIGITS_TOLERANCE = 0.04  # within which the same digits, rounded or cut off, are the same number
MOST_READINGS = 3


@dataclass(frozen=True)
class Judgement:
    """Of one declared figure. `reading`: what makes it true, or why nothing does."""

    declared: str
    computed: str
    verdict: Verdict
    reading: str = ""


@dataclass(frozen=True)
class Formula:
    """A way to come to a figure. `against`: the declared figure that it contradicts; none: only a condition."""

    text: str
    value: float
    against: str = ""


def agrees(declared: float, computed: float) -> bool:
    """Within 1 %, or the same digits as far as they are declared."""
    if math.isclose(declared, computed, rel_tol=TOLERANCE):
        return True
    if not math.isfinite(computed) or not math.isclose(declared, computed, rel_tol=DIGITS_TOLERANCE):
        return False
    written = Decimal(repr(float(declared)))
    return any(Decimal(repr(computed)).quantize(written, way) == written for way in (ROUND_DOWN, ROUND_HALF_UP))


def in_gb(text: str, num_bytes: float, against: str = "") -> list[Formula]:
    """As GB, and as GiB called GB."""
    return [Formula(text, num_bytes / 1e9, against), Formula(f"{text}, in GiB", num_bytes / 2**30, against)]


def matching(declared: float, formulas: Iterable[Formula]) -> list[Formula]:
    """Those that come to the figure: what contradicts nothing first, then the nearest."""
    found = [formula for formula in formulas if agrees(declared, formula.value)]
    return sorted(found, key=lambda formula: (formula.against != "", round(abs(formula.value / declared - 1), 6)))


def judge(
    declared: float, computed: float, unit: str, formulas: Iterable[Formula] = (), *, remark: str = "", none: str = ""
) -> Judgement:
    """A figure against the computed one and, where they differ, against other formulas.

    `remark`: said of a figure that holds. `none`: why no formula comes to it.
    """
    shown, right = f"{number(declared)} {unit}".strip(), f"{number(computed)} {unit}".strip()
    if agrees(declared, computed):
        return Judgement(shown, right, "holds", remark)
    found = matching(declared, formulas)
    if not found:
        return Judgement(shown, right, "does not hold", none or "no formula that was tried comes to it")
    verdict: Verdict = "does not hold" if found[0].against else "holds only if"
    return Judgement(shown, right, verdict, "; or ".join(map(_sentence, found[:MOST_READINGS])))


def number(value: float) -> str:
    """Four digits, and whole numbers as they are."""
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _sentence(formula: Formula) -> str:
    against = f" (against {formula.against})" if formula.against else ""
    return f"it is {formula.text} = {number(formula.value)}{against}"
