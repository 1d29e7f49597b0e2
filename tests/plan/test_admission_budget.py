"""As many prompt tokens may wait as can be computed in time by the replicas that serve, never more than the bound."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.plan.admission import bound_tokens, budgets, full
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, Replica
from serve_app.plan.room import room
from serve_app.plan.system import Efficiency
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import BETTER, FP16, R10B, R10B_TOP2, REFERENCE, SEED

CHAT = Workload(Lengths.fixed(10_240), Lengths.fixed(128))
SEED_COST = Cost(R10B, FP16, REFERENCE, SEED)

layouts = st.builds(
    Deployment,
    tp=st.sampled_from([1, 2, 4]),
    pp=st.integers(1, 4),
    dp=st.integers(1, 4),
    cells=st.integers(1, 3),
    standby=st.integers(0, 2),
)
workloads = st.builds(
    Workload,
    isl=st.sampled_from([Lengths.fixed(64), Lengths.fixed(10_240), Lengths.uniform(128, 10_240)]),
    osl=st.sampled_from([Lengths.fixed(1), Lengths.fixed(128), Lengths.uniform(8, 1_024)]),
    prefix_share=st.sampled_from([0.0, 0.5]),
    chunk_tokens=st.sampled_from([512, 8_192]),
)


def test_the_bound_is_the_one_that_the_reading_has():
    """READING.md, A3 and row 20: 25 M tokens within 10 s, half of it with one replica; top-2 17.4 M and 8.7 M."""
    assert bound_tokens(SEED_COST, CHAT, 10.0, 2) == pytest.approx(24.9e6, rel=0.01)
    assert bound_tokens(SEED_COST, CHAT, 10.0, 1) == pytest.approx(12.45e6, rel=0.01)
    top2 = replace(SEED_COST, spec=R10B_TOP2)
    assert bound_tokens(top2, CHAT, 10.0, 2) == pytest.approx(17.4e6, rel=0.01)
    assert bound_tokens(top2, CHAT, 10.0, 1) == pytest.approx(8.7e6, rel=0.01)


@settings(deadline=None, max_examples=40)
@given(layouts, workloads, st.sampled_from([R10B, R10B_TOP2]), st.sampled_from([0.5, 10.0, 60.0]))
def test_budgets_do_not_grow_as_replicas_fall_and_stay_below_the_bound(deployment, workload, spec, ttft_s):
    cost = Cost(spec, FP16, REFERENCE, deployment)
    found = budgets(cost, workload, ttft_s)
    assert list(found) == list(range(1, deployment.dp + 1))
    assert list(found.values()) == sorted(found.values())
    for num, tokens in found.items():
        assert 0 <= tokens <= bound_tokens(cost, workload, ttft_s, num)
        longer = budgets(cost, workload, 2 * ttft_s)[num]
        assert longer >= 2 * tokens


def test_the_last_of_the_budget_has_its_first_token_at_the_target():
    """15 % of the objective are left for what was not foreseen, as at the door."""
    found = budgets(SEED_COST, CHAT, 10.0)
    at_full = full(SEED_COST, CHAT, room(SEED_COST, CHAT).max_running)
    waits_s = found[2] / (2 * at_full.rate * 10_240)
    assert waits_s + at_full.own_s == pytest.approx(8.5, abs=1e-3)


def test_a_cell_has_its_own_budget_however_many_there_are():
    one = budgets(Cost(R10B, FP16, REFERENCE, replace(BETTER, cells=1)), replace(CHAT, concurrency=32), 10.0)
    assert budgets(Cost(R10B, FP16, REFERENCE, BETTER), CHAT, 10.0) == one


def test_answers_that_run_beside_make_the_budget_smaller():
    longer = replace(CHAT, osl=Lengths.fixed(1_024))
    assert budgets(SEED_COST, longer, 10.0)[2] < 0.7 * budgets(SEED_COST, CHAT, 10.0)[2]


def test_prompts_that_hardly_answer_leave_the_queue_at_the_pace_of_full_steps():
    """With neither answers nor links, what is left of the bound is what norms, gates and the target take."""
    cost = replace(SEED_COST, system=REFERENCE.model_copy(update={"efficiency": Efficiency(collective_us=0.0)}))
    prompts = replace(CHAT, osl=Lengths.fixed(1), isl=Lengths.fixed(8_192))
    share = budgets(cost, prompts, 10.0)[2] / bound_tokens(cost, prompts, 10.0, 2)
    assert 0.45 < share < 0.85


def test_cached_prefixes_let_more_wait():
    assert budgets(SEED_COST, replace(CHAT, prefix_share=0.5), 10.0)[2] > 1.2 * budgets(SEED_COST, CHAT, 10.0)[2]


def test_nothing_may_wait_where_a_prompt_alone_takes_longer():
    assert budgets(SEED_COST, CHAT, 0.01) == {1: 0, 2: 0}


@pytest.mark.parametrize(
    "workload", [CHAT, replace(CHAT, concurrency=1_000), replace(CHAT, concurrency=None, rate=60.0)]
)
def test_a_replica_has_room_for_its_part_after_the_loss_of_another(workload):
    found = room(SEED_COST, workload)
    held = workload.concurrency or 2 * Replica(SEED_COST, workload).held(Replica(SEED_COST, workload).at_rate(30.0))
    fitting = found.kv_tokens // workload.most_tokens
    assert found.max_running <= fitting
    assert found.max_running >= min(fitting, held)


def test_an_objective_between_tokens_leaves_room_for_fewer():
    def rows(tpot_ms):
        return room(SEED_COST, replace(CHAT, concurrency=400, objective=Objective(tpot_ms=tpot_ms))).max_running

    assert 1 <= rows(3.0) < rows(10.0) < rows(None)


def test_no_more_run_than_a_step_has_rows():
    small = Workload(Lengths.fixed(16), Lengths.fixed(4), chunk_tokens=64)
    assert room(SEED_COST, small).max_running <= 4 * 64


def test_a_layout_that_holds_no_sequence_is_refused():
    tiny = REFERENCE.model_copy(update={"memory_gb": 5.0})
    with pytest.raises(PlanError, match="holds no sequence of 10368 tokens"):
        budgets(replace(SEED_COST, system=tiny), CHAT, 10.0)
