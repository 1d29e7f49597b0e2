"""What a change of deployment moves: no more than is missing, all that is missing, and who serves meanwhile."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.experts.layout import Seat
from serve_app.plan.counts import count_params, expert_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.elastic import transition
from serve_app.plan.estimate import Cost, estimate
from serve_app.plan.holdings import Holdings, lacking_bytes
from serve_app.plan.seats import gpu_of
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import BETTER, FP16, R10B, R10B_GQA, REFERENCE, SEED

CHAT = Workload(Lengths.fixed(10_240), Lengths.fixed(128), objective=Objective(ttft_s=10.0))
EXPERT_BYTES = 2 * expert_params(R10B)

layouts = st.builds(
    Deployment,
    tp=st.sampled_from([1, 2, 3, 4]),
    pp=st.integers(1, 5),
    dp=st.integers(1, 3),
    cells=st.integers(1, 3),
    standby=st.integers(0, 2),
)


def cost(deployment, spec=R10B):
    return Cost(spec, FP16, REFERENCE, deployment)


def change(a, b, lost=(), workload=CHAT):
    return transition(cost(a), cost(b), workload, lost)


def whole_bytes(deployment, spec=R10B):
    """Of everything that all GPUs of a deployment hold, and of its experts alone, slot by slot."""
    holds = Holdings(cost(deployment, spec))
    homes = [(cell, seat) for cell in range(deployment.cells) for seat in deployment.layout.seats()]
    experts = sum(len(holds.pairs(holds.kind(home))) for home in homes) * EXPERT_BYTES
    return experts, sum(lacking_bytes(spec, FP16, holds.dense(seat), None) for _, seat in homes)


@settings(deadline=None, max_examples=40)
@given(layouts)
def test_from_a_deployment_to_itself_nothing_moves(deployment):
    same = change(deployment, deployment)
    assert (same.moved_bytes, same.moved_experts, same.busiest_bytes, same.total_s) == (0, 0, 0, 0)
    assert (same.num_new_gpus, same.sequences) == (0, 0)
    assert same.num_kept_replicas == deployment.num_replicas
    assert same.before == same.during == same.after
    found = estimate(cost(deployment), CHAT)
    assert same.keeps_objective == ((found.capacity or 0.0) >= found.rate * (1 - 1e-6)), "as it is without a change"


@settings(deadline=None, max_examples=40)
@given(layouts, layouts)
def test_no_more_moves_than_is_held_and_what_moves_adds_up(a, b):
    move = change(a, b)
    experts, dense = whole_bytes(b)
    assert sum(stage.expert_bytes for stage in move.stages) <= experts
    assert sum(stage.dense_bytes for stage in move.stages) <= dense * (1 + 1e-9)
    assert move.moved_experts * EXPERT_BYTES == pytest.approx(sum(stage.expert_bytes for stage in move.stages))
    assert move.moved_bytes / b.num_gpus <= move.busiest_bytes + 1e-3
    assert move.num_kept_gpus + move.num_new_gpus == b.cells * b.cell_gpus
    assert move.num_new_gpus == max(0, b.num_gpus - a.num_gpus)
    assert move.num_kept_replicas <= min(a.num_replicas, b.num_replicas)
    assert move.during <= min(move.before, move.after)


@settings(deadline=None, max_examples=40)
@given(layouts)
def test_a_cluster_of_only_new_gpus_takes_in_everything(deployment):
    move = change(deployment, deployment, lost=range(deployment.num_gpus))
    experts, dense = whole_bytes(deployment)
    assert move.moved_bytes == pytest.approx(experts + dense)
    assert (move.num_kept_gpus, move.num_kept_replicas, move.during) == (0, 0, 0)


@pytest.mark.parametrize("spec", [R10B, replace(R10B, tie_embeddings=False), R10B_GQA], ids=["tied", "untied", "gqa"])
def test_all_shards_and_stages_together_hold_the_model_once(spec):
    params = count_params(spec)
    deployment = Deployment(tp=4, pp=4)
    _, dense = whole_bytes(deployment, spec)
    uncut = 4 * params.gates + 4 * 2 * spec.num_layers * spec.hidden_size  # each shard has them; no last norm here
    vocabulary = spec.vocab_size * spec.hidden_size * 2  # on the first stage and on the last
    assert dense / 2 == params.attention + uncut + vocabulary


def test_the_seed_loses_one_gpu_and_gets_another():
    move = change(SEED, SEED, lost=[13])
    holds = Holdings(cost(SEED))
    assert gpu_of(SEED, 0, Seat(1, 1, 1)) == 13
    assert move.moved_experts == 10 == len(holds.pairs(holds.kind((0, Seat(1, 1, 1)))))
    assert [stage.experts for stage in move.stages] == [0, 10, 0, 0]
    assert move.moved_bytes == move.busiest_bytes
    assert (move.num_new_gpus, move.num_kept_replicas) == (1, 1)
    assert move.sequences == pytest.approx(estimate(cost(SEED), CHAT).concurrency / 2)
    assert move.during == pytest.approx(move.before / 2)
    assert move.start_s > 0 and move.recompute_s > 0


def test_a_spare_takes_the_seat_without_a_start():
    with_spare = replace(SEED, spares=1)
    move = change(with_spare, SEED, lost=[0])
    assert (move.num_new_gpus, move.moved_experts, move.start_s) == (1, 10, 0.0)
    from_host_s = move.busiest_bytes / (REFERENCE.load_gb_s * 1e9)
    assert move.load_s >= from_host_s > 0


@pytest.mark.parametrize("lost", [[0], [9], [31]])
def test_without_another_gpu_the_unbroken_replica_goes_on_alone(lost):
    move = change(SEED, replace(SEED, dp=1), lost)
    assert (move.num_kept_replicas, move.num_kept_gpus) == (1, 16)
    assert sum(stage.dense_bytes for stage in move.stages) == 0, "its attention is where it was"
    assert move.during == pytest.approx(min(move.before / 2, move.after))


def test_another_replica_leaves_the_kv_of_the_others_alone():
    move = change(SEED, replace(SEED, dp=3))
    assert (move.num_kept_replicas, move.num_new_gpus, move.sequences) == (2, 16, 0)
    assert move.after > move.during == move.before
    one_replica = whole_bytes(Deployment(4, 4))[1]
    assert sum(stage.dense_bytes for stage in move.stages) == pytest.approx(one_replica)


def test_another_cell_moves_nothing_in_the_others():
    move = change(BETTER, replace(BETTER, cells=5))
    experts, dense = whole_bytes(replace(BETTER, cells=1))
    assert move.moved_bytes == pytest.approx(experts + dense)
    assert move.num_kept_replicas == 8


def test_another_cut_leaves_no_replica_and_no_kv():
    move = change(SEED, BETTER)
    assert (move.num_kept_replicas, move.during, move.num_new_gpus) == (0, 0.0, 0)
    assert move.sequences == pytest.approx(estimate(cost(SEED), CHAT).concurrency)
    experts, dense = whole_bytes(BETTER)
    assert 0 < sum(stage.dense_bytes for stage in move.stages) < dense, "each GPU had a part of some layers"
    assert 0 < sum(stage.expert_bytes for stage in move.stages) < experts


def test_the_objective_is_kept_by_who_stays_or_where_it_is_over_in_time():
    few = replace(CHAT, concurrency=4)
    assert change(SEED, SEED, [13], few).keeps_objective, "one replica is enough for these"
    strict = replace(CHAT, concurrency=None, rate=80.0, objective=Objective(ttft_s=1.0))
    assert not change(SEED, SEED, [13], strict).keeps_objective
    patient = replace(strict, objective=Objective(ttft_s=60.0))
    assert change(SEED, SEED, [13], patient).keeps_objective


def test_a_new_cell_takes_at_least_as_long_as_to_load_all():
    move = change(SEED, SEED)
    assert move.restart_s > whole_bytes(SEED)[0] / 32 / (REFERENCE.load_gb_s * 1e9)


def test_bad_questions_are_refused():
    with pytest.raises(PlanError, match="one model"):
        transition(cost(SEED), cost(SEED, R10B_GQA), CHAT)
    with pytest.raises(PlanError, match="no GPU 32"):
        change(SEED, SEED, [32])
