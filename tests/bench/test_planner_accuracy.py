"""The parts of benchmarks/planner_accuracy.py that need no download. The sample here is made by hand."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import planner_accuracy, ranking, roofline, silicon
from benchmarks.ranking import Order

HEADER = (
    "id,silicon_data_source,backend,backend_version,model_path,system,mode,isl,osl,gemm_quant_mode,moe_quant_mode,"
    "batch_size,tp_size,pp_size,attention_dp_size,moe_tp_size,moe_ep_size,silicon_ttft_ms,silicon_tpot_ms"
)
SWEEP = "source_file=2026-04-06.csv; model=X; silicon_concurrency={}"
ELSEWHERE = "source_file=/somewhere/h100_sxm/X.csv; silicon_concurrency={}"


def line(
    model="Qwen/Qwen3-235B-A22B-FP8",
    *,
    backend="vllm",
    mode="agg",
    quantised="fp8",
    source=SWEEP,
    concurrency=16,
    batch=16,
    layout=(4, 1, 4, 1),
    ms=(200.0, 12.0),
):
    tp, dp, moe_tp, moe_ep = layout
    return (
        f"a,{source.format(concurrency)},{backend},1.0,{model},h100_sxm,{mode},1024,512,{quantised},{quantised},{batch},"
        f"{tp},1,{dp},{moe_tp},{moe_ep},{ms[0]},{ms[1]}"
    )


def read(*lines):
    return silicon.read_rows("\n".join([HEADER, *lines]))


def rows_of(
    backends=("vllm", "trtllm"), models=("meta-llama/Llama-3.1-70B", "Qwen/Qwen3-32B", "MiniMaxAI/MiniMax-M2.5")
):
    """Runs that are no harder to tell apart than real ones, of every model on every backend."""
    lines = [
        line(model, backend=backend, concurrency=num, batch=num, ms=(100.0 + 5 * num + i, 10.0 + num / 8 + i))
        for backend in backends
        for i, model in enumerate(models)
        for num in (4, 8, 16, 32)
    ]
    rows, left_out = read(*lines)
    assert not left_out
    return rows


# -- which rows -----------------------------------------------------------------------------------------------------


def test_a_row_becomes_a_question_to_the_planner():
    rows, left_out = read(line())
    (row,) = rows
    assert not left_out
    assert (row.model, row.system, row.tp, row.dp, row.concurrency) == ("Qwen3-235B-A22B", "h100", 4, 1, 16)
    assert (row.ttft_s, row.tpot_s) == (0.2, 0.012)
    assert str(row.deployment) == "TP4 PP1 DP1 EP4"
    assert row.workload.concurrency == 16
    assert row.precision.compute == "fp8"


def test_lengths_are_what_was_sent():
    """InferenceX draws them from 0.8 to 1.0 of the nominal ones; of other runs nothing is known."""
    (swept,), _ = read(line())
    (other,), _ = read(line(source=ELSEWHERE))
    assert swept.is_sweep
    assert not other.is_sweep
    assert (swept.workload.isl.mean, other.workload.isl.mean) == (922, 1024)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (line(mode="disagg"), "disaggregated"),
        (line("zhipuai/GLM-5"), "attention"),
        (line(layout=(8, 1, 4, 1)), "contradict"),
        (line(layout=(64, 1, 8, 8)), "squares"),
        (line(layout=(4, 4, 1, 16)), "squares"),
        (line(layout=(16, 1, 16, 1)), "tp above"),
        (line("meta-llama/Llama-3.1-70B", layout=(0, 1, 0, 0)), "is 0"),
    ],
)
def test_what_cannot_be_asked_is_counted_with_its_reason(written, why):
    rows, left_out = read(written, line())
    assert len(rows) == 1
    ((reason, num),) = left_out.items()
    assert why in reason
    assert num == 1


def test_a_measurement_counts_once():
    rows, left_out = read(line(), line(), line(ms=(201.0, 12.0)))
    assert len(rows) == 2
    assert left_out == {"the same measurement again": 1}


def test_experts_sizes_of_a_dense_model_do_not_matter():
    rows, _ = read(line("meta-llama/Llama-3.1-70B", layout=(2, "", 1, 1)))
    assert len(rows) == 1


def test_concurrency_is_that_of_all_replicas():
    """The batch is one replica's; where the source does not say how many sequences there were, that is multiplied."""
    (said,), _ = read(line(layout=(1, 8, 1, 8), concurrency=64, batch=8))
    (unsaid,), _ = read(line(layout=(1, 8, 1, 8), source="source_file=2026-04-06.csv; model=X", batch=8))
    assert said.concurrency == unsaid.concurrency == 64


