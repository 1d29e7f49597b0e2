"""Numbers as they are read at a glance, always with their unit."""

import math
from collections.abc import Sequence

from serve_app.plan.estimate import Span
from serve_app.plan.workload import Lengths, Workload


def digits(value: float, num: int = 3) -> str:
    """So many digits that count, thousands apart, and never an exponent where it can be helped."""
    if not math.isfinite(value):
        return "none"
    if abs(value) >= 10**num - 0.5:
        return f"{value:,.0f}"
    return f"{value:.{num}g}"


def gb(num_bytes: float) -> str:
    """Without the unit: decimal gigabytes."""
    return f"{num_bytes / 1e9:.2f}"


def amount(num_bytes: float) -> str:
    return f"{digits(num_bytes / 1e9)} GB" if num_bytes >= 1e9 else f"{digits(num_bytes / 1e6)} MB"


def billions(num: float) -> str:
    return f"{num / 1e9:.{2 if num >= 1e9 else 3}f} B"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "no end"
    if seconds >= 172_800:
        return f"{digits(seconds / 86_400)} days"
    if seconds >= 7200:
        return f"{digits(seconds / 3600)} h"
    if seconds >= 120:
        return f"{digits(seconds / 60)} min"
    return f"{digits(seconds)} s" if seconds >= 0.9995 else f"{digits(seconds * 1e3)} ms"


def span(value: Span) -> str:
    return f"{duration(value.value)} ({duration(value.low)} to {duration(value.high)})"


def tokens(num: float) -> str:
    if num >= 1e6:
        return f"{digits(num / 1e6)} million"
    return f"{num:,.0f}"


def percent(share: float, num: int = 0) -> str:
    return f"{100 * share:.{num}f} %"


def share_of_time(share: float) -> str:
    """As many digits as tell it from 100 %."""
    if share >= 1:
        return "100 %"
    num = 2 if share < 0.99 else min(10, 1 - math.floor(math.log10(1 - share)) - 1)
    return percent(share, num)


def changed(ratio: float) -> str:
    """«+4.6 %» of 1.046."""
    return f"{100 * (ratio - 1):+.1f} %"


def lengths(of: Lengths) -> str:
    least, most = of.points[0][0], of.most
    return f"{most:,} tokens" if least == most else f"{least:,} to {most:,} tokens ({of.mean:,.0f} in the mean)"


def load(workload: Workload) -> str:
    if workload.rate is not None:
        return f"{workload.rate:g} requests/s"
    return f"{workload.concurrency:,} sequences at a time"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def num(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
