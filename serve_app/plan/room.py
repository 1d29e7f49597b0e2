"""How many sequences one replica is to run at a time (`max_running`), and how many tokens of KV it has for them.

As many as the objective's capacity needs, and as many as a replica has to take over when another one is lost; not more
than fit.
"""

import math
from dataclasses import dataclass

from serve_app.errors import PlanError
from serve_app.plan.estimate import Cost, Replica
from serve_app.plan.footprint import Footprint, footprint, kv_gpu_token_bytes, max_kv_tokens
from serve_app.plan.workload import Workload

SPREAD = 4.0  # standard deviations of a Poisson number of sequences, above its mean


@dataclass(frozen=True)
class Room:
    """On one replica."""

    max_running: int
    kv_tokens: int


def room(cost: Cost, workload: Workload) -> Room:
    """PlanError where not a single sequence fits."""
    a_step = cost.deployment.pp * workload.chunk_tokens  # each answer is a row of a step
    wanted = _wanted(cost, workload, min(a_step, _fitting(cost, workload, 1.0) // workload.most_tokens))
    kv_tokens = _fitting(cost, workload, wanted / cost.deployment.pp)  # their logits take room as well
    num_fitting = kv_tokens // workload.most_tokens
    if not num_fitting:
        raise PlanError(f"{cost.deployment} holds no sequence of {workload.most_tokens} tokens on {cost.system.name}.")
    return Room(min(wanted, num_fitting), kv_tokens)


def _fitting(cost: Cost, workload: Workload, sampled: float) -> int:
    """Tokens of KV that one replica has room for, where steps sample so many rows."""
    token_bytes = kv_gpu_token_bytes(cost.spec, cost.precision, cost.deployment)
    return max_kv_tokens(cost.system, held(cost, workload, sampled), token_bytes)


def held(cost: Cost, workload: Workload, sampled: float, kv_tokens: float = 0) -> Footprint:
    """What the fullest GPU holds."""
    return footprint(
        cost.spec,
        cost.precision,
        cost.system,
        cost.deployment,
        kv_tokens=kv_tokens,
        chunk_tokens=workload.chunk_tokens,
        sampled=max(1.0, sampled),
    )


def _wanted(cost: Cost, workload: Workload, num_fitting: int) -> int:
    """No objective between tokens is given up for the part of a lost replica: nobody refuses for its sake later."""
    if not num_fitting:
        return 1
    deployment, replica = cost.deployment, Replica(cost, workload)
    ttft_s, tpot_s = workload.objective.ttft_s or math.inf, (workload.objective.tpot_ms or math.inf) / 1e3
    for_capacity = _running(replica, num_fitting, ttft_s, tpot_s) or 1
    most = num_fitting if tpot_s == math.inf else _running(replica, num_fitting, math.inf, tpot_s) or num_fitting
    after_a_loss = math.ceil(_at_a_time(replica, workload, num_fitting) / deployment.cells / max(1, deployment.dp - 1))
    return max(1, min(num_fitting, max(for_capacity, min(most, after_a_loss))))


def _running(replica: Replica, num_fitting: int, ttft_s: float, tpot_s: float) -> int | None:
    """Sequences that answer or are prefilled at the highest load that keeps these; None: none does."""
    best, pp = replica.at_most(num_fitting, ttft_s, tpot_s), replica.cost.deployment.pp
    return None if best is None else math.ceil(best.rows * pp) + pp


def _at_a_time(replica: Replica, workload: Workload, num_fitting: int) -> float:
    """Sequences in all cells."""
    if workload.concurrency is not None:
        return workload.concurrency
    assert workload.rate is not None
    num = replica.cost.deployment.num_replicas
    mean = min(float(num_fitting), replica.held(replica.at_rate(workload.rate / num))) * num
    return mean + SPREAD * math.sqrt(mean)
