"""The cost model's coefficients from measured runs: what a run takes as a function of them, and the fit.

A step's seconds are a sum over its operations, each the slower of what it computes and what it moves. Both are taken
once from the cost model itself, on hardware where the other one costs nothing; from there a fit is arithmetic on
arrays. Predictions are the cost model's own (`predict`), not these.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from benchmarks.silicon import CHUNK_TOKENS, Row
from serve_app.plan.estimate import Cost, estimate
from serve_app.plan.ops import Step
from serve_app.plan.solve import Unknown, solve
from serve_app.plan.system import Efficiency, System

Array = npt.NDArray[np.float64]
Coefficients = dict[str, float]

FIRST_WAVE = 0.1  # of an InferenceX run's requests come at once: ten times as many are sent as run at a time
MAX_OPS = 10  # of a step, attention's two beside
ATTENTION = ("prompt attention", "decode attention")
MODEL_WORTH = 5.0  # independent measurements, that a model's rows count as in the mean: they share its error
FREE = 1e15  # a rate at which nothing costs anything


@dataclass(frozen=True)
class Prior:
    """Of a coefficient: a first guess, and how far off it may be (standard deviation of the logarithm)."""

    value: float
    spread: float
    most: float = math.inf


# Fields of `Efficiency`, but that attention's products count in shares of the 16-bit peak, as whose they are computed;
# and two of the servers around the engines: microseconds until a request is in the engine, and steps that pass before
# its first token has left it.
PRIORS = {
    "mfu": Prior(0.5, 0.4, 1.0),
    "bandwidth": Prior(0.7, 0.3, 1.0),
    "attention_mfu": Prior(0.5, 0.3, 1.0),
    "attention_bandwidth": Prior(0.6, 0.4, 1.0),
    "link": Prior(0.6, 0.5, 1.0),
    "collective_us": Prior(10.0, 0.7),
    "layer_us": Prior(10.0, 1.0),
    "step_us": Prior(500.0, 1.0),
    "row_us": Prior(5.0, 1.0),
    "request_us": Prior(15_000.0, 1.0),
    "first_steps": Prior(1.0, 1.0),
}
OF_SERVER = ("request_us", "first_steps")
BY_GENERATION = ("mfu", "bandwidth", "layer_us")  # in which Blackwell may differ from Hopper
GENERATION = Prior(1.0, 0.3)
UNKNOWNS = [*PRIORS, *(f"{name} of Blackwell" for name in BY_GENERATION)]


@dataclass(frozen=True)
class Steps:
    """One step of each row, at coefficients of one: seconds of its operations.

    `work`: (row, operation, computing or moving), `attention`: the same of attention's two, `linear`: (row; seconds on
    links, exchanges, layers, steps, sampled rows).
    """

    work: Array
    attention: Array
    linear: Array

    def seconds(self, at: dict[str, Array]) -> Array:
        """`at`: coefficients, each with a value for every row."""
        fixed = np.stack([at[name] for name in ("collective_us", "layer_us", "step_us", "row_us")], axis=1) * 1e-6
        linear = self.linear[:, 0] / at["link"] + (self.linear[:, 1:] * fixed).sum(axis=1)
        work = _slower(self.work, at["mfu"], at["bandwidth"])
        total: Array = work + _slower(self.attention, at["attention_mfu"], at["attention_bandwidth"]) + linear
        return total


def _slower(part: Array, mfu: Array, bandwidth: Array) -> Array:
    total: Array = np.maximum(part[..., 0] / mfu[:, None], part[..., 1] / bandwidth[:, None]).sum(axis=1)
    return total


class Runs:
    """Measured runs as functions of the coefficients. Their occupancy is as measured, so that nothing is solved for."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.answers = np.array([answers_at_a_time(row) for row in rows])
        self.osl = np.array([row.workload.osl.mean for row in rows])
        self.chunks = np.array([float(len(_chunks(row))) for row in rows])
        self.at_once = np.array([_prompts_of_full_step(row) for row in rows])
        self.per_replica = np.array([row.concurrency / row.dp for row in rows])
        self.first_wave = np.array([FIRST_WAVE * row.is_sweep for row in rows])
        self.is_blackwell = np.array([float(row.is_blackwell) for row in rows])
        steps = [self._steps(row, num) for row, num in zip(rows, self.answers, strict=True)]
        probes = [_probes(row) for row in rows]
        self.plain, self.mixed, self.full = (_tabled(probes, [three[i] for three in steps], rows) for i in range(3))

    @staticmethod
    def _steps(row: Row, answers: float) -> tuple[Step, Step, Step]:
        """With answers only, with prompts beside, and full of prompts."""
        work = row.workload
        plain = Step.decode(max(1.0, answers), work.mean_tokens)
        prompt = reduce(Step.__add__, _chunks(row))
        share = max(answers / work.osl.mean, 1 / len(_chunks(row)))
        return plain, plain + prompt.times(share), prompt.times(_prompts_of_full_step(row))

    def predict(self, values: Sequence[float]) -> tuple[Array, Array]:
        """Seconds until the first token and per further one, from logarithms of UNKNOWNS."""
        at = self._at(values)
        prompts = self.answers / self.osl  # that begin in each step
        mixed_share = np.minimum(1.0, prompts * self.chunks)
        mixed_s, service_s = self.mixed.seconds(at), self.full.seconds(at) / self.at_once
        step_s = (1 - mixed_share) * self.plain.seconds(at) + mixed_share * mixed_s
        busy = np.minimum(0.99, prompts / step_s * service_s)
        queue_s = np.minimum(busy / (1 - busy) / 2, self.per_replica) * service_s
        steady_s = queue_s + step_s / 2 + self.chunks * mixed_s
        wave_s = (self.per_replica + 1) / 2 * service_s
        ttft_s = (1 - self.first_wave) * steady_s + self.first_wave * wave_s
        return ttft_s + at["request_us"] * 1e-6 + at["first_steps"] * step_s, step_s

    def _at(self, values: Sequence[float]) -> dict[str, Array]:
        logs = dict(zip(UNKNOWNS, values, strict=True))
        more = {name: self.is_blackwell * logs[f"{name} of Blackwell"] for name in BY_GENERATION}
        return {
            name: np.minimum(prior.most, np.exp(logs[name] + more.get(name, np.zeros(len(self.rows)))))
            for name, prior in PRIORS.items()
        }


