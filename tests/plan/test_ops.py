"""What a step costs: the fast sum is the sum of what is shown, nothing gets faster by more work or slower hardware."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.plan.deployment import Deployment
from serve_app.plan.ops import Op, Stage, Step
from serve_app.plan.routing import busiest_touched, distinct_experts, expert_imbalance
from serve_app.plan.system import System
from tests.plan.cases import FP16, R10B, R10B_TOP2, REFERENCE, SEED
from tests.plan.draws import stages, steps

quickly = settings(deadline=None, max_examples=50)


def op(stage: Stage, step: Step, name: str, num_peers: float | None = None) -> Op:
    return next(op for op in stage.ops(step, num_peers=num_peers) if op.name == name)


def stage_of(deployment: Deployment, *, num_experts: int = 16, top_k: int = 2, system: System = REFERENCE) -> Stage:
    return Stage(replace(R10B, num_experts=num_experts, top_k=top_k), FP16, system, deployment, 0)


@quickly
@given(stages(), steps, st.none() | st.floats(1, 8))
def test_the_seconds_of_a_step_are_those_of_its_operations(stage: Stage, step: Step, num_peers: float | None) -> None:
    shown = math.fsum(op.seconds for op in stage.ops(step, num_peers=num_peers))
    assert stage.seconds(step, num_peers=num_peers) == pytest.approx(shown, rel=1e-12)


@quickly
@given(stages(), steps, steps)
def test_more_work_never_takes_less_time(stage: Stage, step: Step, more: Step) -> None:
    assert stage.seconds(step + more) >= stage.seconds(step) * (1 - 1e-9)


@quickly
@given(
    stages(), steps, st.sampled_from(["memory_gb_s", "intra_gb_s", "inter_gb_s", "peak_tflops"]), st.floats(1.0, 10.0)
)
def test_faster_hardware_never_takes_more_time(stage: Stage, step: Step, field: str, factor: float) -> None:
    peaks = {dtype: peak * factor for dtype, peak in stage.system.peak_tflops.items()}
    value = peaks if field == "peak_tflops" else getattr(stage.system, field) * factor
    faster = replace(stage, system=stage.system.model_copy(update={field: value}))
    assert faster.seconds(step) <= stage.seconds(step) * (1 + 1e-9)


@quickly
@given(stages(), steps)
def test_every_operation_takes_time_and_is_bound_by_something(stage: Stage, step: Step) -> None:
    for op in stage.ops(step):
        assert 0 <= op.seconds < math.inf
        assert min(op.flops, op.memory_bytes, op.link_bytes) >= 0


@given(st.integers(1, 400), st.floats(1e-3, 1e6), st.data())
def test_some_expert_is_touched_by_any_number_of_tokens_and_never_more_than_there_are(
    num_experts: int, num_tokens: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    touched = distinct_experts(num_experts, top_k, num_experts, num_tokens)
    assert 0 < touched <= num_experts
    assert touched <= num_tokens * top_k * (1 + 1e-9) or num_tokens < 1


@given(st.floats(0.001, 64), st.integers(1, 128), st.integers(1, 128))
def test_the_busiest_worker_reads_no_less_than_the_mean_and_no_more_than_it_holds(
    touched: float, num_experts: int, group_size: int
) -> None:
    touched = min(touched, float(num_experts))
    most = busiest_touched(touched, num_experts, group_size)
    assert touched / group_size - 1e-9 <= most <= -(-num_experts // group_size) + 1e-9
    assert most >= min(1.0, touched) - 1e-9


@pytest.mark.parametrize(("num_experts", "group_size"), [(16, 4), (16, 8), (12, 2)])
@pytest.mark.parametrize("touched", [1, 2, 3, 5])
def test_the_busiest_worker_reads_what_counting_all_cases_says(num_experts: int, group_size: int, touched: int) -> None:
    cases = list(combinations(range(num_experts), touched))
    most = [max(sum(expert % group_size == rank for expert in case) for rank in range(group_size)) for case in cases]
    assert busiest_touched(touched, num_experts, group_size) == pytest.approx(sum(most) / len(most), rel=0.2)


def test_the_rows_of_the_busiest_worker_come_near_the_mean_as_they_grow_in_number() -> None:
    found = [expert_imbalance(8, rows) for rows in (8, 64, 512, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(1.0, abs=0.01)
    assert expert_imbalance(1, 5) == 1.0


# -- the peer's defect: READING, B2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ep", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_token_waits_for_at_least_one_whole_expert_in_each_layer(ep: int, top_k: int) -> None:
    """The peer reads min(experts / ep, tokens x top-k / ep) of them in whole numbers, which is none: 2.6 us a token."""
    stage = stage_of(Deployment(dp=ep), top_k=top_k)
    reads = [op(stage, Step.decode(1, 1), "experts", num_peers=1).seconds / 874e-6]
    assert 1.0 <= reads[0] * 1.001 <= top_k * 1.01


def test_one_token_of_two_experts_over_four_gpus_takes_the_reading_s_time_at_least() -> None:
    """16 layers x 3 x 2560 x 5120 x 2 bytes at 1.44 TB/s; in one of five cases both experts are on one GPU."""
    seconds = op(stage_of(Deployment(dp=4)), Step.decode(1, 1), "experts", num_peers=1).seconds
    one = 16 * 3 * 2560 * 5120 * 2 / 1.44e12
    assert one * 1e6 == pytest.approx(874, rel=0.001)
    assert seconds == pytest.approx(one * 1.2, rel=0.1)


def test_less_than_one_row_in_the_mean_reads_less_than_an_expert_and_more_than_nothing() -> None:
    stage = stage_of(SEED)
    half, whole = (op(stage, Step.decode(rows, 1), "experts", num_peers=1).seconds for rows in (0.3, 1.0))
    assert 0 < half < whole


# -- limits ---------------------------------------------------------------------------------------------------------


def test_a_dense_layer_has_one_expert_so_that_a_wider_group_makes_it_no_faster() -> None:
    """As Octavo lays a dense model out: every row goes to the one worker that holds the layer's expert."""
    step = Step.prompt(4096)
    alone, spread = (op(stage_of(Deployment(tp=tp), num_experts=1, top_k=1), step, "experts").seconds for tp in (1, 4))
    assert spread == pytest.approx(alone)
    assert op(stage_of(Deployment(tp=4), num_experts=1, top_k=1), step, "expert exchange").seconds > 0


