"""What a plan shows: the block of the reading of the founding document, JSON with a unit in each key, tables."""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from serve_app.errors import PlanError
from serve_app.plan.answer import Answer, answer
from serve_app.plan.asking import Options, ask
from serve_app.plan.show import words
from serve_app.plan.show.block import block
from serve_app.plan.show.figures import clean, figures
from serve_app.plan.show.paper import pareto_csv, to_json
from serve_app.plan.show.shown import Extras, shown

FOUNDING = Options(preset="reference-10b", system="reference")
# Giving up 3 % of the capacity buys 4 % after the loss of a GPU, as in the reading's block B3.
FLIP = Options(preset="reference-10b", system="reference", total_gpus=32, isl="2048", osl="128", rate=400.0)


@pytest.fixture(scope="module")
def founding() -> Answer:
    return answer(ask(FOUNDING))


@pytest.fixture(scope="module")
def told(founding: Answer) -> dict[str, Any]:
    """As a program reads it."""
    found: dict[str, Any] = json.loads(to_json(figures(founding)))
    return found


def close(value: float) -> object:
    """Within 2 %, as the issue asks."""
    return pytest.approx(value, rel=0.02)


# -- the block A3 ------------------------------------------------------------------------------------------------------


def test_the_model_is_told_as_the_reading_has_it(told: dict[str, Any]) -> None:
    model = told["model"]
    assert model["params_b"] == close(10.57)
    assert model["active_params_b"] == close(1.05)
    assert model["declared_error_percent"] == close(5.7)


def test_so_is_the_layout(told: dict[str, Any]) -> None:
    layout = told["layout"]
    assert [layout[key] for key in ("tp", "pp", "dp", "ep", "gpus")] == [4, 4, 2, 8, 32]
    assert (layout["experts_per_gpu"], layout["standby_slots_per_gpu"]) == (8, 2)


def test_so_is_the_memory(told: dict[str, Any]) -> None:
    memory = told["memory"]
    assert [memory[key] for key in ("total_gb", "of_gb", "weights_gb", "standby_gb", "kv_gb", "process_gb")] == [
        close(value) for value in (12.0, 64, 0.72, 0.16, 6.71, 4.0)
    ]
    assert memory["step_gb"] == pytest.approx(0.4, abs=0.05)  # the reading has one digit
    assert memory["max_sequences"] == close(997)


def test_so_are_prefill_and_decode(told: dict[str, Any]) -> None:
    bounds = told["bounds"]
    assert [row["prompt_tokens"] for row in bounds["prefill"]] == [128, 10_240, 20_480]
    assert [row["tokens_ms_gpu"] for row in bounds["prefill"]] == [close(114), close(82), close(64)]
    assert (bounds["required_prefill_tokens_ms_gpu"], bounds["required_holds_to_prompt_tokens"]) == (100, close(3_681))
    assert [row["tokens_ms_gpu"] for row in bounds["decode"][:2]] == [close(2.3), close(0.63)]
    assert [row["tpot_ms"] for row in bounds["decode"][:2]] == [close(1.7), close(6.3)]


def test_so_is_the_time_to_first_token_and_what_may_wait(told: dict[str, Any]) -> None:
    assert told["bounds"]["ttft_alone_ms"] == close(31)
    assert told["bounds"]["ttft_at_once_s"] == close(0.525)
    assert told["admission"]["bound_prompt_tokens_by_replicas"]["2"] == close(25e6)
    with_two = figures(answer(ask(Options(preset="reference-10b", system="reference", top_k=2))))
    assert with_two["bounds"]["ttft_alone_ms"] == close(45)


def test_so_is_the_loss_of_a_gpu_and_of_two(told: dict[str, Any]) -> None:
    by_kind = {state["kind"]: state for state in told["losses"]["states"]}
    one, two = by_kind["gpu"], by_kind["two of a replica"]
    assert (one["slots_needed_per_gpu"], one["slots_present_per_gpu"], one["fits_slots"]) == (10, 10, True)
    assert (two["slots_needed_per_gpu"], two["fits_slots"]) == (11, False)
    assert (one["stopped_gpus_at_once"], one["resting_gpus_after"]) == (32, 16)
    assert one["ttft_at_once_s"] == close(1.05)
    assert one["keeps_objective"]
    assert one["capacity_share_after"] == 0.5


def test_so_is_the_layout_that_is_better(told: dict[str, Any]) -> None:
    """The reading has +3 %, which is the peer's, and the peer has no bubbles in a pipeline: ours has more to gain. Its
    13.2 GB are less than the sum of its own parts (`test_reading`); ours has five standby slots beside."""
    better = told["better"]
    assert better["layout"]["text"] == "4 x (TP4 PP1 DP2 EP8)"
    assert 3 * 0.98 <= better["output_tokens_s_gain_percent"] < 25
    assert better["memory_gb"] == close(13.9 + 5 * 3 * 2560 * 5120 * 2 / 1e9)
    assert (better["stopped_gpus_at_once"], better["layout"]["gpus"]) == (8, 32)


