"""One cost model for the planner and for the door: what is served tells how well the prediction holds, and mends it.

The admission predictor of the engine (`engine.pace`) is linear in a step's work and learns by itself. Here its observed
steps refit the coefficients that the planner has, and the planner's model gives the four costs that the predictor would
begin with.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.engine import pace
from serve_app.engine.pace import Costs, Observed, Work
from serve_app.plan.estimate import Cost
from serve_app.plan.fit import Case, Fitted, Observation, fit
from serve_app.plan.ops import Step
from serve_app.plan.solve import quantile
from serve_app.plan.system import System

SERVING_TRUST = 0.2  # how far serving may move a coefficient, as a share of what a calibration may
MIN_JUDGED = 16  # observed steps, before a verdict
MUST_HOLD = 0.8  # share of them inside the interval
MAX_REFIT = 120  # observations, evenly from all
STALL = 8.0  # times what was predicted: that step waited for something else

Verdict = Literal["holds", "slower", "faster", "scattered", "too few"]


def step_of(work: Work) -> Step:
    """The cost model's step for the engine's: every token of it is taken to attend to as many others, and every prompt
    in it to end there."""
    rows = work.prompt_tokens + work.decode_rows
    if not rows:
        return Step()
    attended = work.attended_kpairs * 1e3 / rows
    prompt_kv = attended + work.prompt_tokens / 2 if work.prompt_tokens else 0.0
    sampled = work.decode_rows + (1.0 if work.prompt_tokens else 0.0)
    return Step(
        work.prompt_tokens,
        work.prompt_tokens * attended,
        prompt_kv,
        work.decode_rows,
        work.decode_rows * attended,
        sampled,
    )


def work_of_step(step: Step) -> Work:
    return Work(step.prompt_tokens, step.decode_rows, (step.pairs + step.decode_kv) / 1e3)


def refit(system: System, case: Case, observed: Sequence[Observed]) -> Fitted:
    """The coefficients moved as far as the steps of a running cell say, intervals from those steps.

    What they do not tell stays. ValueError without a step that took time.
    """
    useful = [o for o in observed if o.seconds > 0 and o.work.prompt_tokens + o.work.decode_rows > 0]
    every = max(1, -(-len(useful) // MAX_REFIT))
    return fit(system, [Observation(case, step_of(o.work), o.seconds) for o in useful[::every]], trust=SERVING_TRUST)


@dataclass(frozen=True)
class Drift:
    """Observed over predicted, of steps."""

    num: int
    ratio: float  # the middle one
    low: float  # nine of ten lie between
    high: float
    share_inside: float  # of the system's interval
    verdict: Verdict

    @property
    def holds(self) -> bool:
        return self.verdict == "holds"


def drift(system: System, case: Case, observed: Sequence[Observed]) -> Drift:
    """Whether the steps of a running cell take what the system says. Stalls are left out: they are no step's cost."""
    cost = case.cost(system)
    ratios, num_inside = [], 0
    for o in observed:
        predicted_s = cost.interval_s(step_of(o.work)) if o.work.prompt_tokens + o.work.decode_rows else 0.0
        if predicted_s <= 0 or not 0 < o.seconds <= STALL * predicted_s:
            continue
        interval = system.ttft_interval if o.work.prompt_tokens else system.tpot_interval
        ratios.append(o.seconds / predicted_s)
        num_inside += interval.low <= ratios[-1] <= interval.high
    if len(ratios) < MIN_JUDGED:
        return Drift(len(ratios), 1.0, 0.0, math.inf, 0.0, "too few")
    ratios.sort()
    middle, share = quantile(ratios, 0.5), num_inside / len(ratios)
    return Drift(
        len(ratios), middle, quantile(ratios, 0.05), quantile(ratios, 0.95), share, _verdict(system, middle, share)
    )


def _verdict(system: System, middle: float, share_inside: float) -> Verdict:
    if share_inside >= MUST_HOLD:
        return "holds"
    low = max(system.ttft_interval.low, system.tpot_interval.low)
    high = min(system.ttft_interval.high, system.tpot_interval.high)
    return "slower" if middle > high else "faster" if middle < low else "scattered"


def pace_costs(cost: Cost, *, max_step_tokens: int = 512, max_context: int = 4096, max_rows: int = 64) -> Costs:
    """The cost model as the engine's pace has it: seconds of a step, a prompt token, a decoding row, a thousand pairs.

    Of steps from one row to a full one. What curves (experts touched, rooflines) is cut by the best straight line.
    """
    observed = [
        Observed(work_of_step(step), cost.interval_s(step)) for step in _grid(max_step_tokens, max_context, max_rows)
    ]
    return pace.fit(observed, [1.0] * len(observed))


def _grid(max_step_tokens: int, max_context: int, max_rows: int) -> Iterator[Step]:
    contexts = [max_context / 64, max_context / 8, max_context / 2]
    for rows in _doubling(1, max_rows):
        for context in contexts:
            yield Step.decode(rows, context)
            yield Step.decode(rows, context) + Step.prompt(max(1.0, max_step_tokens - rows), context)
    for tokens in _doubling(min(32, max_step_tokens), max_step_tokens):
        for start in (0.0, *contexts):
            yield Step.prompt(tokens, start, sampled=1)


def _doubling(least: int, most: int) -> Iterator[int]:
    while least < most:
        yield least
        least *= 4
    yield most
