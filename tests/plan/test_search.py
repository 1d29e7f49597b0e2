"""The best layout first, by what it does whole or after a loss; a reason for each that is not there."""

from dataclasses import dataclass, replace

import pytest

from serve_app.errors import PlanError
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, Estimate, estimate
from serve_app.plan.loss import Losses, losses
from serve_app.plan.search import SAME, Candidate, Found, Miss, Search, search
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import FP16, R10B, R10B_TOP2, REFERENCE, SEED

LONG = Workload(Lengths.fixed(10_240), Lengths.fixed(128))
# Where a cell of four wins as long as all are whole, and cells of two while one is being repaired: READING, B3.
SHORT = Workload(Lengths.fixed(512), Lengths.fixed(128), concurrency=4096, objective=Objective(tpot_ms=20))


def found(workload: Workload = LONG, num_gpus: int = 32, **options: object) -> Found:
    return search(R10B_TOP2, FP16, REFERENCE, workload, num_gpus, **options)  # type: ignore[arg-type]


def layout(candidate: Candidate | None) -> tuple[int, int, int, int]:
    """(cells, tp, pp, dp)"""
    assert candidate is not None
    deployment = candidate.deployment
    return deployment.cells, deployment.tp, deployment.pp, deployment.dp


def speed(candidate: Candidate) -> float:
    return candidate.estimate.output_tokens_s_gpu


# -- the best -------------------------------------------------------------------------------------------------------


def test_the_layout_that_the_reading_finds_better_is_first_of_all_on_32_gpus() -> None:
    """READING, A3: 4 x (TP4 DP2 EP8) on the hardware of the document, 128 x 10,240 tokens, two experts of a token."""
    whole = found()
    assert layout(whole.best) == (4, 4, 1, 2)
    assert whole.nearest is None
    seed = next(one for one in whole.candidates if layout(one) == (1, 4, 4, 2))
    assert speed(seed) < 0.95 * speed(whole.candidates[0])


def test_where_pipelines_are_ideal_as_the_peer_takes_them_the_document_s_layout_is_a_few_percent_behind() -> None:
    better, seed = (
        Search(R10B_TOP2, FP16, REFERENCE, LONG).candidate(deployment) for deployment in (Deployment(4, 1, 2, 4), SEED)
    )
    assert isinstance(better, Candidate)
    assert isinstance(seed, Candidate)
    ideal = replace(seed.cost, ideal_pipeline=True)
    assert 0.95 <= estimate(ideal, LONG).output_tokens_s_gpu / speed(better) <= 0.98


def test_no_other_is_faster_by_more_than_the_model_can_tell() -> None:
    whole = found()
    assert max(map(speed, whole.candidates)) <= speed(whole.candidates[0]) / (1 - SAME)


def test_of_those_that_are_as_fast_the_one_that_a_loss_stops_least_of_is_first() -> None:
    whole = found()
    best = max(map(speed, whole.candidates))
    band = [one for one in whole.candidates if speed(one) >= best * (1 - SAME)]
    assert len(band) > 1
    assert band == whole.candidates[: len(band)]
    keys = [(one.deployment.cell_gpus, one.estimate.ttft_s.value) for one in band]
    assert keys == sorted(keys)


def test_with_a_rate_it_is_by_what_can_be_taken() -> None:
    ranked = found(replace(LONG, concurrency=None, rate=20.0)).candidates
    capacities = [one.estimate.capacity or 0.0 for one in ranked]
    assert capacities == pytest.approx(sorted(capacities, reverse=True), rel=SAME)


def test_every_layout_is_there_or_refused() -> None:
    whole = found()
    names = [layout(one) for one in whole.candidates] + [
        (r.deployment.cells, r.deployment.tp, r.deployment.pp, r.deployment.dp) for r in whole.rejected
    ]
    assert len(names) == len(set(names)) == 56  # 32 = cells x tp x pp x dp


def test_the_same_question_has_the_same_answer() -> None:
    assert found() == found()


# -- Pareto ---------------------------------------------------------------------------------------------------------