def test_four_bits_are_widened_where_the_gpu_does_not_multiply_them():
    (row,), _ = read(line("openai/gpt-oss-120b", quantised="nvfp4"))
    assert (row.precision.weights, row.precision.experts, row.precision.compute) == ("bf16", "fp4", "bf16")
    assert replace(row, system="b200").precision.compute == "fp8"


# -- order ----------------------------------------------------------------------------------------------------------


def test_pairs_within_a_tenth_have_no_order():
    measured = [1.0, 1.09, 2.0]
    order = ranking.order_of([(0, 1), (0, 2), (1, 2)], measured, [3.0, 2.0, 1.0])
    assert order == Order(num_right=0, num_pairs=2)


def test_equal_predictions_are_no_order():
    assert ranking.order_of([(0, 1), (1, 0)], [1.0, 2.0], [5.0, 5.0]) == Order(0, 2)


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=12), st.floats(0.01, 100))
def test_a_prediction_that_is_off_by_a_factor_keeps_the_order(measured, factor):
    pairs = [(i, j) for i in range(len(measured)) for j in range(i)]
    order = ranking.order_of(pairs, measured, [factor * value for value in measured])
    assert order.num_right == order.num_pairs
    turned = ranking.order_of(pairs, measured, [1 / value for value in measured])
    assert turned == Order(0, order.num_pairs)


def test_pairs_are_of_one_group():
    groups = ranking.groups_of(["a", "b", "a", "c", "b", "a"], lambda letter: letter)
    assert groups == [[0, 2, 5], [1, 4]]
    orders = ranking.orders_in(groups, [1.0, 9.0, 2.0, 0.0, 1.0, 3.0], [1.0, 1.0, 2.0, 0.0, 2.0, 3.0])
    assert orders == [Order(3, 3), Order(0, 1)]
    assert sum(orders, Order()).share == 0.75


def test_random_pairs_are_the_same_for_the_same_seed_and_never_one_row_twice():
    groups = [[0, 2, 5], [1, 4]]
    pairs = ranking.random_pairs(groups, 200, seed=6)
    assert pairs == ranking.random_pairs(groups, 200, seed=6) != ranking.random_pairs(groups, 200, seed=7)
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in [(0, 2), (0, 5), (2, 5), (1, 4)]}


def test_the_spread_holds_the_share_and_is_none_for_equal_groups():
    low, high = ranking.spread_of([Order(9, 10), Order(6, 10), Order(10, 10)], seed=6)
    assert 0.6 <= low < 25 / 30 < high <= 1.0
    assert ranking.spread_of([Order(9, 10)] * 5, seed=6) == (0.9, 0.9)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_shares_of_what_was_measured():
    errors = ranking.errors_of([1.0, 1.0, 1.0, 1.0, 1.0], [0.5, 0.9, 1.0, 1.1, 3.0])
    assert errors.num == 5
    assert errors.mean == pytest.approx((0.5 + 0.1 + 0 + 0.1 + 2) / 5)
    assert errors.median == pytest.approx(0.1)
    assert errors.signed == 0


def test_nine_of_ten_measurements_lie_in_the_interval():
    """It is of measured over predicted, as `system.Interval` has it."""
    predicted = [1.0 + i / 100 for i in range(201)]
    errors = ranking.errors_of([2.0] * 201, predicted)
    inside = [errors.low <= 2.0 / one <= errors.high for one in predicted]
    assert sum(inside) == pytest.approx(0.9 * 201, abs=1)


# -- cross validation -----------------------------------------------------------------------------------------------


def test_no_row_of_the_model_is_fitted_to():
    rows = rows_of()
    seen = []
    for fold in roofline.folds(rows):
        seen += fold.own
        assert {(row.backend, row.model) for row in fold.own} == {(fold.backend, fold.model)}
        assert fold.model not in {row.model for row in fold.same_engine + fold.other_engines}
        assert {row.backend for row in fold.same_engine} == {fold.backend}
        assert fold.backend not in {row.backend for row in fold.other_engines}
    assert sorted(map(str, seen)) == sorted(map(str, rows))


