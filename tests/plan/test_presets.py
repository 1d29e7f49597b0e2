"""The shapes that come with the planner are those of the models that they are called after."""

import re
from typing import get_args

import pytest

from serve_app.model.spec import Family, ModelSpec
from serve_app.plan.counts import count_params
from serve_app.plan.inputs import list_models, read_model
from serve_app.plan.presets import Preset, find_preset

PRESETS = {preset.name: preset for preset in list_models()}

# What the safetensors headers of the published checkpoints add up to, as the hub shows it.
STORED_PARAMS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "olmoe-1b-7b": 6_919_161_856,
    "phi-3.5-moe": 41_873_153_344,
}


def of_all() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())


def test_a_dozen_known_models_of_every_moe_family_that_is_served_are_there():
    assert len([preset for preset in PRESETS.values() if preset.hub_id]) >= 12
    assert {preset.spec.family for preset in PRESETS.values()} == set(get_args(Family)) - {"llama"}  # which is dense


@of_all()
def test_the_counted_total_is_the_declared_one_within_3_percent(preset: Preset):
    assert count_params(preset.spec).total == pytest.approx(preset.total_b * 1e9, rel=0.03)


@of_all()
def test_the_declared_active_count_is_met_with_or_without_the_vocabulary(preset: Preset):
    """Publishers differ in whether embedding and head are active, and round."""
    params = count_params(preset.spec)
    assert params.active * 0.99 <= preset.active_b * 1e9 <= (params.active + params.embedding) * 1.02


@pytest.mark.parametrize("name", STORED_PARAMS)
def test_the_counted_total_is_that_of_the_published_checkpoint(name: str):
    """But for the norms of queries and keys, and a bias of the head, which the planner leaves out."""
    assert count_params(PRESETS[name].spec).total == pytest.approx(STORED_PARAMS[name], rel=2e-5)


@of_all()
def test_every_preset_says_where_its_shape_is_from_and_what_serves_it(preset: Preset):
    assert preset.source.count(" ") > 2
    assert preset.hub_id is None or preset.hub_id in preset.source
    assert preset.hub_id is None or preset.serve == preset.hub_id


def test_reference_small_is_row_one_of_the_reading():
    spec = read_model("reference-small")
    params = count_params(spec)
    assert (spec.hidden_size, spec.expert_size, spec.num_layers, spec.num_experts) == (512, 1024, 16, 16)
    figures = [params.total, params.experts, params.attention, params.embedding, params.active]
    assert [round(figure / 1e9, 3) for figure in figures] == [0.436, 0.403, 0.017, 0.016, 0.042]
    assert count_params(read_model("reference-small", top_k=2)).active / 1e9 == pytest.approx(0.067, abs=5e-4)


def test_reference_10b_is_the_model_that_ten_billion_needs():
    spec = read_model("reference-10b")
    params = count_params(spec)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.top_k) == (20, 20, 128, 1)
    assert params.total / 1e9 == pytest.approx(10.568, abs=5e-4)
    assert params.experts / 1e9 == pytest.approx(10.066, abs=5e-4)
    assert params.active / 1e9 == pytest.approx(1.0486, abs=5e-5)


@pytest.mark.parametrize("text", ["mixtral-8x7b", "MIXTRAL-8X7B", "mistralai/Mixtral-8x7B-v0.1"])
def test_a_preset_is_found_by_its_name_and_its_repository_in_any_case(text: str):
    found = find_preset(text)
    assert found is not None
    assert found.name == "mixtral-8x7b"


@pytest.mark.parametrize("text", ["", " ", "mixtral", "reference", "demo"])
def test_nothing_else_finds_a_preset(text: str):
    assert find_preset(text) is None


def test_names_are_lower_case_words_and_lead_to_one_preset_each():
    names = [*PRESETS, *(preset.hub_id.casefold() for preset in PRESETS.values() if preset.hub_id)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in PRESETS)


def test_what_differs_between_two_versions_is_how_far_they_reach():
    old, new = read_model("qwen3-30b-a3b"), read_model("qwen3-30b-a3b-2507")
    assert isinstance(old, ModelSpec)
    assert (old.max_positions, new.max_positions) == (40_960, 262_144)
    assert count_params(old) == count_params(new)