def test_replicas_of_a_dense_model_in_one_cell_wait_for_the_same_worker() -> None:
    one, four = (stage_of(Deployment(dp=dp), num_experts=1, top_k=1) for dp in (1, 4))
    step = Step.prompt(4096)
    assert op(four, step, "experts").seconds == pytest.approx(4 * op(one, step, "experts").seconds)


def test_where_the_products_are_cut_instead_a_dense_layer_gets_faster_by_the_shards() -> None:
    step = Step.prompt(4096)
    alone, cut = (
        op(replace(stage_of(Deployment(tp=tp), num_experts=1, top_k=1), by_all_reduce=True), step, "experts").seconds
        for tp in (1, 4)
    )
    assert cut == pytest.approx(alone / 4)


def test_more_workers_than_experts_of_a_layer_make_it_no_faster() -> None:
    step = Step.prompt(4096)
    just, wider = (op(stage_of(Deployment(dp=dp)), step, "experts", num_peers=1).seconds for dp in (16, 32))
    assert wider == pytest.approx(just)


def test_what_does_not_divide_is_as_slow_as_the_fullest_worker() -> None:
    step = Step.prompt(8192)
    even = op(stage_of(Deployment(dp=8)), step, "experts", num_peers=1).seconds
    uneven = op(stage_of(Deployment(dp=7)), step, "experts", num_peers=1).seconds
    assert uneven == pytest.approx(even * 3 / 2, rel=0.01)  # three experts of 16 and not two


def test_kv_heads_that_are_fewer_than_the_shards_are_read_by_each_of_them() -> None:
    spec = replace(R10B_TOP2, num_heads=16, num_kv_heads=2)
    step = Step.decode(64, 8192)
    two, eight = (
        op(Stage(spec, FP16, REFERENCE, Deployment(tp=tp), 0), step, "decode attention").memory_bytes for tp in (2, 8)
    )
    assert eight == two


def test_groups_that_lie_on_two_nodes_exchange_over_the_slow_links() -> None:
    step = Step.prompt(8192)
    within, across, beyond = (
        op(stage_of(Deployment(dp=dp, cells=cells)), step, "expert exchange", num_peers=1).seconds
        for dp, cells in ((6, 1), (6, 4), (16, 1))
    )
    assert across > 4 * within
    assert beyond > 2 * within


def test_a_hop_stays_on_a_node_where_both_stages_of_all_cells_are_on_one() -> None:
    assert stage_of(Deployment(tp=4, pp=2, cells=4)).hops_inside
    assert not stage_of(Deployment(tp=4, dp=2, pp=4)).hops_inside
    assert stage_of(Deployment(dp=3, pp=2)).hops_inside
    assert not stage_of(Deployment(dp=3, pp=2, cells=4)).hops_inside  # the second cell begins at the seventh GPU


@quickly
@given(st.floats(1, 4000), st.floats(1, 100))
def test_workers_at_work_on_one_machine_slow_every_operation_down(rows: float, context: float) -> None:
    slow = REFERENCE.model_copy(update={"contention": {1: 1.0, 8: 1.7}})
    step = Step.decode(rows, context)
    fast = stage_of(SEED)
    assert replace(fast, system=slow).seconds(step) == pytest.approx(1.7 * fast.seconds(step))