def test_what_is_said_of_a_row_does_not_depend_on_it():
    """The left-out model's measurements ten times as long: the predictions are the same to the bit."""
    rows = rows_of(backends=("vllm", "sglang"))
    left_out = rows[0].model
    slower = [
        replace(row, ttft_s=10 * row.ttft_s, tpot_s=10 * row.tpot_s) if row.model == left_out else row for row in rows
    ]

    def said(of):
        fold = next(fold for fold in roofline.folds(of) if fold.model == left_out)
        return [one.said for one in planner_accuracy.tell(fold, every=2)]

    assert said(rows) == said(slower)


def test_each_model_has_as_many_rows_in_a_fit_and_those_that_waited_for_room_none():
    rows = rows_of(backends=("vllm",))
    rows += [replace(rows[0], concurrency=num) for num in range(100, 200)]
    waited = replace(rows[0], ttft_s=1000.0)
    chosen = roofline.balanced([*rows, waited], num=9, seed=6)
    assert set(silicon.count_by(chosen, "model").values()) == {3}
    assert waited not in roofline.balanced([*rows, waited], num=10_000, seed=6)


# -- fit ------------------------------------------------------------------------------------------------------------


def test_steps_in_arrays_take_what_the_cost_model_says():
    """The fit's arithmetic is the planner's, whatever the coefficients."""
    rows, _ = read(
        line(),
        line("meta-llama/Llama-3.1-70B", layout=(8, 1, 1, 1)),
        line("deepseek-ai/DeepSeek-R1", layout=(1, 8, 1, 8)),
        line("openai/gpt-oss-120b", quantised="nvfp4", layout=(2, 1, 2, 1)),
    )
    values = [math.log(prior.value) for prior in roofline.PRIORS.values()] + [0.1, -0.1, 0.2]
    at = roofline.Runs(rows)._at(values)
    steps = [roofline.Runs._steps(row, 12.0)[1] for row in rows]
    found = roofline._tabled([roofline._probes(row) for row in rows], steps, rows).seconds(at)
    for row, step, seconds in zip(rows, steps, found, strict=True):
        engine = roofline.engine_of(row, roofline.coefficients_of(values, row.is_blackwell))
        system = row.hardware.model_copy(update={"efficiency": engine})
        assert seconds == pytest.approx(roofline.cost_of(row, system).interval_s(step), rel=1e-9)


def test_a_fit_finds_what_the_measurements_were_made_with():
    """Runs that the cost model made itself, with coefficients far from the first guess: predicted within 10 %."""
    true = roofline.coefficients_of([math.log(prior.value) for prior in roofline.PRIORS.values()] + [0.0] * 3)
    true |= {"bandwidth": 0.45, "layer_us": 40.0, "first_steps": 4.0}
    made = []
    for row in rows_of(backends=("vllm",)):
        said = roofline.predicted(row, true)
        made.append(replace(row, ttft_s=said.ttft_s, tpot_s=said.tpot_s))
    found = roofline.coefficients_of(roofline.fit(made))
    guessed = roofline.coefficients_of([math.log(prior.value) for prior in roofline.PRIORS.values()] + [0.0] * 3)
    assert max(abs(roofline.predicted(row, guessed).tpot_s / row.tpot_s - 1) for row in made) > 0.2
    for row in made:
        said = roofline.predicted(row, found)
        assert said.tpot_s == pytest.approx(row.tpot_s, rel=0.1)
        assert said.ttft_s == pytest.approx(row.ttft_s, rel=0.1)


def test_nothing_to_fit_to_is_an_error():
    with pytest.raises(ValueError, match="nothing to fit"):
        roofline.fit([])


def test_a_model_that_does_not_fit_is_said_not_to():
    (row,), _ = read(line("meta-llama/Llama-3.1-70B", quantised="", layout=(1, 1, 1, 1)))
    assert not roofline.as_shipped(row).fits
    assert not roofline.predicted(row, {name: prior.value for name, prior in roofline.PRIORS.items()}).fits
