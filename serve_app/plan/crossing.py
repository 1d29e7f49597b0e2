"""Where a growing function passes zero, in as few looks at it as can be."""

import math
from collections.abc import Callable

MOST_LOOKS = 80  # bisection alone would be done by then


def crossing(value: Callable[[float], float], low: float, high: float, *, close: float = 1e-6) -> float:
    """An argument in [low, high] with a value within `close` of zero, or where the sign changes in one jump.

    `low` where even that is not below zero, `high` where even that is not above. Chandrupatla's rule: through the last
    three points where they are nearly on a line, else the middle (doi 10.1016/S0965-9978(96)00051-8).
    """
    other, value_other = low, value(low)
    if value_other >= 0:
        return low
    best, value_best = high, value(high)
    if value_best <= 0:
        return high
    share = 0.5
    for _ in range(MOST_LOOKS):
        place = best + share * (other - best)
        found = value(place)
        if abs(found) <= close or abs(other - best) <= 1e-12:
            return place
        if (found > 0) == (value_best > 0):
            third, value_third = best, value_best
        else:
            third, value_third, other, value_other = other, value_other, best, value_best
        best, value_best = place, found
        share = _share(best, other, third, value_best, value_other, value_third)
    return best


def _share(x1: float, x2: float, x3: float, f1: float, f2: float, f3: float) -> float:
    """How far from x1 to x2 to look next. x1 and x2 have the zero between them; x3 is the point that was left."""
    xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2) if f3 != f2 else 0.0
    if not 1 - math.sqrt(1 - xi) < phi < math.sqrt(xi):
        return 0.5
    share = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
    return min(max(share, 1e-6), 1 - 1e-6)
