"""Coefficients that made the measurements are found again, with intervals that hold them; the rest is left alone."""

import math
import random
from dataclasses import replace

import pytest

from serve_app.engine.pace import Observed, Work, dot
from serve_app.model.spec import parse_config
from serve_app.plan.closed_loop import drift, pace_costs, refit, step_of, work_of_step
from serve_app.plan.compiled import formula
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.fit import Case, Observation, fit, interval_of, rounded, value_of
from serve_app.plan.ops import Step
from serve_app.plan.solve import inverse
from serve_app.plan.system import Efficiency, Interval, System

SPEC = parse_config(
    {
        "model_type": "mixtral",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 8192,
    }
)
BEFORE = System(
    name="test",
    source="made up",
    kind="cpu",
    peak_tflops={"bf16": 0.2},
    memory_gb=8,
    memory_gb_s=20,
    gpus_per_node=2,
    intra_gb_s=1,
    inter_gb_s=1,
    efficiency=Efficiency(collective_us=10.0, kv_block=128),
)
TRUTH = Efficiency(
    mfu=0.45,
    bandwidth=0.7,
    attention_mfu=0.1,
    attention_bandwidth=0.25,
    link=0.5,
    collective_us=400.0,
    layer_us=300.0,
    step_us=1500.0,
    row_us=150.0,
    expert_us=60.0,
    block_us=90.0,
    kv_block=128,
)
STEPS = [
    *(Step.prompt(tokens, start, sampled=1) for tokens in (48, 200, 512) for start in (0, 1500, 4000)),
    *(Step.decode(rows, context) for rows in (1, 3, 8, 32, 64) for context in (64, 2000)),
]
ALONE = Case(SPEC, Precision(), Deployment())
PP2 = Case(SPEC, Precision(), Deployment(pp=2))
DP2 = Case(SPEC, Precision(), Deployment(dp=2))


def true_system(**changes):
    return BEFORE.model_copy(update={"efficiency": TRUTH, "contention": {2: 1.3}} | changes)


def measured(cases, noise=0.0, seed=0, kinds=("interval", "alone")):
    draw, system = random.Random(seed), true_system()
    found = []
    for case in cases:
        cost = case.cost(system)
        for step in STEPS:
            for kind in kinds if case is ALONE else ("interval",):
                seconds = Observation(case, step, 1.0, kind).predicted_s(cost)
                found.append(Observation(case, step, seconds * math.exp(draw.gauss(0.0, noise)), kind))
    return found


def test_the_coefficients_that_made_the_steps_are_found_again():
    fitted = fit(BEFORE, measured([ALONE, PP2, DP2]))
    for name in (
        "mfu",
        "bandwidth",
        "attention_mfu",
        "layer_us",
        "step_us",
        "row_us",
        "expert_us",
        "block_us",
        "contention.2",
    ):
        assert value_of(fitted.system, name) == pytest.approx(value_of(true_system(), name), rel=0.05), name
    assert fitted.typical_error < 0.01
    assert all(0.9 < ratio < 1.1 for ratio in fitted.ratios)


def test_what_the_steps_do_not_tell_keeps_its_value_and_is_named():
    fitted = fit(BEFORE, measured([ALONE], kinds=("alone",)))
    assert {"link", "collective_us", "step_us"} <= set(fitted.undetermined)
    assert "mfu" not in fitted.undetermined
    assert "contention.2" not in [c.name for c in fitted.coefficients]
    eff = fitted.system.efficiency
    assert (eff.link, eff.collective_us, eff.step_us) == (1.0, 10.0, 0.0)
    assert fitted.system.contention == {}


def test_intervals_hold_the_truth_nine_times_of_ten():
    names = ("mfu", "bandwidth", "layer_us", "contention.2")
    inside = dict.fromkeys(names, 0)
    seeds = range(6)
    held = num = 0
    for seed in seeds:
        fitted = fit(BEFORE, measured([ALONE, PP2], 0.06, seed, kinds=("interval",)))
        for found in fitted.coefficients:
            if found.name in names:
                inside[found.name] += found.low <= value_of(true_system(), found.name) <= found.high
        for fresh in measured([ALONE, PP2], 0.06, seed + 1000, kinds=("interval",)):
            ratio = fresh.seconds / fresh.predicted_s(fresh.case.cost(fitted.system))
            interval = fitted.system.ttft_interval if fresh.step.prompt_tokens else fitted.system.tpot_interval
            held, num = held + (interval.low <= ratio <= interval.high), num + 1
    assert sum(inside.values()) >= 0.85 * len(names) * len(seeds), inside
    assert held >= 0.9 * num


def test_a_run_of_steps_is_the_sum_of_them():
    cost = PP2.cost(true_system())
    run = Observation(PP2, STEPS[0], 1.0, others=(STEPS[3], STEPS[-1]))
    assert run.predicted_s(cost) == pytest.approx(sum(cost.interval_s(step) for step in run.steps))
    assert run.has_prompt
    assert not Observation(PP2, STEPS[-1], 1.0).has_prompt


