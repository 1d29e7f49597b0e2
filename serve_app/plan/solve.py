"""Few unknowns from many noisy positive measurements, in logarithms: damped least squares (doi 10.1137/0111030).

Residuals count linearly beyond twice the typical one (Huber, doi 10.1214/aoms/1177703732). Every unknown has a prior,
wide enough that whatever the measurements say outweighs it: what they do not say stays where it was, and is seen by its
deviation being that of the prior.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

MAX_ROUNDS = 30  # of steps towards the least sum, and
NUM_LEVELS = 3  # of finding out how much the measurements scatter
FIRST_SCATTER, LEAST_SCATTER = 0.1, 0.005  # logarithms: shares of a measurement
ENOUGH = 1e-5  # share of the sum that a step must gain to be followed by another
HUBER = 2.0
Z90 = 1.6449  # standard deviations that nine of ten normal values are within

Vector = list[float]
Matrix = list[Vector]
Predict = Callable[[Sequence[float]], Vector]  # logarithms of what is measured


@dataclass(frozen=True)
class Unknown:
    """Bounds and prior are in the scale that is searched in."""

    start: float
    spread: float  # standard deviation of the prior, whose mean is `start`
    low: float = -math.inf
    high: float = math.inf
    nudge: float = 1e-3  # for the derivative


@dataclass(frozen=True)
class Solution:
    values: Vector
    deviations: Vector  # standard, of the values
    scatter: float  # typical residual
    residuals: Vector  # measured minus predicted, logarithms
    left_out: Vector  # the same, of a fit without the measurement


def solve(
    unknowns: Sequence[Unknown],
    predict: Predict,
    measured: Sequence[float],
    weights: Sequence[float],
    holds: Sequence[tuple[int, float]] = (),
) -> Solution:
    """`measured`: logarithms, `weights` their number of repeats or worth. Needs at least one measurement.

    `holds`: (unknown, value) to hold it at until the others have come to rest; the best end counts. Where a prediction
    is the larger of two, what the smaller depends on has no slope to follow.
    """
    problem = _Problem(unknowns, predict, measured, weights)
    scatter = FIRST_SCATTER
    ends = [problem.descend([u.start for u in unknowns], scatter)]
    ends += [problem.descend(problem.holding(*hold).descend(list(ends[0]), scatter), scatter) for hold in holds]
    values = min(ends, key=lambda end: problem.loss(end, problem.residuals(end), scatter))
    for _ in range(NUM_LEVELS):
        values = problem.descend(values, scatter)
        scatter = problem.scatter(problem.residuals(values))
    return problem.solution(values, scatter)


@dataclass(frozen=True)
class _Problem:
    unknowns: Sequence[Unknown]
    predict: Predict
    measured: Sequence[float]
    weights: Sequence[float]

    def holding(self, index: int, value: float) -> "_Problem":
        held = replace(self.unknowns[index], low=value, high=value)
        return replace(self, unknowns=[*self.unknowns[:index], held, *self.unknowns[index + 1 :]])

    def residuals(self, values: Vector) -> Vector:
        return [m - p for m, p in zip(self.measured, self.predict(values), strict=True)]

    def scatter(self, residuals: Vector) -> float:
        """As wide as the middle of the residuals says, had they been normal; more where there are few."""
        typical = sorted(map(abs, residuals))[len(residuals) // 2] / 0.6745
        freedom = max(1, len(residuals) - len(self.unknowns))
        return max(LEAST_SCATTER, typical * math.sqrt(len(residuals) / freedom))

    def loss(self, values: Vector, residuals: Vector, scatter: float) -> float:
        fit = sum(w * _huber(r / scatter) for w, r in zip(self.weights, residuals, strict=True))
        return fit + sum(((v - u.start) / u.spread) ** 2 for v, u in zip(values, self.unknowns, strict=True))

    def descend(self, values: Vector, scatter: float) -> Vector:
        """To the least loss near `values`, within the bounds."""
        values = [min(u.high, max(u.low, value)) for u, value in zip(self.unknowns, values, strict=True)]
        residuals, damping = self.residuals(values), 1e-3
        loss = self.loss(values, residuals, scatter)
        for _ in range(MAX_ROUNDS):
            matrix, gradient = self._normal(values, residuals, scatter)
            before = loss
            while damping < 1e6:
                moved = self._moved(values, matrix, gradient, damping)
                tried = self.residuals(moved)
                if (found := self.loss(moved, tried, scatter)) < loss:
                    values, residuals, loss, damping = moved, tried, found, damping / 5
                    break
                damping *= 4
            if before - loss < ENOUGH * before:
                break
        return values

    def solution(self, values: Vector, scatter: float) -> Solution:
        residuals = self.residuals(values)
        jacobian = self._jacobian(values)
        covariance = inverse(self._normal(values, residuals, scatter, jacobian)[0])
        left_out = []
        for row, residual, weight in zip(jacobian, residuals, self._tamed(residuals, scatter), strict=True):
            pull = weight * sum(a * _dot(line, row) for a, line in zip(row, covariance, strict=True))
            left_out.append(residual / max(0.1, 1.0 - pull))
        deviations = [math.sqrt(max(0.0, covariance[i][i])) for i in range(len(values))]
        return Solution(values, deviations, scatter, residuals, left_out)

    def _tamed(self, residuals: Vector, scatter: float) -> Vector:
        """Weights of squares that stand for the loss."""
        return [
            w * min(1.0, HUBER * scatter / max(abs(r), 1e-12)) / scatter**2
            for w, r in zip(self.weights, residuals, strict=True)
        ]

    def _jacobian(self, values: Vector) -> Matrix:
        """Of the predictions: a row for each measurement."""
        base = self.predict(values)
        columns = []
        for i, unknown in enumerate(self.unknowns):
            step = unknown.nudge if values[i] + unknown.nudge <= unknown.high else -unknown.nudge
            moved = self.predict([*values[:i], values[i] + step, *values[i + 1 :]])
            columns.append([(m - b) / step for m, b in zip(moved, base, strict=True)])
        return [list(row) for row in zip(*columns, strict=True)]

    def _normal(
        self, values: Vector, residuals: Vector, scatter: float, jacobian: Matrix | None = None
    ) -> tuple[Matrix, Vector]:
        """The normal equations: curvature and downhill direction of half the loss."""
        rows, weights = jacobian or self._jacobian(values), self._tamed(residuals, scatter)
        num = len(values)
        matrix = [[0.0] * num for _ in range(num)]
        downhill = [(u.start - v) / u.spread**2 for v, u in zip(values, self.unknowns, strict=True)]
        for row, residual, weight in zip(rows, residuals, weights, strict=True):
            for i in range(num):
                if row[i]:
                    scaled = weight * row[i]
                    downhill[i] += scaled * residual
                    for j in range(num):
                        matrix[i][j] += scaled * row[j]
        for i, unknown in enumerate(self.unknowns):
            matrix[i][i] += 1.0 / unknown.spread**2
        return matrix, downhill

    def _moved(self, values: Vector, matrix: Matrix, downhill: Vector, damping: float) -> Vector:
        """A step, along the bounds where there are some in its way."""
        free = [
            i
            for i, (v, u) in enumerate(zip(values, self.unknowns, strict=True))
            if not (v <= u.low and downhill[i] < 0) and not (v >= u.high and downhill[i] > 0)
        ]
        part = [[matrix[i][j] * (1.0 + damping * (i == j)) for j in free] for i in free]
        step = [_dot(row, [downhill[i] for i in free]) for row in inverse(part)]
        moved = list(values)
        for i, by in zip(free, step, strict=True):
            moved[i] = min(self.unknowns[i].high, max(self.unknowns[i].low, values[i] + by))
        return moved


def inverse(matrix: Matrix) -> Matrix:
    """Of a symmetric positive definite one, by elimination with pivots."""
    num = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(num))] for i, row in enumerate(matrix)]
    for i in range(num):
        pivot = max(range(i, num), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        assert rows[i][i], "no prior is infinitely wide"
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for k in range(num):
            if k != i and (factor := rows[k][i]):
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [row[num:] for row in rows]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _huber(error: float) -> float:
    size = abs(error)
    return size**2 if size <= HUBER else HUBER * (2 * size - HUBER)


def widening(num_samples: int) -> float:
    """How much wider than that of normal values an interval of 90 % must be, if it is drawn from so few samples.

    Student's t over the normal's quantile, for one more value (Cornish and Fisher's expansion, doi 10.2307/1400905).
    """
    freedom = max(1, num_samples - 1)
    z = Z90
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * math.sqrt(1 + 1 / max(1, num_samples))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest of sorted values."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
