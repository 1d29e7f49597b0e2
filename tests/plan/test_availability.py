"""What share of the time the objective is kept: between none and all, and the right way round."""

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.plan.availability import MONTH_H, availability, empty_seats, num_out, spares_needed
from serve_app.plan.deployment import Deployment
from serve_app.plan.loss import losses
from serve_app.plan.workload import Objective
from tests.plan.cases import SEED
from tests.plan.losing import WORKLOAD, case, deployments, spared

FEW = replace(WORKLOAD, concurrency=6)


def strict(deployment):
    """An objective that is kept with all GPUs, and just not without one."""
    cost, workload, healthy = case(deployment)
    p99_s = (healthy.ttft_p99_s.value, losses(cost, workload, healthy).gpu.degraded.ttft_p99_s.value)
    assert p99_s[0] < p99_s[1]
    return replace(WORKLOAD, objective=Objective(ttft_s=sum(p99_s) / 2))


HARD = replace(WORKLOAD, objective=Objective(ttft_s=0.3))  # some keep it, some only with all GPUs, some never


def of(deployment, workload=WORKLOAD, **recovery):
    cost, workload, healthy = case(deployment, workload=workload, **recovery)
    return availability(losses(cost, workload, healthy), workload, healthy)


def test_the_shares_are_those_of_all_states_counted_one_by_one():
    """Two cells of three GPUs without pauses: each of the 64 states of six GPUs, weighed by its probability."""
    layout, share_out = Deployment(dp=3, cells=2), 10 / 110
    cost, workload, healthy = case(
        layout, workload=FEW, mtbf_h=100, replace_h=10, notice_s=0, form_s=0, respawn_s=0, respawn_serving_s=0
    )
    found = losses(cost, workload, healthy)
    assert all(state.keeps_objective for state in found.states if state.kind != "node")
    expected = math.fsum(
        share_out ** sum(out) * (1 - share_out) ** (6 - sum(out))
        for out in product([0, 1], repeat=6)
        if sum(out) <= 2  # more are not looked at
    )
    available = availability(found, workload, healthy)
    assert available.kept + available.paused == pytest.approx(expected)


def test_a_spare_fills_the_first_empty_seat():
    none, one, two = empty_seats(4, 1, 0.1)
    assert none == pytest.approx(num_out(5, 0.1, 0) + num_out(5, 0.1, 1))
    assert (one, two) == (num_out(5, 0.1, 2), num_out(5, 0.1, 3))
    assert math.fsum(num_out(5, 0.1, num) for num in range(6)) == pytest.approx(1)


def test_a_fleet_fails_as_often_as_it_has_gpus():
    assert of(SEED).failure_h == pytest.approx(50_700 / 32)
    assert of(spared(SEED, 2)).failure_h == pytest.approx(50_700 / 34)


def test_a_lonely_replica_stands_still_until_its_gpu_is_replaced():
    found = of(Deployment(tp=4, pp=4))
    assert found.standing == pytest.approx(16 * 4 / 50_704, rel=0.01)
    assert found.lost_h_month["standing"] == pytest.approx(found.standing * MONTH_H)
    assert found.degraded == 0


def test_a_sibling_that_does_not_keep_the_objective_is_time_that_is_lost():
    easy, hard = of(SEED), of(SEED, strict(SEED))
    assert easy.degraded == 0
    assert hard.degraded == pytest.approx(32 * 4 / 50_704, rel=0.01)
    assert hard.pause_s > easy.pause_s  # until the seat is filled


def test_what_is_not_kept_with_all_gpus_is_never_kept():
    hopeless = replace(WORKLOAD, objective=Objective(ttft_s=1e-3))
    cost, workload, healthy = case(SEED, workload=hopeless)
    found = losses(cost, workload, healthy)
    assert availability(found, workload, healthy).kept == 0
    assert spares_needed(found, workload, healthy, 0.5) is None


def test_spares_are_as_many_as_the_target_takes_and_no_more():
    cost, workload, healthy = case(Deployment(tp=4, pp=4))
    found = losses(cost, workload, healthy)
    for target in (0.9, 0.999, 0.99999):
        num = spares_needed(found, workload, healthy, target)
        assert of(spared(cost.deployment, num)).kept >= target
        assert num == 0 or of(spared(cost.deployment, num - 1)).kept < target
    assert spares_needed(found, workload, healthy, 0.9) == 0
    assert spares_needed(found, workload, healthy, 0.99999) > 0


def test_no_number_of_spares_undoes_the_pauses():
    cost, workload, healthy = case(Deployment(tp=4, pp=4), mtbf_h=1.0, replace_h=0.01)
    assert spares_needed(losses(cost, workload, healthy), workload, healthy, 0.999) is None


@settings(deadline=None, max_examples=25)
@given(deployments(), st.floats(1, 1e6), st.floats(0, 200), st.sampled_from([WORKLOAD, FEW, HARD]))
def test_it_is_a_share_that_rises_with_spares_and_falls_with_failures(deployment, mtbf_h, replace_h, workload):
    found = [of(spared(deployment, spares), workload, mtbf_h=mtbf_h, replace_h=replace_h) for spares in range(3)]
    worse = of(deployment, workload, mtbf_h=mtbf_h / 2, replace_h=replace_h)
    longer = of(deployment, workload, mtbf_h=mtbf_h, replace_h=replace_h + 1)
    for each in (*found, worse, longer):
        shares = (each.kept, each.paused, each.degraded, each.standing)
        assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)
        assert sum(shares) == pytest.approx(1)
    assert found[0].kept <= found[1].kept + 1e-9
    assert found[1].kept <= found[2].kept + 1e-9
    assert worse.kept <= found[0].kept + 1e-9
    assert longer.kept <= found[0].kept + 1e-9
