"""What is asked for: lengths, how requests arrive, and what is promised to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

NUM_POINTS = 16  # that a range is taken apart into


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: (tokens, weight), tokens growing, weights summing to one."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Raises ValueError for a length below one, a negative weight, or none at all."""
        if not self.points or sum(weight for _, weight in self.points) <= 0:
            raise ValueError("lengths need at least one with a weight above 0.")
        if any(tokens < 1 or weight < 0 for tokens, weight in self.points):
            raise ValueError("lengths must be at least 1, their weights at least 0.")

    @staticmethod
    def of(weights: Sequence[tuple[int, float]]) -> "Lengths":
        """Sorted, equal ones summed up, weights made to sum to one."""
        merged: dict[int, float] = {}
        for tokens, weight in weights:
            merged[tokens] = merged.get(tokens, 0.0) + weight
        total = sum(merged.values())
        if total <= 0:
            raise ValueError("lengths need at least one with a weight above 0.")
        return Lengths(tuple((tokens, merged[tokens] / total) for tokens in sorted(merged)))

    @staticmethod
    def fixed(tokens: int) -> "Lengths":
        return Lengths(((tokens, 1.0),))

    @staticmethod
    def uniform(least: int, most: int) -> "Lengths":
        """Every length of a range alike, told by the middles of NUM_POINTS equal parts."""
        if most < least:
            raise ValueError(f"a range of lengths must not end ({most}) before it begins ({least}).")
        width = (most - least) / NUM_POINTS
        return Lengths.of([(round(least + width * (i + 0.5)), 1.0) for i in range(NUM_POINTS)])

    @property
    def mean(self) -> float:
        return sum(tokens * weight for tokens, weight in self.points)

    @property
    def most(self) -> int:
        return self.points[-1][0]

    @property
    def mean_square(self) -> float:
        return sum(tokens**2 * weight for tokens, weight in self.points)

    def quantile(self, share: float) -> int:
        """The least length that `share` of all do not exceed."""
        seen = 0.0
        for tokens, weight in self.points:
            seen += weight
            if seen >= share - 1e-12:
                return tokens
        return self.most


@dataclass(frozen=True)
class Objective:
    """What a layout must keep. None: not asked for."""

    ttft_s: float | None = None
    tpot_ms: float | None = None
    recovery_s: float | None = None
    availability: float | None = None  # share of time in which the healthy objective is kept, 0..1
    prefill_tokens_ms: float | None = None  # tokens/ms on one GPU


@dataclass(frozen=True)
class Workload:
    """Requests. Either `rate` (requests/s over all GPUs) or `concurrency` (sequences at a time over all GPUs)."""

    isl: Lengths  # prompt tokens
    osl: Lengths  # answer tokens
    concurrency: int | None = 128
    rate: float | None = None
    prefix_share: float = 0.0  # of a prompt's tokens that are found in the cache
    burstiness: float = 1.0  # coefficient of variation of the times between arrivals; 1: Poisson
    chunk_tokens: int = 8192  # prompt tokens of one step, at most
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        """Raises ValueError naming what contradicts."""
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("a workload needs either a concurrency or a rate, and not both.")
        if not 0 <= self.prefix_share < 1:
            raise ValueError(f"prefix_share must be at least 0 and below 1, not {self.prefix_share}.")
        for name in ("concurrency", "rate", "burstiness", "chunk_tokens"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}.")

    @property
    def mean_tokens(self) -> float:
        """Of a sequence in the middle of its answer."""
        return self.isl.mean + self.osl.mean / 2

    @property
    def most_tokens(self) -> int:
        return self.isl.most + self.osl.most
