"""From measured steps to the coefficients of the cost model, and how far it is to be believed.

What is fitted are the relative errors of whole steps, of one or several models and layouts together. A coefficient that
the measurements do not tell apart from what was thought before keeps its value, and is reported as not determined.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from serve_app.model.spec import ModelSpec
from serve_app.plan.compiled import FIXED, Formula, formula
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost
from serve_app.plan.ops import Step
from serve_app.plan.solve import Z90, Solution, Unknown, quantile, solve, widening
from serve_app.plan.system import Efficiency, Interval, System

Kind = Literal["interval", "latency", "alone"]

SHARES = ("mfu", "bandwidth", "attention_mfu", "attention_bandwidth", "link")
MICROSECONDS = FIXED
SHARE_SPREAD = 1.5  # logarithm: a factor of 4.5 either way
LINK_SPREAD = 0.5  # a link is measured by itself; what sending costs beside is in `collective_us`
CONTENTION_SPREAD = 0.5
US_SPREAD = 1e4
LEAST_SHARE = 1e-3
HOLDS = (0.3, 0.1)  # of a share's first value
DETERMINED = 0.5  # of the prior's deviation may be left of one that is
MIN_SAMPLES = 4  # for an interval of its own


@dataclass(frozen=True)
class Case:
    """What was measured on: a model, in a layout."""

    spec: ModelSpec
    precision: Precision
    deployment: Deployment

    def cost(self, system: System) -> Cost:
        return Cost(self.spec, self.precision, system, self.deployment)

    @property
    def num_workers(self) -> int:
        """Of a cell, at work at the same time."""
        return self.deployment.cell_gpus


@dataclass(frozen=True)
class Observation:
    """A step and what it took; or a run of steps, of which only all together are told.

    `interval`: from the end of the step before it to its own. `latency`: from its issue to its end. `alone`: the
    computing only, without what an engine and messages add to a step (`step_us`).
    """

    case: Case
    step: Step
    seconds: float
    kind: Kind = "interval"
    weight: float = 1.0
    others: tuple[Step, ...] = ()  # of the run

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.step, *self.others)

    @property
    def has_prompt(self) -> bool:
        return any(step.prompt_tokens for step in self.steps)

    def predicted_s(self, cost: Cost) -> float:
        return max(1e-9, sum(self._one_s(cost, step) for step in self.steps))

    def _one_s(self, cost: Cost, step: Step) -> float:
        if self.kind == "interval":
            return cost.interval_s(step)
        less_s = cost.deployment.pp * cost.system.efficiency.step_us / 1e6 if self.kind == "alone" else 0.0
        return cost.latency_s(step) - less_s


@dataclass(frozen=True)
class Coefficient:
    """One number of the cost model. Low and high: between them with 90 %."""

    name: str
    value: float
    low: float
    high: float
    is_determined: bool


@dataclass(frozen=True)
class Fitted:
    """A calibrated system, and how well it tells what was measured."""

    system: System
    coefficients: list[Coefficient]
    ratios: list[float]  # measured over predicted, by observation, each by a fit without it

    @property
    def undetermined(self) -> list[str]:
        return [found.name for found in self.coefficients if not found.is_determined]

    @property
    def typical_error(self) -> float:
        """Half of the observations are off by less, as a share."""
        return quantile(sorted(abs(math.log(ratio)) for ratio in self.ratios), 0.5)


def fit(system: System, observations: Sequence[Observation], *, trust: float = 1.0) -> Fitted:
    """The system with coefficients, contention and intervals as measured. `trust`: in what it has already, as the
    share of the usual spread that it may move by; 1: next to none. ValueError without an observation, or for one that
    took no time.
    """
    if not observations or any(o.seconds <= 0 or o.weight <= 0 for o in observations):
        raise ValueError("a fit needs observations, each with seconds and a weight above 0.")
    names = _names(observations)
    fixed: list[str] = []
    while True:
        search = _Search(system, observations, [name for name in names if name not in fixed], trust)
        solution = search.solve()
        vague = search.vaguest(solution)
        if vague is None:
            break
        fixed.append(vague)
    fitted = search.system_at(solution.values)
    found = search.coefficients(solution) + [_kept(fitted, name) for name in fixed]
    found.sort(key=lambda coefficient: names.index(coefficient.name))
    ratios = [math.exp(residual) for residual in solution.left_out]
    return Fitted(with_intervals(fitted, observations, ratios, len(search.names)), found, ratios)


def with_intervals(
    system: System, observations: Sequence[Observation], ratios: Sequence[float], num_fitted: int = 0
) -> System:
    """Intervals of steps: those that carry prompts tell of the time to first token, the others of that per token."""
    pairs = list(zip(observations, ratios, strict=True))
    prompts = [ratio for o, ratio in pairs if o.has_prompt]
    answers = [ratio for o, ratio in pairs if not o.has_prompt]
    return system.model_copy(
        update={
            "ttft_interval": interval_of(prompts, num_fitted // 2) or system.ttft_interval,
            "tpot_interval": interval_of(answers, num_fitted // 2) or system.tpot_interval,
        }
    )


def interval_of(ratios: Iterable[float], num_fitted: int = 0) -> Interval | None:
    """Where nine of ten of measured over predicted lie: quantiles, further out the fewer there are. None: too few."""
    logs = sorted(math.log(ratio) for ratio in ratios)
    if len(logs) < MIN_SAMPLES:
        return None
    wider = widening(max(2, len(logs) - num_fitted))
    outer = max(0.0, 0.05 * (len(logs) + 1) - 1) / (len(logs) - 1)  # one more value is as likely in each gap
    middle = quantile(logs, 0.5)
    low = middle - (middle - quantile(logs, outer)) * wider
    high = middle + (quantile(logs, 1 - outer) - middle) * wider
    return Interval(low=round(math.exp(low), 4), high=round(math.exp(high), 4))


def _names(observations: Sequence[Observation]) -> list[str]:
    """Of all that may be fitted: contention for each number of workers that was met."""
    numbers = sorted({o.case.num_workers for o in observations} - {1})
    return [*SHARES, *MICROSECONDS, *(f"contention.{number}" for number in numbers)]


def value_of(system: System, name: str) -> float:
    """Of a coefficient by its name here."""
    if name.startswith("contention."):
        return system.slowdown(int(name.removeprefix("contention.")))
    eff = system.efficiency
    found = getattr(eff, name)
    return float({"attention_mfu": eff.mfu, "attention_bandwidth": eff.bandwidth}[name] if found is None else found)


def _kept(system: System, name: str) -> Coefficient:
    value = value_of(system, name)
    return Coefficient(name, value, value, value, is_determined=False)


@dataclass(frozen=True)
class _Formulas:
    """What `Observation.predicted_s` says, for any coefficients."""

    kind: Kind
    steps: list[list[tuple[Formula, int]]]  # of each step, by stage, and how many stages are such

    @staticmethod
    def of(observation: Observation, cost: Cost) -> "_Formulas":
        steps = [[(formula(stage, step), num) for stage, num in cost.kinds] for step in observation.steps]
        return _Formulas(observation.kind, steps)

    def seconds(self, system: System) -> float:
        return max(1e-9, sum(self._one_s(stages, system) for stages in self.steps))

    def _one_s(self, stages: list[tuple[Formula, int]], system: System) -> float:
        if self.kind == "interval":
            return max(formula.seconds(system) for formula, _ in stages)
        less_s = system.efficiency.step_us / 1e6 if self.kind == "alone" else 0.0
        return sum(num * (formula.seconds(system) - less_s) for formula, num in stages)


@dataclass(frozen=True)
class _Search:
    """Shares and contention are searched for in logarithms, microseconds as they are."""

    system: System
    observations: Sequence[Observation]
    names: list[str]
    trust: float

    def solve(self) -> Solution:
        measured = [math.log(o.seconds) for o in self.observations]
        unknowns, weights = [self._unknown(name) for name in self.names], [o.weight for o in self.observations]
        return solve(unknowns, self.predict, measured, weights, list(self._holds()) if self.trust == 1 else ())

    def _holds(self) -> Iterator[tuple[int, float]]:
        """Shares that may bound nothing where they begin, held where they bound what they can."""
        for name in ("attention_bandwidth", "attention_mfu", "bandwidth"):
            if name in self.names:
                for factor in HOLDS:
                    yield self.names.index(name), math.log(factor * value_of(self.system, name))

    def _unknown(self, name: str) -> Unknown:
        value = value_of(self.system, name)
        if name in MICROSECONDS:
            # what is trusted is known to its own size
            spread = US_SPREAD if self.trust == 1 else max(1.0, self.trust * value)
            return Unknown(value, spread, low=0.0, nudge=max(0.1, value / 100))
        if name in SHARES:
            spread = LINK_SPREAD if name == "link" else SHARE_SPREAD
            return Unknown(math.log(value), self.trust * spread, low=math.log(LEAST_SHARE), high=0.0)
        return Unknown(math.log(value), self.trust * CONTENTION_SPREAD)

    @cached_property
    def _formulas(self) -> list["_Formulas"]:
        costs = {id(o.case): o.case.cost(self.system) for o in self.observations}
        return [_Formulas.of(o, costs[id(o.case)]) for o in self.observations]

    def predict(self, values: Sequence[float]) -> list[float]:
        system = self.system_at(values)
        return [math.log(formulas.seconds(system)) for formulas in self._formulas]

    def system_at(self, values: Sequence[float]) -> System:
        efficiency: dict[str, float] = {}
        contention = dict(self.system.contention)
        for name, value in zip(self.names, values, strict=True):
            if name.startswith("contention."):
                contention[int(name.removeprefix("contention."))] = math.exp(value)
            else:
                efficiency[name] = value if name in MICROSECONDS else math.exp(value)
        return self.system.model_copy(
            update={"efficiency": self.system.efficiency.model_copy(update=efficiency), "contention": contention}
        )

    def vaguest(self, solution: Solution) -> str | None:
        """The coefficient that the measurements say least of, if that is too little."""
        left = [
            deviation / self._unknown(name).spread
            for name, deviation in zip(self.names, solution.deviations, strict=True)
        ]
        worst = max(range(len(left)), key=left.__getitem__, default=None)
        limit = DETERMINED if self.trust == 1 else 0.95  # beside a close prior little has to be said
        return None if worst is None or left[worst] <= limit else self.names[worst]

    def coefficients(self, solution: Solution) -> list[Coefficient]:
        found = []
        for name, value, deviation in zip(self.names, solution.values, solution.deviations, strict=True):
            low, high = value - Z90 * deviation, value + Z90 * deviation
            if name in MICROSECONDS:
                found.append(Coefficient(name, value, max(0.0, low), high, is_determined=True))
            else:
                most = 1.0 if name in SHARES else math.inf
                found.append(Coefficient(name, math.exp(value), math.exp(low), min(most, math.exp(high)), True))
        return found


def rounded(system: System) -> System:
    """Coefficients to four digits, as a file shows them; validated."""
    efficiency = {
        name: value if value is None else float(f"{value:.4g}")
        for name, value in system.efficiency.model_dump().items()
    }
    contention = {number: float(f"{factor:.4g}") for number, factor in system.contention.items()}
    return System.model_validate(
        system.model_dump() | {"efficiency": Efficiency(**efficiency).model_dump(), "contention": contention}
    )
