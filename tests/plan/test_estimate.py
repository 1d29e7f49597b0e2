"""What is expected of a deployment: more hardware is never worse, more load never faster, and at its limits it is what
can be worked out by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serve_app.model.spec import ModelSpec
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, Estimate, Replica, estimate
from serve_app.plan.footprint import shard_heads
from serve_app.plan.ops import Step
from serve_app.plan.system import System
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import BETTER, FP16, R10B, R10B_TOP2, REFERENCE, SEED
from tests.plan.draws import deployments, specs, systems, workloads

LONG = Workload(Lengths.fixed(10_240), Lengths.fixed(128))
CHAT = Workload(Lengths.fixed(512), Lengths.fixed(256), concurrency=512)
# What the search for a load may be off by. Plain steps that get faster leave longer bubbles behind those with prompts.
CLOSE, CLOSE_WITH_BUBBLES = 1 + 1e-3, 1.06
quickly = settings(deadline=None, max_examples=40)


def of(deployment: Deployment, workload: Workload, spec: ModelSpec = R10B_TOP2, system: System = REFERENCE) -> Estimate:
    return estimate(Cost(spec, FP16, system, deployment), workload)


@st.composite
def costs(draw: st.DrawFn) -> Cost:
    spec, system = draw(specs()), draw(systems())
    return Cost(spec, FP16, system, draw(deployments(spec, system)))


# -- more is never worse --------------------------------------------------------------------------------------------


@quickly
@given(costs(), workloads)
def test_numbers_are_finite_and_agree_with_each_other(cost: Cost, workload: Workload) -> None:
    found = estimate(cost, workload)
    assume(found.fits)
    assert workload.concurrency is not None
    assert found.concurrency == pytest.approx(workload.concurrency, rel=1e-3)
    answering_s = (workload.osl.mean - 1) * found.tpot_s.value
    assert found.rate * (found.ttft_s.value + answering_s) == pytest.approx(workload.concurrency, rel=1e-3)
    assert 0 < found.busy <= 1
    assert found.ttft_p99_s.value >= found.ttft_s.value * (1 - 1e-9)
    # the mean chunk attends to less than the last one, of which `idle_ttft_s` knows
    assert found.ttft_s.value >= found.idle_ttft_s * 0.9 or workload.isl.mean != workload.isl.most
    assert found.capacity is not None
    assert found.capacity > 0


@quickly
@given(costs(), workloads, st.floats(1.1, 10), st.sampled_from(["memory_gb_s", "intra_gb_s", "inter_gb_s"]))
def test_faster_memory_and_links_never_lower_throughput_or_capacity(
    cost: Cost, workload: Workload, factor: float, field: str
) -> None:
    faster = cost.system.model_copy(update={field: getattr(cost.system, field) * factor})
    before, after = estimate(cost, workload), estimate(replace(cost, system=faster), workload)
    close = CLOSE if cost.deployment.pp == 1 else CLOSE_WITH_BUBBLES
    assume(before.fits)
    assert before.capacity is not None
    assert after.capacity is not None
    assert after.output_tokens_s * close >= before.output_tokens_s
    assert after.capacity * close >= before.capacity


@quickly
@given(costs(), workloads, st.integers(2, 4))
def test_more_cells_never_lower_throughput_and_raise_capacity_by_as_many(
    cost: Cost, workload: Workload, factor: int
) -> None:
    one_node = cost.system.model_copy(update={"gpus_per_node": 10_000})  # so that all have the same links
    bare = replace(cost, system=one_node, deployment=replace(cost.deployment, cells=1))
    before, after = (
        estimate(bare, workload),
        estimate(replace(bare, deployment=replace(bare.deployment, cells=factor)), workload),
    )
    assume(before.fits)
    assert before.capacity is not None
    assert after.capacity is not None
    assert after.capacity * CLOSE >= factor * before.capacity
    if cost.deployment.pp == 1:  # fewer sequences in each pipeline may leave it more bubbles
        assert after.output_tokens_s * CLOSE >= before.output_tokens_s


@pytest.mark.parametrize("deployment", [SEED, BETTER, Deployment(dp=8), Deployment(tp=2, pp=3)], ids=str)
def test_more_at_a_time_give_more_tokens_and_wait_longer(deployment: Deployment) -> None:
    found = [of(deployment, replace(CHAT, concurrency=num)) for num in (1, 4, 16, 64, 256, 700)]
    for name in ("rate", "busy", "output_tokens_s"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values), name
    for name in ("ttft_s", "ttft_p99_s", "tpot_s"):
        values = [getattr(one, name).value for one in found]
        assert values == pytest.approx(sorted(values), rel=1e-3), name


@pytest.mark.parametrize("deployment", [SEED, BETTER, Deployment(dp=8), Deployment(tp=8)], ids=str)
def test_longer_prompts_take_longer_to_their_first_token(deployment: Deployment) -> None:
    found = [
        of(deployment, replace(LONG, isl=Lengths.fixed(num))) for num in (1, 64, 1024, 8192, 8193, 16_384, 100_000)
    ]
    values = [one.ttft_s.value for one in found]
    assert values == sorted(values)
    idle = [one.idle_ttft_s for one in found]
    assert idle == pytest.approx(sorted(idle), rel=0.02)  # two chunks fill a pipeline sooner than one


def test_a_range_of_lengths_costs_more_than_its_mean_since_attention_grows_with_the_square() -> None:
    mean = replace(LONG, isl=Lengths.fixed(10_240))
    spread = replace(LONG, isl=Lengths.of([(240, 1), (20_240, 1)]))
    assert of(BETTER, spread).rate < of(BETTER, mean).rate
    assert of(BETTER, spread).ttft_p99_s.value > 1.3 * of(BETTER, mean).ttft_p99_s.value


def test_a_prefix_in_the_cache_saves_time() -> None:
    found = [of(BETTER, replace(LONG, prefix_share=share)) for share in (0.0, 0.5, 0.9)]
    for values in (
        [one.ttft_s.value for one in found],
        [1 / one.rate for one in found],
        [one.idle_ttft_s for one in found],
    ):
        assert values == sorted(values, reverse=True)


# -- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployment", [Deployment(), Deployment(tp=4), Deployment(pp=4), BETTER, SEED], ids=str)
def test_a_single_sequence_takes_the_time_of_its_prompt_and_of_its_steps(deployment: Deployment) -> None:
    """It waits for nobody, no prompt runs beside its answer, and it has the experts of its cell to itself."""
    one = Deployment(deployment.tp, deployment.pp, deployment.dp)
    found = of(one, replace(LONG, concurrency=1))
    cost = Cost(R10B_TOP2, FP16, REFERENCE, one)
    step_s = one.pp * cost.interval_s(Step.decode(1, LONG.mean_tokens), 1)
    assert found.ttft_s.value == pytest.approx(found.idle_ttft_s, rel=0.1)
    assert found.tpot_s.value == pytest.approx(step_s, rel=0.12)  # in the mean a peer has a row now and then
    assert 1 / found.rate == pytest.approx(found.idle_ttft_s + 127 * step_s, rel=0.12)


def test_answers_of_one_token_are_nothing_but_prompts() -> None:
    alone = of(Deployment(), Workload(Lengths.fixed(8192), Lengths.fixed(1), concurrency=1))
    cost = Cost(R10B_TOP2, FP16, REFERENCE, Deployment())
    assert 1 / alone.rate == pytest.approx(cost.prompt_s(8192, 8192), rel=0.01)
    many = of(Deployment(), Workload(Lengths.fixed(8192), Lengths.fixed(1), concurrency=16))
    assert many.rate == pytest.approx(alone.rate, rel=0.1)
    assert many.ttft_s.value == pytest.approx(16 / many.rate, rel=0.01)


def test_a_prompt_of_a_million_tokens_is_chunks_that_follow_each_other() -> None:
    big = REFERENCE.model_copy(update={"memory_gb": 10_000.0})
    found = of(SEED, Workload(Lengths.fixed(1_000_000), Lengths.fixed(2), concurrency=1), system=big)
    assert found.idle_ttft_s == pytest.approx(Cost(R10B_TOP2, FP16, big, SEED).prompt_s(1e6, 8192, num_peers=1))
    assert found.idle_ttft_s > 50 * of(SEED, LONG).idle_ttft_s


def test_short_prompts_share_steps_so_that_a_step_s_weights_are_read_for_all_of_them() -> None:
    """One prompt of 128 tokens in each step would be 64 times less than a step may have."""
    workload = Workload(Lengths.fixed(128), Lengths.fixed(2), concurrency=100_000)
    found = of(Deployment(), workload)
    cost = Cost(R10B_TOP2, FP16, REFERENCE, Deployment())
    one_by_one = 1 / cost.interval_s(Step.prompt(128))
    full = 64 / cost.interval_s(Step.prompt(128, sampled=1).times(64) + Step.decode(64, 129))
    assert one_by_one * 2 < found.rate < full * 1.001


def test_a_dense_model_gains_nothing_from_replicas_in_one_cell_and_all_from_cells() -> None:
    dense = replace(R10B, num_experts=1, top_k=1)
    one, together, apart = (
        of(d, replace(CHAT, concurrency=64), dense) for d in (Deployment(), Deployment(dp=4), Deployment(cells=4))
    )
    assert apart.rate > 1.5 * one.rate
    assert together.rate < 0.8 * apart.rate


def test_shards_beyond_the_kv_heads_hold_no_more_sequences() -> None:
    spec = replace(R10B_TOP2, num_heads=16, num_kv_heads=2)
    assert [shard_heads(spec, tp) for tp in (1, 2, 4, 8)] == [(16, 2), (8, 1), (4, 1), (2, 1)]
    assert shard_heads(R10B, 8) == (3, 3)  # 20 heads: the fullest shard has three, the first only two
    gained = of(Deployment(tp=8), LONG, spec).max_sequences / of(Deployment(tp=2), LONG, spec).max_sequences
    assert gained < 1.5  # from the weights only


# -- more than it can take ------------------------------------------------------------------------------------------


def test_beyond_its_capacity_it_is_overloaded_and_takes_what_it_can() -> None:
    capacity = of(BETTER, replace(LONG, concurrency=None, rate=1.0)).capacity
    assert capacity is not None
    below, above = (of(BETTER, replace(LONG, concurrency=None, rate=capacity * share)) for share in (0.9, 1.2))
    assert not below.is_overloaded
    assert below.rate == pytest.approx(capacity * 0.9, rel=1e-3)
    assert above.is_overloaded
    assert above.rate == pytest.approx(capacity, rel=0.01)


def test_sequences_without_a_place_wait_for_one() -> None:
    places = of(BETTER, LONG).max_sequences
    below, above = (of(BETTER, replace(LONG, concurrency=num)) for num in (places, 2 * places))
    assert not below.is_overloaded
    assert above.is_overloaded
    assert above.rate == pytest.approx(below.rate, rel=1e-3)
    assert above.ttft_s.value - below.ttft_s.value == pytest.approx(places / below.rate, rel=0.01)
    assert above.concurrency == pytest.approx(2 * places, rel=1e-3)


def test_a_model_that_does_not_fit_does_nothing() -> None:
    small = REFERENCE.model_copy(update={"memory_gb": 20.0})
    found = of(Deployment(), LONG, system=small)
    assert not found.fits
    assert found.is_overloaded
    assert (found.rate, found.capacity, found.max_sequences) == (0.0, None, 0)


@pytest.mark.parametrize("deployment", [SEED, BETTER], ids=str)
@pytest.mark.parametrize("objective", [Objective(ttft_s=0.5), Objective(tpot_ms=15), Objective(ttft_s=0.3, tpot_ms=20)])
def test_at_its_capacity_the_objective_is_just_kept(deployment: Deployment, objective: Objective) -> None:
    capacity = of(deployment, replace(LONG, objective=objective)).capacity
    assert capacity is not None
    just = of(deployment, replace(LONG, concurrency=None, rate=capacity, objective=objective))
    ttft_share = just.ttft_p99_s.value / (objective.ttft_s or math.inf)
    tpot_share = just.tpot_s.value * 1e3 / (objective.tpot_ms or math.inf)
    assert max(ttft_share, tpot_share) == pytest.approx(1.0, abs=2e-3)


def test_an_objective_that_not_even_an_idle_cell_keeps_leaves_no_capacity() -> None:
    assert of(BETTER, replace(LONG, objective=Objective(ttft_s=0.01))).capacity is None


def test_the_sequences_at_capacity_are_those_of_its_rate() -> None:
    found = of(BETTER, replace(LONG, objective=Objective(tpot_ms=15)))
    assert found.capacity is not None
    assert found.capacity_sequences is not None
    at_it = of(BETTER, replace(LONG, concurrency=None, rate=found.capacity))
    assert at_it.concurrency == pytest.approx(found.capacity_sequences, rel=5e-3)


# -- pipelines ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_cut_into_a_chunk_for_each_stage_as_the_scheduler_does() -> None:
    """Its first token comes after (2 PP - 1) / PP of one stage's work on the whole prompt, and not after PP."""
    cost = Cost(R10B_TOP2, FP16, REFERENCE, SEED)
    assert cost.num_chunks(8192, 8192) == 4
    assert cost.num_chunks(200, 8192) == 2  # of no fewer than 128 tokens
    assert replace(cost, deployment=BETTER).num_chunks(8192, 8192) == 1
    whole = replace(cost, ideal_pipeline=True).prompt_s(8192, 8192)
    assert cost.prompt_s(8192, 8192) == pytest.approx(whole * 7 / 16, rel=0.1)