def answers_at_a_time(row: Row) -> float:
    """Of one replica, by what was measured: a sequence answers all the time that it does not wait for its first."""
    answering_s = (row.workload.osl.mean - 1) * row.tpot_s
    return row.concurrency / row.dp * answering_s / (row.ttft_s + answering_s)


def _chunks(row: Row) -> list[Step]:
    isl = row.workload.isl.mean
    num = math.ceil(isl / CHUNK_TOKENS)
    return [Step.prompt(isl / num, i * isl / num, sampled=float(i == num - 1)) for i in range(num)]


def _prompts_of_full_step(row: Row) -> float:
    return CHUNK_TOKENS / row.workload.isl.mean


# -- operations of a step -------------------------------------------------------------------------------------------

Probes = tuple[Cost, Cost, Cost, Cost]


def _probes(row: Row) -> Probes:
    """Where only computing costs; only memory; all; and all with a microsecond for each exchange."""
    plain = Efficiency(mfu=1, bandwidth=1, link=1, collective_us=0)
    system = row.hardware.model_copy(update={"efficiency": plain})
    with_exchange = plain.model_copy(update={"collective_us": 1.0})
    return (
        cost_of(row, system.model_copy(update={"memory_gb_s": FREE})),
        cost_of(row, system.model_copy(update={"peak_tflops": dict.fromkeys(system.peak_tflops, FREE)})),
        cost_of(row, system),
        cost_of(row, system.model_copy(update={"efficiency": with_exchange})),
    )


def _tabled(probes: Sequence[Probes], steps: Sequence[Step], rows: Sequence[Row]) -> Steps:
    parts = [_parts(*each) for each in zip(probes, steps, rows, strict=True)]
    work, attention, linear = (np.array(list(part)) for part in zip(*parts, strict=True))
    return Steps(work, attention, linear)


def _parts(probes: Probes, step: Step, row: Row) -> tuple[list[list[float]], list[list[float]], list[float]]:
    compute, memory, plain, exchange = ({op.name: op for op in cost.breakdown(step)} for cost in probes)
    work: list[list[float]] = []
    attention: list[list[float]] = []
    link_s = num_exchanges = 0.0
    for name, op in plain.items():
        if op.bound == "link":
            link_s += op.seconds
            num_exchanges += (exchange[name].seconds - op.seconds) * 1e6
        else:
            pairs, factor = (attention, sixteen_bits(row)) if name in ATTENTION else (work, 1.0)
            pairs.append([compute[name].seconds / factor, memory[name].seconds])
    linear = [link_s, num_exchanges, float(row.spec.num_layers), 1.0, step.sampled]
    return _padded(work, MAX_OPS), _padded(attention, len(ATTENTION)), linear


def _padded(pairs: list[list[float]], num: int) -> list[list[float]]:
    assert len(pairs) <= num, "more operations than there is room for"
    return pairs + [[0.0, 0.0]] * (num - len(pairs))