def test_the_lines_at_the_terminal_say_the_same(founding: Answer) -> None:
    text = " ".join(line for _, line in block(founding))
    for said in (
        "10.57 B parameters (declared 10 B: +5.7 %), 1.05 B active (top-1 of 16)",
        "TP4 PP4 DP2 EP8: 32 GPUs; 8 experts + 2 free slots on each GPU",
        "weights 0.72, standby slots 0.16",
        "114 @128, 81.7 @10,240, 63.6 @20,480",
        "2.31 @128, 0.632 @10,240",
        "128 at once: 525 ms",
        "experts need 10 slots on each GPU left, 10 are there: they fit; 32 GPUs stand still until they have homes",
        "then 16 rest",
        "experts need 11 slots on each GPU left, 10 are there: they do not fit",
        "4 x (TP4 PP1 DP2 EP8)",
        "blast radius 8 GPUs (25 %)",
    ):
        assert said in text, said


def test_what_nobody_said_is_told(founding: Answer) -> None:
    text = " ".join(line for _, line in block(founding))
    assert "nobody said it: --isl 10240 --osl 128 --concurrency 128 --ttft 10 --layout tp4,pp4,dp2" in text


def test_of_hardware_that_was_not_measured_it_is_said_how_to_measure_it(founding: Answer, told: dict[str, Any]) -> None:
    assert not told["system"]["is_calibrated"]
    assert any("`octavo calibrate`" in line for _, line in block(founding))


# -- the ranking -------------------------------------------------------------------------------------------------------


def test_one_lost_gpu_turns_the_ranking_around() -> None:
    healthy, worst = (figures(answer(ask(options)))["ranking"] for options in (FLIP, _ranked_worst()))
    first, other = healthy["candidates"][0], healthy["first_by_other_ranking"]
    assert (first["layout"]["cells"], first["layout"]["ep"]) == (8, 4)
    assert (other["layout"]["cells"], other["layout"]["ep"]) == (16, 2)
    assert worst["candidates"][0]["layout"] == other["layout"]
    assert worst["first_by_other_ranking"]["layout"] == first["layout"]
    assert first["capacity_requests_s"] > 1.02 * other["capacity_requests_s"]
    assert other["worst_capacity_requests_s"] > 1.02 * first["worst_capacity_requests_s"]


def _ranked_worst() -> Options:
    return replace(FLIP, rank="worst")


def test_expert_groups_stay_within_a_node_unless_they_may_not() -> None:
    within = answer(ask(Options(preset="reference-10b", system="reference", total_gpus=32)))
    assert all(one.deployment.ep <= 8 for one in within.found.candidates)
    assert any("--across-nodes" in reason for reason in within.rejected_by_reason)
    across = answer(ask(Options(preset="reference-10b", system="reference", total_gpus=32, across_nodes=True)))
    assert any(one.deployment.ep == 16 for one in across.found.candidates)


def test_a_target_takes_the_fewest_gpus() -> None:
    found = answer(ask(Options(preset="qwen3-30b-a3b", system="h100", target_request_rate=20.0, ttft_s=2.0)))
    sizes = [one.deployment.num_gpus for one in found.found.candidates]
    assert sizes == sorted(sizes)
    assert found.deployment.num_gpus == sizes[0]
    assert found.first_by_other is None


# -- JSON and CSV ------------------------------------------------------------------------------------------------------

KEYS = {
    "": "format model system workload layout memory bounds expected misses losses recovery availability admission"
    " operations better ranking pareto rejected",
    "layout": "text tp pp dp ep cells gpus cell_gpus standby_slots_per_gpu spares_per_cell experts_per_gpu notes",
    "memory": "total_gb of_gb weights_gb experts_gb attention_gb vocabulary_gb standby_gb kv_gb step_gb process_gb"
    " max_sequences sequence_tokens",
    "expected": "sequences rate_requests_s output_tokens_s output_tokens_s_gpu prompt_tokens_s is_overloaded busy_share"
    " ttft_idle_ms ttft_ms ttft_p99_ms tpot_ms capacity_requests_s capacity_sequences",
    "availability": "kept_share paused_share degraded_share standing_share failure_every_h pause_s mtbf_h replace_h"
    " spares_per_cell spares_needed_per_cell",
    "ranking": "by candidates num_candidates nearest_miss first_by_other_ranking",
}


@pytest.mark.parametrize("section", KEYS)
def test_the_keys_of_the_json_stay(told: dict[str, Any], section: str) -> None:
    assert list(told[section] if section else told) == KEYS[section].split()


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Each with the key of the mapping that it is in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, path)
    elif isinstance(value, float):
        yield path, value