@pytest.mark.parametrize("deployment", [Deployment(), Deployment(tp=3), Deployment(pp=2), Deployment(tp=2, dp=2, pp=3)])
def test_the_short_formula_says_what_the_operations_say(deployment):
    bare = BEFORE.model_copy(update={"gpus_per_node": 12})
    for stage in Case(SPEC, Precision(), deployment).cost(bare).stages:
        for step in (*STEPS[:3], *STEPS[-3:], STEPS[1] + STEPS[-1]):
            found = formula(stage, step)
            for system in (true_system(gpus_per_node=12), bare):
                again = replace(stage, system=system)
                assert found.seconds(system) == pytest.approx(again.seconds(step), rel=1e-6)
                assert again.seconds(step) == pytest.approx(sum(op.seconds for op in again.ops(step)), rel=1e-6)


def test_a_few_stalls_move_nothing():
    clean, stalled = measured([ALONE, PP2], 0.02), measured([ALONE, PP2], 0.02)
    for i in range(0, len(stalled), 11):
        o = stalled[i]
        stalled[i] = Observation(o.case, o.step, o.seconds * 4, o.kind)
    before, after = fit(BEFORE, clean).system, fit(BEFORE, stalled).system
    for case in (ALONE, PP2):
        for step in STEPS:
            assert case.cost(after).interval_s(step) == pytest.approx(case.cost(before).interval_s(step), rel=0.1)


def test_few_samples_make_a_wider_interval_and_fewer_none():
    few, many = [0.9, 0.95, 1.0, 1.05, 1.1], [0.9, 0.95, 1.0, 1.05, 1.1] * 20
    narrow, wide = interval_of(many), interval_of(few)
    assert wide.low < narrow.low < 1 < narrow.high < wide.high
    assert interval_of([1.0, 1.1, 0.9]) is None


def test_a_file_holds_what_was_fitted():
    system = fit(BEFORE, measured([ALONE])).system
    again = System.model_validate(rounded(system).model_dump())
    assert again.efficiency.mfu == pytest.approx(system.efficiency.mfu, rel=1e-3)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_step_that_took_no_time_is_no_observation(seconds):
    with pytest.raises(ValueError, match="seconds"):
        fit(BEFORE, [Observation(ALONE, STEPS[0], seconds)])
    with pytest.raises(ValueError, match="observations"):
        fit(BEFORE, [])


def observed(slower=1.0, noise=0.03, num=60):
    draw, cost = random.Random(5), ALONE.cost(true_system())
    works = [Work(0, draw.randint(1, 32), draw.uniform(0.1, 20)) for _ in range(num)]
    works += [Work(draw.randint(100, 500), draw.randint(0, 8), draw.uniform(20, 200)) for _ in range(num // 4)]
    return [Observed(w, slower * cost.interval_s(step_of(w)) * math.exp(draw.gauss(0, noise))) for w in works]


def test_serving_mends_the_model_that_the_planner_has():
    system = true_system(ttft_interval=Interval(low=0.9, high=1.1), tpot_interval=Interval(low=0.9, high=1.1))
    assert drift(system, ALONE, observed()).holds
    seen = observed(slower=1.4)
    before = drift(system, ALONE, seen)
    assert (before.verdict, before.num) == ("slower", len(seen))
    assert before.ratio == pytest.approx(1.4, rel=0.05)
    after = drift(refit(system, ALONE, seen).system, ALONE, seen)
    assert after.holds
    assert after.ratio == pytest.approx(1.0, abs=0.05)
    assert drift(system, ALONE, observed(slower=0.5)).verdict == "faster"
    assert drift(system, ALONE, seen[:5]).verdict == "too few"


def test_the_doors_four_costs_are_those_of_the_cost_model():
    cost = ALONE.cost(true_system())
    costs = pace_costs(cost, max_context=2048)
    assert all(value >= 0 for value in costs)
    for step in (Step.decode(16, 256), Step.prompt(512, 256, sampled=1), Step.prompt(256, sampled=1)):
        assert dot(costs, work_of_step(step).row) == pytest.approx(cost.interval_s(step), rel=0.4)
    assert dot(costs, work_of_step(Step.prompt(512)).row) > 3 * dot(costs, work_of_step(Step.prompt(128)).row) / 2


def test_a_step_and_its_work_are_two_ways_to_say_the_same():
    for work in (Work(128, 0, 10.0), Work(0, 7, 2.0), Work(64, 3, 9.0), Work()):
        again = work_of_step(step_of(work))
        assert again.row == pytest.approx(work.row)


def test_an_inverse_is_one():
    matrix = [[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]]
    found = inverse(matrix)
    product = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*found, strict=True)] for row in matrix
    ]
    assert product == [pytest.approx(row) for row in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
