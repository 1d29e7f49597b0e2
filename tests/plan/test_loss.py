"""What a loss costs: the reading's rows, and that no expert gets lost in the arithmetic."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.experts.placement import Slots
from serve_app.experts.repair import repair
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, estimate
from serve_app.plan.homes import Group, group, hit_share, homes, placed, slots_needed, standby_needed
from serve_app.plan.loss import after, losses
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import BETTER, R10B, R10B_TOP2, REFERENCE, SEED
from tests.plan.losing import WORKLOAD, case, deployments

MUCH = 10**6  # experts that fit beyond the slots


# -- the reading ----------------------------------------------------------------------------------------------------


def test_row_26_ten_slots_are_what_one_loss_in_a_stage_takes_and_eleven_and_sixteen_what_more_take():
    assert [slots_needed(64, 8, num_lost) for num_lost in (0, 1, 2, 4)] == [8, 10, 11, 16]
    assert [standby_needed(R10B, SEED, num_lost) for num_lost in (1, 2)] == [2, 3]
    with pytest.raises(ValueError, match="leave nobody"):
        slots_needed(64, 8, 8)


def test_row_26_as_copies_they_cover_a_quarter_and_a_loss_finds_two_live_ones_in_the_mean():
    of = group(R10B, SEED, 0)
    found = [homes(of, frozenset([rank]), MUCH, exact_pairs=64) for rank in range(8)]
    assert of.coverage == 0.25
    assert sum(found[rank].num_live for rank in range(8)) / 8 == 2
    assert all(stage.num_lost == 8 and stage.is_exact for stage in found)
    assert group(R10B, replace(SEED, standby=8), 0).coverage == 1.0


def test_row_26_with_full_coverage_nothing_is_loaded():
    state = losses(*case(replace(SEED, standby=8))).gpu
    assert state.landed_bytes == state.worker_bytes == 0
    assert state.fits_slots


def test_a3_the_loss_of_one_gpu_fits_the_slots_and_that_of_two_in_a_stage_does_not():
    found = losses(*case(SEED))
    one, two = found.gpu.homes[0], found.state("two of a replica").homes[0]
    assert (one.slots_needed, one.slots_present, one.num_beyond) == (10, 10, 0)
    assert (two.slots_needed, two.slots_present, two.num_beyond) == (11, 10, 4)
    assert found.standby_needed == 2
    assert found.gpu.fits_slots
    assert not found.state("two of a replica").fits_slots


def test_row_28_both_replicas_stand_still_because_most_tokens_meet_a_lost_expert():
    found = losses(*case(SEED))
    assert (found.blast_gpus, found.blast_gpus_after) == (32, 16)
    assert found.gpu.hit_share == pytest.approx(0.41, abs=0.005)
    assert losses(*case(SEED, top_k=2)).gpu.hit_share == pytest.approx(0.67, abs=0.005)


def test_row_29_half_the_capacity_is_left_and_the_objective_is_kept():
    found = losses(*case(SEED))
    assert found.worst_capacity == 0  # the only cell stands still
    assert found.degraded_capacity == pytest.approx(found.gpu.healthy.capacity / 2)
    assert found.gpu.share == 0.5
    assert found.gpu.at_once_s == pytest.approx(1.05, rel=0.01)
    assert found.gpu.keeps_objective


def test_a3_the_better_layout_stops_a_quarter():
    found = losses(*case(BETTER, top_k=2))
    assert (found.blast_gpus, found.blast_gpus_after) == (8, 4)
    assert found.gpu.share_at_once == 0.75


@pytest.mark.parametrize(
    ("layout", "left"), [(Deployment(dp=4, cells=8), 7 / 8), (Deployment(dp=2, cells=16), 15 / 16)]
)
def test_b3_a_cell_that_is_repaired_takes_its_part(layout, left):
    found = losses(*case(layout, top_k=2))
    assert found.worst_capacity == pytest.approx(found.gpu.healthy.capacity * left)


def test_b3_the_loss_of_a_gpu_changes_the_winner():
    eights, sixteens = (losses(*case(Deployment(dp=dp, cells=cells), top_k=2)) for dp, cells in ((4, 8), (2, 16)))
    assert eights.gpu.healthy.capacity > sixteens.gpu.healthy.capacity
    assert eights.worst_capacity < sixteens.worst_capacity


# -- who stops, what is left ----------------------------------------------------------------------------------------


def test_a_node_that_is_a_stage_takes_the_cell_along():
    state = losses(*case(SEED)).state("node")
    assert state.gpus == tuple(range(8))
    assert not state.is_survivable
    assert state.capacity == 0
    assert not state.keeps_objective
    assert state.blast_gpus_after == 32
    with pytest.raises(ValueError, match="nothing serves"):
        _ = state.degraded


def test_a_cell_without_another_replica_stands_still_until_its_seat_is_filled():
    found = losses(*case(Deployment(tp=4, cells=8), top_k=2))
    assert (found.blast_gpus, found.blast_gpus_after) == (4, 4)
    assert found.worst_capacity == found.degraded_capacity == pytest.approx(found.gpu.healthy.capacity * 7 / 8)
    assert found.gpu.landed_bytes == 0  # its experts wait with it


def test_two_losses_hurt_by_where_they_are():
    found = losses(*case(replace(SEED, cells=2)))
    shares = {state.kind: state.share for state in found.two}
    assert shares == {"two of a replica": 0.75, "two replicas": 0.5, "two cells": 0.5}
    assert found.worst_two.kind == "two cells"  # both stand still at once
    assert found.worst_survivable.kind in ("two cells", "node")


def test_the_loss_of_a_spare_costs_nothing():
    found = losses(*case(replace(SEED, spares=1)))
    spare = found.state("spare")
    assert spare.gpus == (32,)
    assert spare.capacity == spare.capacity_at_once == spare.healthy.capacity
    assert spare.blast_gpus == spare.blast_gpus_after == 0


def test_one_gpu_is_all_there_is_to_lose():
    found = losses(*case(Deployment()))
    assert [state.kind for state in found.states] == ["gpu"]
    assert found.worst_two is None
    assert found.worst_survivable is None
    assert found.standby_needed is None
    assert found.worst_capacity == found.degraded_capacity == 0


def test_experts_that_do_not_fit_make_a_cell_wait():
    cost, workload, healthy = case(Deployment(dp=2, pp=2))
    small = cost.system.model_copy(update={"memory_gb": 1.02 * healthy.footprint.fixed_bytes / 0.9e9})
    state = losses(replace(cost, system=small), workload, healthy).gpu
    assert state.cells[0].num_homeless > 0
    assert not state.is_survivable
    assert state.cells[0].seats_needed(2) == 1


def test_experts_beyond_the_slots_take_room_from_the_kv():
    cost, workload, healthy = case(Deployment(dp=2, pp=2))
    state = losses(cost, workload, healthy).gpu
    per_worker, per_expert = state.homes[0].most_beyond, healthy.footprint.experts_bytes / 64
    token_bytes = cost.spec.num_layers * 2 * 2560 * 2 / 2  # keys and values of all heads in one of two stages
    assert per_worker == 64
    assert healthy.kv_tokens - state.degraded.kv_tokens == pytest.approx(per_worker * per_expert / token_bytes, abs=2)


def test_a_rate_above_what_is_left_is_not_kept():
    workload = replace(WORKLOAD, concurrency=None, rate=60.0)
    found = losses(*case(SEED, top_k=2, workload=workload))
    assert found.gpu.healthy.capacity > 60 > found.degraded_capacity
    assert not found.gpu.keeps_objective
    slower = losses(*case(SEED, top_k=2, workload=replace(workload, rate=40.0)))
    assert slower.degraded_capacity > 40
    assert slower.gpu.keeps_objective


def test_the_load_of_the_lost_falls_on_those_that_are_left():
    state = losses(*case(SEED, top_k=2)).gpu
    assert state.degraded.concurrency == pytest.approx(128, rel=0.01)
    assert state.degraded.ttft_s.value > state.healthy.ttft_s.value
    assert state.degraded.output_tokens_s < state.healthy.output_tokens_s
    assert state.degraded.capacity == pytest.approx(state.capacity)


def test_a_gpu_that_there_is_not_is_named():
    with pytest.raises(PlanError, match="no GPU 32: the deployment has 32"):
        after(*case(SEED), [32])


def test_the_worst_node_is_the_one_that_breaks_most_replicas():
    """Cells of 2 stages x 3 replicas on nodes of 8: node 1 has a part of all replicas of two cells."""
    known = case(Deployment(pp=2, dp=3, cells=4))
    shares = [after(*known, range(start, start + 8), "node").share for start in (0, 8, 16)]
    assert [round(12 * share) for share in shares] == [7, 6, 7]
    assert losses(*known).state("node").gpus == tuple(range(8, 16))


# -- what always holds ----------------------------------------------------------------------------------------------


@st.composite
def groups_with_loss(draw):
    num_layers, num_experts, num_workers = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    primary = -(-num_layers * num_experts // num_workers)
    nodes = tuple(rank // draw(st.integers(1, 4)) for rank in range(num_workers))
    of = Group(range(num_layers), num_experts, num_workers, Slots(primary, draw(st.integers(0, 5))), nodes)
    return of, frozenset(draw(st.sets(st.integers(0, num_workers - 1), min_size=1, max_size=num_workers)))


@settings(deadline=None)
@given(groups_with_loss())
def test_every_expert_has_one_home_and_the_arithmetic_says_which_kind(loss):
    of, lost = loss
    living = [rank for rank in range(of.num_workers) if rank not in lost]
    repaired = repair(placed(of), living, of.slots, [str(node) for node in of.nodes])
    found = homes(of, lost, MUCH, exact_pairs=MUCH)
    primaries = [ranks[0] for table in repaired.placement.hosts for ranks in table if ranks]
    held = Counter(rank for table in repaired.placement.hosts for ranks in table for rank in ranks)
    beyond = [max(0, held[rank] - of.slots.primary - of.slots.standby) for rank in living]
    assert found.num_lost == sum(ranks[0] in lost for table in placed(of).hosts for ranks in table)
    assert found.num_live + found.num_in_slots + found.num_doubled + found.num_homeless == found.num_lost
    if not living:
        assert found.num_homeless == found.num_lost == of.num_pairs
        return
    assert len(primaries) == of.num_pairs
    assert set(primaries) <= set(living)
    assert found.num_live == len(repaired.promoted)
    assert found.num_landed == len(repaired.landed)
    assert found.num_beyond == sum(beyond)
    assert found.most_beyond == max(beyond)
    assert found.num_in_slots == len(repaired.landed) - sum(beyond)


@settings(deadline=None)
@given(groups_with_loss(), st.integers(0, 12), st.sampled_from([0, MUCH]))
def test_room_and_slots_never_make_it_worse(loss, room, exact_pairs):
    of, lost = loss
    more = replace(of, slots=replace(of.slots, standby=of.slots.standby + 1))
    least, roomier, spread = (
        homes(of, lost, room, exact_pairs),
        homes(of, lost, room + 1, exact_pairs),
        homes(more, lost, room, exact_pairs),
    )
    for better in (roomier, spread):
        assert better.num_homeless <= least.num_homeless
        assert better.num_beyond <= least.num_beyond
    assert 0 <= least.num_homeless <= least.num_beyond <= least.num_lost
    assert least.num_landed >= -1e-9
    if not exact_pairs:
        assert spread.num_live >= least.num_live


@settings(deadline=None)
@given(groups_with_loss(), st.integers(1, 3))
def test_tokens_that_meet_a_lost_expert_are_counted_as_they_are_dealt(loss, top_k):
    of, lost = loss
    top_k = min(top_k, of.num_experts)
    missed = 1.0
    for table in placed(of).hosts:
        num = sum(ranks[0] in lost for ranks in table)
        for j in range(top_k):
            missed *= max(0, of.num_experts - num - j) / (of.num_experts - j)
    assert hit_share(of, lost, top_k) == pytest.approx(1 - missed)


@settings(deadline=None, max_examples=25)
@given(deployments())
def test_more_is_lost_the_less_is_left(deployment):
    cost, workload, healthy = case(deployment)
    found = losses(cost, workload, healthy)
    for state in found.states:
        assert 0 <= state.capacity_at_once <= healthy.capacity + 1e-9
        assert 0 <= state.capacity <= healthy.capacity + 1e-9
        assert state.num_replicas <= deployment.num_replicas
        assert state.blast_gpus_after <= state.blast_gpus <= cost.deployment.num_gpus
        assert state.num_replicas + state.blast_gpus_after / (deployment.tp * deployment.pp) == deployment.num_replicas
        assert state.num_replicas <= found.gpu.num_replicas or state.kind == "spare"


@settings(deadline=None, max_examples=25)
@given(deployments())
def test_the_named_gpus_are_what_their_kind_says(deployment):
    found = losses(*case(deployment))
    for state in found.states:
        seats = [(cell.cell, seat) for cell in state.cells for seat in cell.seats]
        replicas = {(cell, seat.replica) for cell, seat in seats}
        assert len(state.gpus) == len(seats)
        if state.kind in ("two of a replica", "two replicas", "two cells"):
            assert len(seats) == 2
            assert len(replicas) == (1 if state.kind == "two of a replica" else 2)
            assert len({cell for cell, _ in replicas}) == (2 if state.kind == "two cells" else 1)


def test_copies_are_kept_on_another_node_where_there_is_one():
    per_node = REFERENCE.gpus_per_node
    deployment = Deployment(tp=4, dp=4, standby=2)  # 16 workers of a stage on two nodes
    of = group(R10B, deployment, 0, tuple(gpu // per_node for gpu in range(16)))
    copied = [ranks for table in placed(of).hosts for ranks in table if len(ranks) > 1]
    assert len(copied) == 32
    assert all(len({of.nodes[rank] for rank in ranks}) == 2 for ranks in copied)


def test_a_dense_model_and_a_range_of_lengths_lose_as_well():
    dense = replace(R10B_TOP2, num_experts=1, top_k=1, expert_size=81920)
    known, _, _ = case(SEED)
    workload = Workload(Lengths.uniform(128, 10240), Lengths.fixed(64), objective=Objective(ttft_s=10))
    cost = Cost(dense, known.precision, known.system, Deployment(dp=2, cells=2))
    state = losses(cost, workload, estimate(cost, workload)).gpu
    assert (state.homes[0].num_pairs, state.homes[0].num_lost) == (16, 8)
    assert state.share == 0.75
