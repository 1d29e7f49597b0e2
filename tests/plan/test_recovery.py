"""How long a loss is felt: phases from bandwidths and from what was measured."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.plan.deployment import Deployment
from serve_app.plan.loss import losses
from serve_app.plan.ops import Step
from serve_app.plan.recovery import budget
from serve_app.plan.system import Recovery
from serve_app.plan.workload import Objective
from tests.plan.cases import SEED
from tests.plan.losing import WORKLOAD, case, deployments, spared

CAUSES = ["process", "hung", "gpu"]


def names(phases):
    return [phase.name for phase in phases]


def test_a_replica_that_is_whole_goes_on_before_the_others_streams_are_computed_again():
    found = budget(losses(*case(SEED)).gpu, "process")
    assert names(found.failover) == ["notice", "form", "load", "step", "re-add"]
    assert names(found.restore) == ["notice", "respawn", "load weights", "form"]
    assert not found.is_waiting
    assert found.first_token_s == pytest.approx(found.all_streams_s - found.seconds("re-add"))
    assert found.first_token_s < found.all_streams_s < found.whole_s


def test_the_coefficients_are_those_that_were_measured():
    known = Recovery()
    assert (known.notice_s, known.hung_s, known.form_s) == (0.1, 2.05, 0.02)
    assert (known.respawn_s, known.respawn_serving_s) == (2.1, 5.6)


def test_row_27_bytes_take_what_the_link_allows():
    """0.68 GB, all that a worker has but its vocabulary: 0.03 s, 0.55 s, 3.4 s."""
    cost, workload, healthy = case(replace(SEED, dp=1, tp=8))
    held = healthy.footprint
    bytes_of_gpu = held.experts_bytes + held.dense_bytes
    for rate, from_disk, expected_s in ((25, False, 0.027), (1.25, True, 0.54), (0.2, True, 3.4)):
        field = "disk_gb_s" if from_disk else "load_gb_s"
        system = cost.system.model_copy(update={field: rate})
        state = losses(replace(cost, system=system), workload, healthy).gpu
        (load,) = (p for p in budget(state, "process", from_disk=from_disk).restore if p.name == "load weights")
        assert load.seconds * bytes_of_gpu / load.loaded_bytes == pytest.approx(expected_s, rel=0.05)


def test_experts_come_from_each_hosts_memory_or_through_a_nodes_disk():
    state = losses(*case(SEED)).gpu
    per_expert = 3 * 2560 * 5120 * 2
    assert state.worker_bytes == 2 * per_expert
    assert budget(state).seconds("load") == pytest.approx(2 * per_expert / 25e9)
    assert budget(state, from_disk=True).seconds("load") == pytest.approx(6 * per_expert / 1e9)  # all of the stage's


def test_live_copies_cost_nothing():
    assert budget(losses(*case(replace(SEED, standby=8))).gpu).seconds("load") == 0


def test_a_frozen_worker_is_noticed_later_and_nothing_else_changes():
    state = losses(*case(SEED)).gpu
    hung, died = budget(state, "hung"), budget(state, "process")
    assert hung.all_streams_s - died.all_streams_s == pytest.approx(2.05 - 0.1)


def test_what_the_broken_replica_had_is_computed_again_by_its_sibling():
    """64 sequences of 10,304 tokens, at the rate at which one replica prefills."""
    cost, workload, healthy = case(SEED)
    chunk = Step.prompt(10304 / 2, 10304 / 4, sampled=0.5)
    expected_s = 64 * 2 * cost.interval_s(chunk)
    assert budget(losses(cost, workload, healthy).gpu).seconds("re-add") == pytest.approx(expected_s, rel=0.05)


def test_more_siblings_share_it():
    (two, four) = (budget(losses(*case(Deployment(dp=dp))).gpu).seconds("re-add") for dp in (2, 4))
    assert two > 2 * four  # as many as one holds on one, or a third of that on each of three


def test_what_prompts_have_in_common_is_found_in_the_siblings_cache():
    shared = replace(WORKLOAD, prefix_share=0.75)
    alone, common = (budget(losses(*case(SEED, workload=w)).gpu).seconds("re-add") for w in (WORKLOAD, shared))
    assert common < alone / 2


def test_without_a_sibling_the_seat_is_waited_for():
    state = losses(*case(Deployment(tp=4, pp=4))).gpu
    found = budget(state, "process")
    assert names(found.failover) == ["notice", "respawn", "load weights", "form", "step", "re-add"]
    assert found.is_waiting
    assert found.seconds("respawn") == 2.1  # nothing else is to do
    assert budget(state, "gpu").first_token_s > 4 * 3600


def test_a_spare_takes_the_seat():
    lonely = spared(Deployment(tp=4, pp=4), 1)
    found = budget(losses(*case(lonely)).gpu, "gpu")
    assert names(found.failover) == ["notice", "load weights", "form", "step", "re-add"]
    assert found.uses_spares
    assert found.whole_s < 5


def test_two_lost_of_both_replicas_wait_for_one_of_them():
    both = losses(*case(spared(SEED, 1))).state("two replicas")
    found = budget(both, "gpu")
    assert found.is_waiting
    assert found.first_token_s < 5  # one spare makes one replica whole
    assert found.whole_s > 4 * 3600  # the other seat waits for a GPU


def test_groups_of_gpus_are_formed_anew_where_shards_need_them():
    cost, workload, healthy = case(SEED)
    cpu = replace(cost, system=cost.system.model_copy(update={"kind": "cpu"}))
    assert budget(losses(cost, workload, healthy).gpu).seconds("form") == pytest.approx(1.02)
    assert budget(losses(cpu, workload, healthy).gpu).seconds("form") == pytest.approx(0.02)
    assert budget(losses(*case(Deployment(dp=8))).gpu).seconds("form") == pytest.approx(0.02)


def test_the_documents_thirty_seconds_are_kept_and_one_is_not():
    found = budget(losses(*case(SEED)).gpu)
    assert found.keeps(Objective(recovery_s=30))
    assert not found.keeps(Objective(recovery_s=1))
    assert found.keeps(Objective())


def test_the_loss_of_a_spare_takes_no_time():
    found = budget(losses(*case(spared(SEED, 1))).state("spare"))
    assert found.first_token_s == found.all_streams_s == found.whole_s == 0


@settings(deadline=None, max_examples=25)
@given(deployments(), st.sampled_from(CAUSES), st.booleans())
def test_a_spare_never_makes_it_slower_and_times_are_in_order(deployment, cause, from_disk):
    cost, workload, healthy = case(deployment)
    budgets = []
    for spares in range(3):
        with_spares = replace(cost, deployment=spared(deployment, spares))
        states = [state for state in losses(with_spares, workload, healthy).states if state.kind != "spare"]
        budgets.append([budget(state, cause, from_disk=from_disk) for state in states])
    for fewer, more in pairwise(budgets):
        for before, after in zip(fewer, more, strict=True):
            for name in ("first_token_s", "all_streams_s", "whole_s"):
                assert getattr(after, name) <= getattr(before, name) + 1e-9
    for found in budgets[0]:
        assert 0 < found.first_token_s <= found.all_streams_s <= found.whole_s