def sixteen_bits(row: Row) -> float:
    """The peak in 16 bits over that of the dtype which the model is computed in."""
    return row.hardware.peak_flops("bf16") / row.hardware.peak_flops(row.precision.compute)


def cost_of(row: Row, system: System) -> Cost:
    return Cost(row.spec, row.precision, system, row.deployment, by_all_reduce=True)


# -- fit ------------------------------------------------------------------------------------------------------------


def fit(rows: Sequence[Row]) -> list[float]:
    """Logarithms of UNKNOWNS. ValueError for no rows."""
    if not rows:
        raise ValueError("there is nothing to fit to.")
    runs = Runs(rows)
    measured = [math.log(row.ttft_s) for row in rows] + [math.log(row.tpot_s) for row in rows]
    weight = MODEL_WORTH * len({row.model for row in rows}) / len(rows)
    priors = [*PRIORS.values(), *(GENERATION for _ in BY_GENERATION)]
    unknowns = [Unknown(math.log(prior.value), prior.spread, high=math.log(prior.most)) for prior in priors]

    def predict(values: Sequence[float]) -> list[float]:
        found: list[float] = np.log(np.concatenate(runs.predict(values))).tolist()
        return found

    return solve(unknowns, predict, measured, [weight] * len(measured)).values


def balanced(rows: Sequence[Row], num: int, seed: int) -> list[Row]:
    """About so many rows, of each model alike, as far as it has them. Those that waited for room longer than they
    answered are not among them: they tell of memory, not of steps."""
    by_model: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.ttft_s < row.osl * row.tpot_s:
            by_model[row.model].append(row)
    rng = random.Random(seed)
    each = max(1, num // max(1, len(by_model)))
    return [row for model in sorted(by_model) for row in rng.sample(by_model[model], min(each, len(by_model[model])))]


@dataclass(frozen=True)
class Fold:
    """Rows of one model on one backend, and what may be fitted to, to predict them: other models' rows."""

    backend: str
    model: str
    own: list[Row]
    same_engine: list[Row]
    other_engines: list[Row]


def folds(rows: Sequence[Row]) -> Iterator[Fold]:
    for backend in sorted({row.backend for row in rows}):
        for model in sorted({row.model for row in rows if row.backend == backend}):
            own = [row for row in rows if row.backend == backend and row.model == model]
            others = [row for row in rows if row.model != model]
            same = [row for row in others if row.backend == backend]
            yield Fold(backend, model, own, same, [row for row in others if row.backend != backend])


# -- prediction -----------------------------------------------------------------------------------------------------


def coefficients_of(values: Sequence[float], is_blackwell: bool = False) -> Coefficients:
    logs = dict(zip(UNKNOWNS, values, strict=True))
    if is_blackwell:
        logs |= {name: logs[name] + logs[f"{name} of Blackwell"] for name in BY_GENERATION}
    return {name: min(prior.most, math.exp(logs[name])) for name, prior in PRIORS.items()}


@dataclass(frozen=True)
class Prediction:
    ttft_s: float
    tpot_s: float
    fits: bool = True
    is_overloaded: bool = False


def engine_of(row: Row, found: Coefficients) -> Efficiency:
    engine = {name: value for name, value in found.items() if name not in OF_SERVER}
    engine["attention_mfu"] *= sixteen_bits(row)
    return Efficiency(**engine)


def as_shipped(row: Row) -> Prediction:
    """What the planner says with default coefficients: a steady state, nothing known of the server around it."""
    found = estimate(cost_of(row, row.hardware), row.workload)
    return Prediction(found.ttft_s.value, found.tpot_s.value, found.fits, found.is_overloaded)


def predicted(row: Row, found: Coefficients) -> Prediction:
    """What the planner says with these, in the middle of what the load generator and the server add."""
    cost = cost_of(row, row.hardware.model_copy(update={"efficiency": engine_of(row, found)}))
    said = estimate(cost, row.workload)
    if not said.fits:
        return Prediction(math.inf, math.inf, fits=False, is_overloaded=True)
    tpot_s, first_wave = said.tpot_s.value, FIRST_WAVE * row.is_sweep
    at_a_time = min(row.concurrency, said.max_sequences) / row.dp
    full = _prompts_of_full_step(row)
    wave_s = (at_a_time + 1) / 2 * cost.latency_s(reduce(Step.__add__, _chunks(row)).times(full)) / full
    ttft_s = (1 - first_wave) * said.ttft_s.value + first_wave * wave_s
    ttft_s += found["request_us"] * 1e-6 + found["first_steps"] * tpot_s
    return Prediction(ttft_s, tpot_s, is_overloaded=said.is_overloaded)