UNITS = {"s", "ms", "h", "gb", "b", "share", "percent", "gpu", "tflops", "gflop", "tokens", "sequences", "replicas"}
IN_ANOTHER_KEY = {".value", ".low", ".high", ".least", ".mean", ".most", ".first", ".last", ".burstiness"}


def test_a_number_that_is_not_whole_has_its_unit_in_its_key(told: dict[str, Any]) -> None:
    for path, _ in numbers(told):
        name = path.rsplit(".", 1)[-1]
        is_inside = any(path.endswith(end) for end in IN_ANOTHER_KEY) or "_by_replicas." in path
        assert is_inside or set(name.split("_")) & UNITS, path


def test_the_parts_of_the_memory_are_its_sum(told: dict[str, Any]) -> None:
    memory = told["memory"]
    parts = ("weights_gb", "standby_gb", "kv_gb", "step_gb", "process_gb")
    assert sum(memory[part] for part in parts) == pytest.approx(memory["total_gb"])


def test_shares_of_operations_sum_to_one_each_with_its_bound(told: dict[str, Any]) -> None:
    for ops in told["operations"].values():
        assert sum(op["share"] for op in ops) == pytest.approx(1)
        assert {op["bound"] for op in ops} <= {"compute", "memory", "link", "fixed"}
        assert len({op["bound"] for op in ops}) > 1


def test_the_same_question_is_the_same_json(founding: Answer) -> None:
    again = answer(ask(FOUNDING))
    assert to_json(figures(again)) == to_json(figures(founding))


def test_what_json_has_no_number_for_is_null() -> None:
    assert clean({"a": [math.inf, 1.0], "b": (math.nan,)}) == {"a": [None, 1.0], "b": [None]}


def test_the_pareto_csv_has_a_row_for_each_layout_of_the_front(founding: Answer) -> None:
    rows = list(csv.DictReader(io.StringIO(pareto_csv(founding))))
    assert [row["layout"] for row in rows] == [str(one.deployment) for one in founding.found.pareto]
    assert all(float(row["worst_capacity_requests_s"]) <= float(row["capacity_requests_s"]) for row in rows)


# -- what is shown on request ------------------------------------------------------------------------------------------


def printed(found: Answer, extras: Extras) -> str:
    console = Console(width=120, file=io.StringIO(), highlight=False)
    for part in shown(found, extras).parts():
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_that_can_be_asked_for_is_shown(founding: Answer) -> None:
    extras = Extras(kill=13, before="tp4,dp2,cells4", is_scaling=True)
    text = printed(founding, extras)
    for said in (
        "The loss of GPU 13",
        "stage 1, replica 1, shard 1",
        "Other numbers of GPUs",
        "compute again",
        "rejected",
    ):
        assert said in text, said
    found = shown(founding, extras).figures()
    assert set(found) - set(figures(founding)) == {"story", "transition", "scaling"}
    assert found["story"]["gpu"] == 13
    to_json(found)


def test_training_is_kept_apart(founding: Answer) -> None:
    text = printed(founding, Extras(is_training=True))
    assert "optimizer 4.34" in text
    assert "KV" not in text
    assert "training" not in figures(founding)


def test_scaling_keeps_expert_groups_within_a_node(founding: Answer) -> None:
    scaling = shown(founding, Extras(is_scaling=True)).scaling
    assert scaling is not None
    deployments = [row.deployment for row in scaling["GPUs"]]
    assert all(one is not None and one.ep <= 8 for one in deployments)
    assert [one.num_gpus for one in deployments if one is not None] == [8, 16, 32, 64, 128, 256, 512, 1024]


@pytest.mark.parametrize(
    ("said", "extras"),
    [
        ("--kill 32", Extras(kill=32)),
        ("--kill -1", Extras(kill=-1)),
        ("--from 'pp17'", Extras(before="pp17")),
        ("--from 'tp4,tp2' says tp twice", Extras(before="tp4,tp2")),
    ],
    ids=str,
)
def test_what_there_is_not_is_named(founding: Answer, said: str, extras: Extras) -> None:
    with pytest.raises(PlanError, match=said.replace("(", "\\(")):
        shown(founding, extras)


# -- words -------------------------------------------------------------------------------------------------------------


@given(st.floats(min_value=1e-9, max_value=1e15))
def test_digits_are_the_number_to_half_a_percent(value: float) -> None:
    assert float(words.digits(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0004, "0.4 ms"), (0.0987, "98.7 ms"), (0.9996, "1 s"), (59.94, "59.9 s"), (150, "2.5 min"), (14_400, "4 h")],
)
def test_a_duration_is_in_the_unit_that_is_read_at_a_glance(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_a_share_of_the_time_is_never_rounded_up_to_all_of_it() -> None:
    assert words.share_of_time(0.99999808) == "99.999808 %"
    assert words.share_of_time(1 - 1e-12) != "100 %"
    assert words.share_of_time(0.5) == "50.00 %"
