"""How long a step takes: learned from the steps that were run, for a cell with so many replicas at work.

A pipeline that is kept busy ends one step per interval of its slowest stage, so the time from one step's end to the
next one's is what counts, not the sum over workers. It is taken to be linear in the step's work, with no negative part:
of what every step costs, what a prompt token costs, a decoding row, and a thousand pairs of token and attended token.

The fit is robust: residuals count relative to the step, and beyond twice the typical one only linearly (Huber).
Its level is that of the mean step.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from operator import mul

import msgspec

from serve_app.engine.plan import Slice

MAX_OBSERVED = 256  # steps that are remembered
MIN_OBSERVED = 4  # before that many nothing is said
SEED_WEIGHT = 0.2  # of a step of the calibration, beside one of now
NUM_SWEEPS, NUM_REFITS = 60, 3
MAX_STALL = 8.0  # times what a step should take: what is longer says nothing of the next ones
FIT_EVERY = 8  # observations; later, when few more change little, twice that


class Work(msgspec.Struct, frozen=True, array_like=True):
    """What one step computes."""

    prompt_tokens: float = 0.0
    decode_rows: float = 0.0
    attended_kpairs: float = 0.0  # thousands of (token, token that it attends to)

    @property
    def row(self) -> "Row":
        return 1.0, self.prompt_tokens, self.decode_rows, self.attended_kpairs


class Observed(msgspec.Struct, frozen=True, array_like=True):
    """One step, and the seconds from the end of the step before it to its own."""

    work: Work
    seconds: float


def work_of(slices: Iterable[Slice]) -> Work:
    """A slice of one token is a decoding row, whatever it ends."""
    prompt_tokens = rows = pairs = 0
    for part in slices:
        num_tokens = len(part.tokens)
        if num_tokens == 1:
            rows += 1
        else:
            prompt_tokens += num_tokens
        pairs += num_tokens * (part.start + num_tokens // 2)
    return Work(prompt_tokens, rows, pairs / 1e3)


Row = tuple[float, float, float, float]
Costs = tuple[float, float, float, float]  # seconds: of a step, a prompt token, a decoding row, a thousand pairs


class Pace:
    """What steps cost while a certain number of replicas is at work."""

    def __init__(self, seed: Iterable[Observed] = ()) -> None:
        """`seed`: of a calibration. They keep the shape known of what is not seen for long."""
        self._seed = tuple(seed)
        self._observed: deque[Observed] = deque(maxlen=MAX_OBSERVED)
        self._num_since = 0
        self._costs: Costs | None = None
        self._fit()

    @property
    def costs(self) -> Costs | None:
        """None while too little is known."""
        return self._costs

    @property
    def observed(self) -> list[Observed]:
        return [*self._seed, *self._observed]

    def observe(self, observed: Observed) -> None:
        self._observed.append(observed)
        self._num_since += 1
        if (
            self._num_since >= (FIT_EVERY if len(self._observed) < MAX_OBSERVED else 2 * FIT_EVERY)
            or self._costs is None
        ):
            self._fit()

    def step_s(self, work: Work) -> float:
        """Seconds of a step; 0.0 while nothing is known."""
        return dot(self._costs, work.row) if self._costs else 0.0

    def _fit(self) -> None:
        self._num_since = 0
        if len(self._seed) + len(self._observed) < MIN_OBSERVED:
            return
        weights = [SEED_WEIGHT] * len(self._seed) + [1.0] * len(self._observed)
        self._costs = fit(self.observed, weights)


class Paces:
    """A pace for each number of replicas at work: those of one machine slow each other down."""

    def __init__(self) -> None:
        self._paces: dict[int, Pace] = {}

    def seed(self, num_replicas: int, observed: Iterable[Observed]) -> None:
        self._paces[num_replicas] = Pace(observed)

    def known(self) -> dict[int, Pace]:
        """By number of replicas: those that were asked for, in growing order."""
        return dict(sorted(self._paces.items()))

    def of(self, num_replicas: int) -> Pace:
        """What is known best. Of a number never seen: as with the next one, as if all shared one machine."""
        pace = self._paces.get(num_replicas)
        if pace is None or not pace.observed:
            pace = self._paces[num_replicas] = Pace(self._guess(num_replicas))
        return pace

    def _guess(self, num_replicas: int) -> list[Observed]:
        known = [num for num, pace in self._paces.items() if pace.costs]
        if not known:
            return []
        nearest = min(known, key=lambda num: (abs(num - num_replicas), num))
        slower = max(1.0, num_replicas / nearest)
        return [Observed(o.work, o.seconds * slower) for o in self._paces[nearest].observed[-MAX_OBSERVED // 4 :]]


def fit(observed: Sequence[Observed], weights: Sequence[float]) -> Costs:
    """Non-negative costs; their shape has the least robust relative error: what counts is the missed part of a step.

    Relative to what the fit says, not to what was seen: an interval of next to nothing, of two steps whose ends were
    told at once, would otherwise outweigh all others.
    """
    rows = [o.work.row for o in observed]
    seconds = [o.seconds for o in observed]
    least_s = max(sorted(seconds)[len(seconds) // 2] / 4, 1e-9)
    scales = [max(s, least_s) for s in seconds]
    costs = _least_squares(rows, seconds, [w / scale**2 for w, scale in zip(weights, scales, strict=True)])
    for _ in range(NUM_REFITS):
        fitted = [dot(costs, row) for row in rows]
        scales = [max(s, least_s) for s in fitted]
        errors = [abs(s - f) / scale for s, f, scale in zip(seconds, fitted, scales, strict=True)]
        bound = 2.0 * max(sorted(errors)[len(errors) // 2], 0.02)
        tamed = [
            w / scale**2 * min(1.0, bound / max(e, 1e-9)) for w, scale, e in zip(weights, scales, errors, strict=True)
        ]
        costs = _least_squares(rows, seconds, tamed)
    return _level(costs, rows, seconds, weights)


def _level(costs: Costs, rows: Sequence[Row], seconds: Sequence[float], weights: Sequence[float]) -> Costs:
    """The same shape, as high as steps were in the mean: who waits for many waits for their sum, stalls and all."""
    fitted = [max(dot(costs, row), 1e-9) for row in rows]
    seen_s = sum(w * min(s, MAX_STALL * f) for w, s, f in zip(weights, seconds, fitted, strict=True))
    factor = seen_s / sum(map(mul, weights, fitted))
    return costs[0] * factor, costs[1] * factor, costs[2] * factor, costs[3] * factor


def _least_squares(rows: Sequence[Row], seconds: Sequence[float], weights: Sequence[float]) -> Costs:
    """By coordinate descent on the normal equations, each cost kept at 0 or above."""
    gram = [[0.0] * 4 for _ in range(4)]
    right = [0.0] * 4
    for i in range(4):
        weighted = [weight * row[i] for weight, row in zip(weights, rows, strict=True)]
        right[i] = sum(map(mul, weighted, seconds))
        for j in range(i, 4):
            gram[i][j] = gram[j][i] = sum(map(mul, weighted, [row[j] for row in rows]))
    costs = [0.0] * 4
    for _ in range(NUM_SWEEPS):
        for i in range(4):
            if gram[i][i] > 0:
                rest = right[i] - sum(gram[i][j] * costs[j] for j in range(4) if j != i)
                costs[i] = max(0.0, rest / gram[i][i])
    return costs[0], costs[1], costs[2], costs[3]


def dot(costs: Costs, row: Sequence[float]) -> float:
    return sum(cost * value for cost, value in zip(costs, row, strict=True))