@pytest.mark.parametrize(
    ("deployment", "rate", "tpot_ms"),
    [
        (Deployment(4, 1, 2, 4), 50, 3.68),
        (Deployment(4, 1, 2, 4), 70, 6.30),
        (Deployment(2, 2, 2, 4), 50, 5.89),
        (Deployment(2, 2, 2, 4), 70, 14.16),
        (Deployment(4, 4, 2), 50, 6.53),
        (Deployment(4, 4, 2), 70, 14.32),
        (Deployment(1, 4, 2, 4), 50, 7.89),
        (Deployment(1, 4, 2, 4), 70, 20.20),
        (Deployment(4, 8, 1), 50, 7.99),
        (Deployment(4, 8, 1), 70, 17.09),
    ],
    ids=str,
)
def test_stages_stand_idle_as_long_as_they_do_under_the_real_scheduler(
    deployment: Deployment, rate: float, tpot_ms: float
) -> None:
    """The engine in virtual time, with these costs of steps: `octavo simulate serve --model reference-10b --layout ...
    --system reference --precision fp16 --isl 10240 --osl 128 --rate ... --requests 1000 --no-admission --seed 0`,
    (median of the whole - median TTFT) / 127. Without bubbles a pipeline's are half of that."""
    workload = replace(LONG, concurrency=None, rate=rate)
    cost = Cost(R10B, FP16, REFERENCE, deployment)
    assert estimate(cost, workload).tpot_s.value * 1e3 == pytest.approx(tpot_ms, rel=0.2)
    ideal = estimate(replace(cost, ideal_pipeline=True), workload).tpot_s.value * 1e3
    assert ideal < 0.75 * tpot_ms or deployment.pp == 1


