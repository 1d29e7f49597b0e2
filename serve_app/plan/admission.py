"""How many prompt tokens may wait so that the last of them still has its first token in time: for the door's limits.

A queue that is never empty fills the steps: each carries prompts beside the answers that run, as long as there are
places for more sequences. The door judges each request by its own prediction; these limits are the walls around it, and
what a cell falls back on that has observed nothing yet.
"""

import math
from dataclasses import astuple, dataclass, replace

from serve_app.config import SloConfig
from serve_app.plan.bounds import Bounds
from serve_app.plan.estimate import Cost
from serve_app.plan.ops import Step
from serve_app.plan.room import room
from serve_app.plan.workload import Workload

LATE_SHARE = 0.99  # of prompts: the last that waits is taken to be no longer than these


@dataclass(frozen=True)
class Full:
    """One replica with a queue that is never empty."""

    rows: float  # of answers, in each step
    prompt_tokens: float  # of a step, in the mean; those found in the cache are not among them
    rate: float  # prompts/s that leave the queue
    own_s: float  # from the first step of a long prompt to its first token, beside all that


def full(cost: Cost, workload: Workload, max_running: int) -> Full:
    """The steady state with as many answers beside as there are places, or as full steps of prompts can feed."""
    isl, osl, cached = workload.isl, workload.osl.mean, workload.prefix_share
    todo = isl.mean * (1 - cached)
    num_chunks = math.ceil(todo / workload.chunk_tokens)
    rows = min(max_running / cost.deployment.pp, workload.chunk_tokens / todo * osl)
    a_step = rows / osl  # prompts
    beside = Step.decode(max(1.0, rows), workload.mean_tokens)
    prompts = _prompts(workload, todo, num_chunks, max(1.0, a_step * num_chunks))
    carrying = min(1.0, a_step * num_chunks)  # share of the steps
    step_s = carrying * cost.interval_s(prompts + beside) + (1 - carrying) * cost.interval_s(beside)
    late = isl.quantile(LATE_SHARE)
    own_s = cost.prompt_s(late, workload.chunk_tokens, beside, late * cached)
    return Full(rows, a_step * todo, a_step / step_s, own_s)


def _prompts(workload: Workload, todo: float, num_chunks: int, num: float) -> Step:
    """So many chunks of the mean prompt, in one step."""
    size = todo / num_chunks
    start = workload.isl.mean * workload.prefix_share + (todo - size) / 2
    chunk = Step.prompt(size, start, sampled=1 / num_chunks)
    return Step(*(num * amount for amount in astuple(chunk)))


def budgets(cost: Cost, workload: Workload, objective_ttft_s: float) -> dict[int, int]:
    """Replicas of a cell that serve -> prompt tokens that may wait in it, so that the last is in time.

    What is aimed at is a share of the objective, as the door aims (`slo.target_s`). The tokens are whole prompts', the
    cached ones among them. 0 where a long prompt alone takes longer. PlanError where not a single sequence fits.

    A lost replica takes its rows along, and of the experts' workers no greater share: the others are as fast as before.
    """
    aim_s = SloConfig(ttft_s=objective_ttft_s).aim_s
    at_full = full(cost, workload, room(cost, workload).max_running)
    tokens = max(0.0, aim_s - at_full.own_s) * at_full.rate * workload.isl.mean
    return {
        num: math.floor(min(num * tokens, bound_tokens(cost, workload, objective_ttft_s, num)))
        for num in range(1, cost.deployment.dp + 1)
    }


def bound_tokens(cost: Cost, workload: Workload, objective_ttft_s: float, num_replicas: int) -> float:
    """What the hardware allows `num_replicas` of a cell at most, with nothing but prompts (`Bounds.queued_tokens`)."""
    cell = replace(cost.deployment, cells=1)
    bounds = Bounds(cost.spec, cost.precision, cost.system, cell)
    todo = workload.isl.mean * (1 - workload.prefix_share)
    num_prompts = max(cell.dp, round((workload.concurrency or 64 * cell.num_replicas) / cost.deployment.cells))
    return bounds.queued_tokens(objective_ttft_s, num_prompts, todo, num_replicas) / (1 - workload.prefix_share)
