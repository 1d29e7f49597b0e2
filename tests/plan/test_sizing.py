"""The fewest GPUs that carry a load: enough, and with a cell less too few."""

from dataclasses import replace

import pytest

from serve_app.errors import PlanError
from serve_app.plan.estimate import estimate
from serve_app.plan.loss import losses
from serve_app.plan.search import Candidate
from serve_app.plan.sizing import least_gpus
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import FP16, R10B_TOP2, REFERENCE

LOADS = {
    "a rate": Workload(
        Lengths.fixed(2048), Lengths.fixed(128), None, rate=60.0, objective=Objective(ttft_s=1.0, tpot_ms=20)
    ),
    "sequences": Workload(Lengths.fixed(2048), Lengths.fixed(128), 500, objective=Objective(ttft_s=1.0, tpot_ms=20)),
    "no objective": Workload(Lengths.fixed(10_240), Lengths.fixed(128), 1000),
}


def keeps(candidate: Candidate, workload: Workload, cells: int) -> bool:
    cost = replace(candidate.cost, deployment=replace(candidate.deployment, cells=cells))
    found, objective = estimate(cost, workload), workload.objective
    if found.is_overloaded:
        return False
    is_soon = objective.ttft_s is None or found.ttft_p99_s.value <= objective.ttft_s * 1.0002
    return is_soon and (objective.tpot_ms is None or found.tpot_s.value * 1e3 <= objective.tpot_ms * 1.0002)


@pytest.mark.parametrize("workload", LOADS.values(), ids=LOADS.keys())
def test_as_many_carry_it_as_are_said_and_clearly_fewer_do_not(workload: Workload) -> None:
    ranked = least_gpus(R10B_TOP2, FP16, REFERENCE, workload).candidates
    numbers = [one.deployment.num_gpus for one in ranked]
    assert numbers == sorted(numbers)
    for one in ranked[:10]:
        assert keeps(one, workload, one.deployment.cells)
        assert not one.misses
        if one.deployment.cells > 1 and workload.rate is not None:
            assert not keeps(one, workload, one.deployment.cells - 1)


def test_more_load_never_takes_fewer() -> None:
    loads = [replace(LOADS["a rate"], rate=rate) for rate in (5.0, 20.0, 80.0, 320.0)]
    fewest = [least_gpus(R10B_TOP2, FP16, REFERENCE, load).candidates[0].deployment.num_gpus for load in loads]
    assert fewest == sorted(fewest)
    assert fewest[0] < fewest[-1]


def test_to_carry_it_after_a_loss_too_takes_more() -> None:
    workload = LOADS["a rate"]
    healthy = least_gpus(R10B_TOP2, FP16, REFERENCE, workload).candidates[0]
    worst = least_gpus(R10B_TOP2, FP16, REFERENCE, workload, rank="worst").candidates[0]
    assert worst.deployment.num_gpus > healthy.deployment.num_gpus
    assert workload.rate is not None
    assert losses(worst.cost, workload, worst.estimate).worst_capacity >= workload.rate * (1 - 1e-6)


def test_what_not_even_the_limit_carries_is_said_with_the_nearest() -> None:
    workload = replace(LOADS["a rate"], rate=1e6)
    with pytest.raises(PlanError, match=r"up to 64 GPUs do not carry this load\. No layout keeps the objective under"):
        least_gpus(R10B_TOP2, FP16, REFERENCE, workload, limit=64)
