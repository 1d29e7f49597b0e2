"""Figures as they are read: three digits, a unit, and the interval where there is one."""

import math

from serve_app.plan.estimate import Span
from serve_app.plan.story import seconds


def number(value: float) -> str:
    """Whole numbers and large ones as they are, others with three digits."""
    if not math.isfinite(value):
        return "without end"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def time(value_s: float) -> str:
    return seconds(value_s) if math.isfinite(value_s) else "without end"


def spanned(span: Span) -> str:
    """A time, and between which nine of ten are expected."""
    if not math.isfinite(span.value):
        return "without end"
    return f"{time(span.value)} ({time(span.low)} to {time(span.high)})"


def gb(num_bytes: float) -> str:
    """Decimal, as data sheets have it."""
    size = num_bytes / 1e9
    return f"{size:,.1f} GB" if size >= 10 else f"{size:.2f} GB" if size >= 0.01 else f"{size * 1e3:.3g} MB"


def percent(share: float) -> str:
    if share >= 0.1 or share <= 0:
        return f"{100 * share:.0f} %"
    digits = min(8, 2 - math.floor(math.log10(100 * share)))
    return f"{100 * share:.{digits}f}".rstrip("0").rstrip(".") + " %"


def nines(share: float) -> str:
    """A share near one, with as many digits as show what is missing."""
    missing = 1.0 - share
    if missing <= 0:
        return "100 %"
    digits = min(8, max(1, -math.floor(math.log10(missing)) - 1))
    return f"{100 * share:.{digits}f} %"


def plural(num: float, what: str) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{number(num)} {what}{'' if num == 1 else 's'}"