def test_none_beats_one_of_the_front_in_everything_and_the_best_is_on_it() -> None:
    whole = found()

    def axes(one: Candidate) -> tuple[float, ...]:
        return (-speed(one), one.estimate.ttft_s.value, one.estimate.tpot_s.value, one.deployment.cell_gpus)

    for member in whole.pareto:
        assert not any(
            axes(other) != axes(member) and all(a <= b for a, b in zip(axes(other), axes(member), strict=True))
            for other in whole.candidates
        )
    assert whole.candidates[0] in [replace(one, losses=None) for one in whole.pareto]
    assert 1 < len(whole.pareto) < len(whole.candidates)


# -- what fits ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_what_takes_the_room() -> None:
    small = REFERENCE.model_copy(update={"memory_gb": 20.0})
    refused = search(R10B_TOP2, FP16, small, LONG, 8).rejected
    reason = next(r.reason for r in refused if r.deployment.cells == 8)
    assert reason == (
        "It does not fit: a GPU needs 28.3 GB of 18 GB; expert weights 20.1 GB, the process 4 GB, KV of one sequence"
        " 1.7 GB."
    )


def test_slots_that_only_a_loss_would_take_are_left_out_where_they_do_not_fit() -> None:
    """Two workers hold half of the experts each, and with room for a loss all of them."""
    small = REFERENCE.model_copy(update={"memory_gb": 26.0})
    whole = search(R10B_TOP2, FP16, small, replace(LONG, concurrency=4), 2)
    pair = next(one for one in whole.candidates if layout(one) == (1, 1, 1, 2))
    assert pair.deployment.standby == 0
    assert "no room for the 128 standby slots that the loss of a worker takes" in pair.notes
    asked = search(R10B_TOP2, FP16, small, replace(LONG, concurrency=4), 2, standby=128)
    assert (1, 1, 1, 2) not in map(layout, asked.candidates)


def test_where_nothing_fits_the_nearest_says_so() -> None:
    tiny = REFERENCE.model_copy(update={"memory_gb": 5.0})
    nothing = search(R10B_TOP2, FP16, tiny, LONG, 4)
    assert nothing.candidates == nothing.pareto == []
    assert nothing.best is None
    assert nothing.nearest is not None
    assert nothing.nearest.startswith("No layout fits")


def test_who_has_no_place_is_said() -> None:
    many = found(replace(LONG, concurrency=5000)).candidates[0]
    places = many.estimate.max_sequences
    assert f"room for {places:,} of 5,000 sequences, the others wait" in many.notes


# -- objectives -----------------------------------------------------------------------------------------------------


def test_those_that_miss_the_objective_come_last_the_nearest_of_them_first() -> None:
    ranked = found(replace(LONG, objective=Objective(ttft_s=0.4))).candidates
    kept = [not one.misses for one in ranked]
    assert 0 < sum(kept) < len(kept)
    assert kept == sorted(kept, reverse=True)
    missing = [one.worst_miss for one in ranked if one.misses]
    assert missing == sorted(missing)
    assert min(missing) > 1


def test_a_strict_objective_leaves_them_out_with_the_reason() -> None:
    objective = Objective(ttft_s=0.4)
    strict = found(replace(LONG, objective=objective), strict=True)
    assert all(one.estimate.ttft_p99_s.value <= 0.4 for one in strict.candidates)
    reasons = [refused.reason for refused in strict.rejected if "misses" in refused.reason]
    assert reasons
    assert all("It misses the objective: TTFT p99 0." in reason and "instead of 0.4 s" in reason for reason in reasons)
    assert all(not one.misses for one in strict.pareto)