def test_as_the_peer_counts_a_pipeline_costs_a_few_percent_and_with_its_bubbles_a_sixth() -> None:
    """READING, A3: 294.9 against 286.5 output tokens/s of a GPU."""
    better, seed = (Cost(R10B_TOP2, FP16, REFERENCE, deployment) for deployment in (BETTER, SEED))
    ideal = replace(seed, ideal_pipeline=True)
    speeds = [estimate(cost, LONG).output_tokens_s_gpu for cost in (better, ideal, seed)]
    assert speeds[:2] == pytest.approx([294.9, 286.5], rel=0.02)
    assert 0.95 <= speeds[1] / speeds[0] <= 0.98
    assert 0.8 <= speeds[2] / speeds[0] <= 0.86


@pytest.mark.parametrize(
    ("deployment", "tokens_s_gpu"),
    [
        (BETTER, 294.9),
        (Deployment(dp=8, cells=4), 291.5),
        (Deployment(tp=4, cells=8), 266.9),
        (Deployment(tp=2, pp=2, dp=2, cells=4), 271.5),
        (Deployment(cells=32), 222.1),
    ],
    ids=str,
)
def test_throughputs_are_within_a_tenth_of_the_peer_s(deployment: Deployment, tokens_s_gpu: float) -> None:
    """READING, A3: its speed-of-light mode, 128 x 10,240 tokens. It counts neither queues nor bubbles."""
    cost = Cost(R10B_TOP2, FP16, REFERENCE, deployment, ideal_pipeline=True)
    assert estimate(cost, LONG).output_tokens_s_gpu == pytest.approx(tokens_s_gpu, rel=0.1)


# -- what the search for a load is worth ----------------------------------------------------------------------------


@quickly
@given(costs(), workloads)
def test_a_load_grows_in_all_that_the_search_for_it_relies_on(cost: Cost, workload: Workload) -> None:
    replica = Replica(cost, workload)
    most = workload.chunk_tokens / max(1.0, workload.isl.most)
    found = [replica.steady(most * share) for share in (1e-6, 1e-4, 0.01, 0.1, 0.3, 0.6, 0.9)]
    for values in (
        [replica.held(steady) for steady in found],
        [steady.rate for steady in found],
        [steady.busy for steady in found],
    ):
        assert all(after >= before * (1 - 1e-6) for before, after in pairwise(values)), values
