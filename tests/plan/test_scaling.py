"""One size at a time: what grows, what stays, and where it ends."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, estimate
from serve_app.plan.scaling import (
    GPUS,
    by_concurrency,
    by_dtype,
    by_experts,
    by_gpus,
    by_prompt,
    columns,
    least_gpus,
    most_gpus,
    tables,
    widened,
)
from serve_app.plan.workload import Lengths, Workload
from tests.plan.cases import FP16, R10B, REFERENCE, SEED

CHAT = Workload(Lengths.fixed(10_240), Lengths.fixed(128))
COST = Cost(R10B, FP16, REFERENCE, SEED)


def test_the_size_of_the_base_is_the_base():
    found = estimate(COST, CHAT)
    for rows in tables(COST, CHAT).values():
        same = [row for row in rows if row.value in (32, 256, 128, 10_240, "bf16") and row.deployment == SEED]
        assert any(row.estimate.output_tokens_s == pytest.approx(found.output_tokens_s) for row in same)


def test_a_cell_grows_to_an_expert_of_a_layer_on_each_worker_and_then_there_are_more():
    """READING.md, row 36: 16 per stage x PP 4 = 64 GPUs."""
    assert most_gpus(16, 4) == 64
    rows = {row.value: row.deployment for row in by_gpus(COST, CHAT)}
    assert set(rows) == set(GPUS)
    assert (rows[64].ep, rows[64].cells) == (16, 1)
    assert (rows[128].ep, rows[128].cells) == (16, 2)
    assert (rows[1024].ep, rows[1024].cells, rows[1024].num_gpus) == (16, 16, 1024)
    assert rows[8].num_gpus == 8 and rows[8].pp == 2, "fewer than a replica has: stages are left out"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.integers(1, 200), st.sampled_from([1, 3, 16, 128]))
def test_a_widened_deployment_has_the_gpus_that_were_asked_for(tp, pp, num, num_experts):
    cost = replace(COST, spec=replace(R10B, num_experts=num_experts, top_k=1), deployment=Deployment(tp, pp, 2, 3))
    try:
        found = widened(cost, num)
    except ValueError:
        assert num < tp or num % (tp * min(pp, num // tp))
        return
    assert found.num_gpus == num and found.tp == tp
    assert found.ep <= max(num_experts, tp)


def test_a_number_that_does_not_come_out_even_says_so():
    (row,) = by_gpus(COST, CHAT, [33])
    assert not row.fits and "33 GPUs do not divide into replicas of TP 4 x PP 4" in row.reason


def test_the_search_may_choose():
    (row,) = by_gpus(COST, CHAT, [32], choose=lambda cost, num: Deployment(tp=4, dp=2, cells=num // 8))
    assert row.deployment == Deployment(tp=4, dp=2, cells=4)


def test_with_its_load_throughput_of_each_gpu_stays():
    rows = by_gpus(COST, CHAT, [64, 1024])
    assert rows[1].estimate.output_tokens_s_gpu == pytest.approx(rows[0].estimate.output_tokens_s_gpu)
    assert rows[1].estimate.concurrency == pytest.approx(16 * rows[0].estimate.concurrency)


def test_without_it_more_gpus_answer_sooner():
    rows = by_gpus(COST, CHAT, [16, 32, 64], with_load=False)
    tpots = [row.estimate.tpot_s.value for row in rows]
    assert tpots == sorted(tpots, reverse=True)


def test_512_experts_are_the_20_b_and_still_fit_one_gpu():
    """READING.md, rows 37 and 38: 16 experts on a GPU, 1.26 GB; 40 GB in all."""
    row = by_experts(COST, CHAT)[1]
    assert row.num_params == pytest.approx(20.6e9, rel=0.01)
    assert row.estimate.footprint.experts_bytes == pytest.approx(1.26e9, rel=0.01)
    doubled = replace(COST, spec=replace(R10B, num_experts=32))
    assert least_gpus(doubled, CHAT) == 1
    assert least_gpus(COST, replace(CHAT, isl=Lengths.fixed(10_240))) == 1
    small = replace(doubled, system=REFERENCE.model_copy(update={"memory_gb": 24.0}))
    assert least_gpus(small, CHAT) == 3
    hopeless = replace(doubled, system=REFERENCE.model_copy(update={"memory_gb": 5.0}))
    assert least_gpus(hopeless, CHAT) is None


def test_a_batch_of_256_and_20480_tokens_hold():
    """READING.md, rows 39 and 40: KV of 13.4 GB on each GPU, for either."""
    kv = by_concurrency(COST, CHAT)[-1].estimate.footprint.kv_bytes
    assert kv == pytest.approx(13.4e9, rel=0.03)
    row = by_prompt(COST, CHAT)[-1]
    assert row.value == 20_480 and row.estimate.footprint.kv_bytes == pytest.approx(13.4e9, rel=0.03)


def test_a_prompt_longer_than_the_model_reads_is_no_row():
    (row,) = by_prompt(COST, CHAT, [40_000])
    assert row.estimate is None and "32768 tokens at most" in row.reason


def test_fp8_halves_what_is_held_and_computes_only_where_the_hardware_does():
    """READING.md, row 41: experts 0.315 GB."""
    rows = by_dtype(COST, CHAT)
    assert rows[1].estimate.footprint.experts_bytes == pytest.approx(0.315e9, rel=0.01)
    assert rows[1].estimate.max_sequences > 1.9 * rows[0].estimate.max_sequences
    has_fp8 = REFERENCE.model_copy(update={"peak_tflops": {"fp16": 400.0, "fp8": 800.0}})
    faster = by_dtype(replace(COST, system=has_fp8), CHAT)[1]
    assert faster.estimate.ttft_s.value < 0.8 * rows[1].estimate.ttft_s.value


def test_experts_that_do_not_divide_say_so():
    rows = by_experts(COST, CHAT, [250, 16])
    assert [row.estimate for row in rows] == [None, None]
    assert "250 experts do not divide over 16 layers" in rows[0].reason


def test_more_workers_than_experts_are_said():
    (row,) = by_gpus(COST, CHAT, [128], choose=lambda cost, num: Deployment(4, 4, 8))
    assert "more than 64 GPUs has workers without an expert" in row.reason


def test_columns_are_plain_and_finite():
    rows = [row for rows in tables(COST, CHAT).values() for row in rows] + by_gpus(COST, CHAT, [33])
    for row in rows:
        for name, value in columns(row):
            assert value is None or isinstance(value, str) or math.isfinite(value), name
