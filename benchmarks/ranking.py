"""How good predictions are: as numbers, and as an order."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

T = TypeVar("T")
APART = 0.1  # measurements less than this share apart have no order
NUM_RESAMPLED = 200


@dataclass(frozen=True)
class Errors:
    """Of predictions, as shares of what was measured. low, high: between them are nine of ten of measured/predicted."""

    num: int
    mean: float
    median: float
    p90: float
    signed: float  # median of predicted/measured - 1: below 0, predicted too little
    low: float
    high: float


def errors_of(measured: Sequence[float], predicted: Sequence[float]) -> Errors:
    """ValueError for none at all."""
    if not measured:
        raise ValueError("no measurement to compare with.")
    ratios = sorted(p / m for m, p in zip(measured, predicted, strict=True))
    sizes = sorted(abs(ratio - 1) for ratio in ratios)
    return Errors(
        num=len(ratios),
        mean=math.fsum(sizes) / len(sizes),
        median=quantile(sizes, 0.5),
        p90=quantile(sizes, 0.9),
        signed=quantile(ratios, 0.5) - 1,
        low=1 / quantile(ratios, 0.95),
        high=1 / quantile(ratios, 0.05),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """With linear interpolation."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Order:
    """How many pairs that lie apart are predicted in their order; equal predictions are not."""

    num_right: int = 0
    num_pairs: int = 0

    @property
    def share(self) -> float:
        return self.num_right / self.num_pairs if self.num_pairs else math.nan

    def __add__(self, other: "Order") -> "Order":
        return Order(self.num_right + other.num_right, self.num_pairs + other.num_pairs)


def order_of(pairs: Iterable[tuple[int, int]], measured: Sequence[float], predicted: Sequence[float]) -> Order:
    num_right = num_pairs = 0
    for a, b in pairs:
        least, most = sorted((measured[a], measured[b]))
        if most <= least * (1 + APART):
            continue
        num_pairs += 1
        num_right += (measured[a] < measured[b]) == (predicted[a] < predicted[b]) and predicted[a] != predicted[b]
    return Order(num_right, num_pairs)


def groups_of(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[int]]:
    """Indices of those that have the same key, two at least."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[key(item)].append(index)
    return [group for group in groups.values() if len(group) > 1]


def orders_in(groups: Sequence[Sequence[int]], measured: Sequence[float], predicted: Sequence[float]) -> list[Order]:
    """Of all pairs within each group."""
    return [order_of(combinations(group, 2), measured, predicted) for group in groups]


def random_pairs(groups: Sequence[Sequence[int]], num: int, seed: int) -> list[tuple[int, int]]:
    """Two of the same group, each group as often as it has members."""
    rng = random.Random(seed)
    chosen = rng.choices(groups, weights=[len(group) for group in groups], k=num)
    return [(a, b) for a, b in (rng.sample(list(group), 2) for group in chosen)]


def spread_of(orders: Sequence[Order], seed: int) -> tuple[float, float]:
    """Where the share lies with 90 %, if other groups had been measured: groups drawn again, with repeats."""
    rng = random.Random(seed)
    drawn = (sum(rng.choices(orders, k=len(orders)), Order()) for _ in range(NUM_RESAMPLED))
    shares = sorted(order.share for order in drawn if order.num_pairs)
    return (quantile(shares, 0.05), quantile(shares, 0.95)) if shares else (math.nan, math.nan)