def test_where_the_load_is_too_much_the_nearest_says_how_much_is_not_and_how_many_gpus_it_takes() -> None:
    asked = replace(LONG, concurrency=None, rate=500.0, objective=Objective(tpot_ms=15))
    nearest = found(asked).nearest
    assert nearest is not None
    assert nearest.startswith("No layout keeps the objective under this load: the nearest, ")
    num_gpus = int(nearest.split("takes about ")[1].split(" GPUs")[0].replace(",", ""))
    cell_gpus = 8
    enough = found(asked, num_gpus=-(-num_gpus // cell_gpus) * cell_gpus)
    assert enough.nearest is None
    assert found(asked, num_gpus=num_gpus // 2 // 8 * 8).nearest is not None


def test_where_no_load_is_little_enough_the_nearest_says_what_would_have_to_be_allowed() -> None:
    nearest = found(replace(LONG, objective=Objective(ttft_s=0.001))).nearest
    assert nearest is not None
    assert nearest.startswith("No layout keeps the objective at any load: the nearest, ")
    assert "TTFT p99" in nearest
    assert "instead of 0.001 s" in nearest


def test_more_tokens_of_prompts_than_a_gpu_computes_are_a_miss_of_all() -> None:
    """READING, A1: with two experts 57.2 tokens/ms of a GPU at 10,240 tokens, 100 are required."""
    ranked = found(replace(LONG, objective=Objective(prefill_tokens_ms=100))).candidates
    assert {str(miss) for one in ranked for miss in one.misses} == {
        "prefill 57.2 tokens/ms on a GPU instead of 100 tokens/ms on a GPU"
    }


def test_further_objectives_are_checked_too() -> None:
    def narrow(candidate: Candidate) -> list[Miss]:
        return [] if candidate.deployment.tp == 1 else [Miss("shards", candidate.deployment.tp, 1, "GPUs")]

    ranked = found(checks=(narrow,)).candidates
    assert ranked[0].deployment.tp == 1
    assert all(bool(one.misses) == (one.deployment.tp > 1) for one in ranked)


# -- after a loss: READING, B3 --------------------------------------------------------------------------------------


def test_the_winner_while_all_is_whole_is_not_the_winner_after_a_loss() -> None:
    healthy, worst = found(SHORT, losses=losses), found(SHORT, rank="worst")
    assert layout(healthy.best) == (8, 1, 1, 4)
    assert layout(worst.best) == (16, 1, 1, 2)
    of_eight = next(one for one in worst.candidates if layout(one) == (8, 1, 1, 4))
    assert healthy.best is not None
    assert worst.best is not None
    assert speed(worst.best) < 0.98 * speed(healthy.best)
    assert of_eight.worst_capacity == pytest.approx((of_eight.estimate.capacity or 0) * 7 / 8, rel=1e-6)
    assert worst.best.worst_capacity == pytest.approx((worst.best.estimate.capacity or 0) * 15 / 16, rel=1e-6)
    assert worst.best.worst_capacity > 1.05 * of_eight.worst_capacity


@dataclass
class Counted:
    """The real losses, and how often they were asked for."""

    num: int = 0

    def __call__(self, cost: Cost, workload: Workload, healthy: Estimate) -> Losses:
        self.num += 1
        return losses(cost, workload, healthy)


def test_the_first_places_after_a_loss_are_those_of_looking_at_all() -> None:
    some, every = Counted(), Counted()
    short = found(SHORT, rank="worst", losses=some, num_places=3)
    whole = found(SHORT, rank="worst", losses=every, num_places=1000)
    assert [layout(one) for one in short.candidates[:3]] == [layout(one) for one in whole.candidates[:3]]
    assert every.num == len(whole.candidates)
    assert some.num < every.num


def test_in_the_healthy_ranking_the_first_places_have_their_losses() -> None:
    ranked = found(losses=losses, num_places=4).candidates
    assert [one.worst_capacity is not None for one in ranked] == [True] * 4 + [False] * (len(ranked) - 4)


# -- what cannot be asked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": 0}, "the number of GPUs must be at least 1, not 0"),
        ({"num_gpus": 4, "spares": 4}, "4 GPUs allow no layout: 4 spares of each cell leave none for its seats"),
        (
            {"workload": replace(LONG, isl=Lengths.fixed(40_000))},
            "isl 40000 and osl 128 make 40128 tokens, more than the 32768 positions of the model",
        ),
    ],
    ids=str,
)
def test_what_no_layout_can_do_is_said_in_a_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        found(**options)  # type: ignore[arg-type]


def test_a_dtype_that_the_hardware_does_not_compute_in_is_named() -> None:
    with pytest.raises(PlanError, match="no peak_tflops for fp8"):
        search(R10B, Precision(compute="fp8"), REFERENCE, LONG, 8)


def test_spares_are_among_the_gpus() -> None:
    whole = found(num_gpus=27, spares=1)
    assert whole.candidates
    assert all(one.deployment.num_gpus == 27 and one.deployment.spares == 1 for one in whole.candidates)
