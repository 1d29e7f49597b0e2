"""What a config says is what the model is, in both dialects of transformers; the rest is refused."""

import json

import pytest
import transformers

from serve_app.errors import CheckpointError
from serve_app.model.spec import RopeSpec, parse_config, read_spec
from tests.model.families import GRANITE_SCALES, LONGROPE, PHI_LONGROPE, ROPES

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 24,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
OLMOE = {**LLAMA, "model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False}
QWEN2 = {
    **LLAMA,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
PHI = {**LLAMA, "model_type": "phimoe", "num_local_experts": 8, "num_experts_per_tok": 2}
GRANITE = {**LLAMA, "model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2}
CONFIGS = [LLAMA, MIXTRAL, QWEN, OLMOE, QWEN2, PHI, GRANITE]


def test_a_dense_model_is_one_ungated_expert():
    spec = parse_config(LLAMA)
    assert (spec.num_experts, spec.top_k, spec.expert_size, spec.head_dim) == (1, 1, 96, 16)
    assert spec.is_dense


def test_each_family_has_its_own_switches():
    assert parse_config(MIXTRAL).norm_topk
    assert parse_config(QWEN).qk_norm == "head"
    assert parse_config(QWEN).expert_size == 48
    assert parse_config(QWEN).head_dim == 24
    assert parse_config({**OLMOE, "clip_qkv": 8.0}).clip_qkv == 8.0
    assert parse_config(OLMOE).qk_norm == "full"
    assert not parse_config(OLMOE).norm_topk
    assert (parse_config(QWEN2).qkv_bias, parse_config(QWEN2).output_bias) == (True, False)
    assert parse_config(QWEN2).shared_size == 80
    assert parse_config({**PHI, "attention_bias": True}).output_bias
    assert (parse_config(PHI).norm, parse_config(PHI).mixer_jitter, parse_config(PHI).head_bias) == (
        "layer",
        0.01,
        False,
    )
    assert parse_config({**PHI, "router_jitter_noise": 0}).mixer_jitter == 0.0
    assert parse_config({**PHI, "lm_head_bias": True}).head_bias
    assert parse_config(GRANITE).norm_topk


def test_granite_scales_are_one_where_the_config_is_silent():
    given = parse_config({**GRANITE, **GRANITE_SCALES})
    assert (given.embedding_scale, given.score_scale, given.residual_scale, given.logits_divisor) == (12, 0.1, 0.22, 6)
    silent = parse_config(GRANITE)
    assert (silent.embedding_scale, silent.score_scale, silent.residual_scale, silent.logits_divisor) == (1, 1, 1, 1)
    assert parse_config(LLAMA).score_scale == 0.25


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
@pytest.mark.parametrize("rope", [None, *ROPES], ids=str)
def test_a_silent_config_means_what_transformers_takes_it_for(config, rope, tmp_path):
    """Write the config through transformers, which spells out its defaults: the spec stays the same."""
    if rope:
        of_phi = "longrope" if config is PHI and rope != "default" else None
        config = {**config, "rope_parameters": PHI_LONGROPE if of_phi else ROPES[rope]}
    short = {name: value for name, value in config.items() if name != "rms_norm_eps"}
    transformers.AutoConfig.for_model(**short).save_pretrained(tmp_path)
    assert parse_config(short) == parse_config(
        {**json.loads((tmp_path / "config.json").read_text()), "bos_token_id": None}
    )


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_rope_reads_the_same_from_both_versions(rope):
    params = dict(ROPES[rope])
    new = parse_config({**LLAMA, "rope_parameters": params})
    theta, kind = params.pop("rope_theta"), params.pop("rope_type")
    assert new.rope == RopeSpec(theta, kind, params)
    assert parse_config({**LLAMA, "rope_theta": theta, "rope_scaling": {"rope_type": kind, **params}}) == new
    assert parse_config({**LLAMA, "rope_theta": theta, "rope_scaling": {"type": kind, **params}}) == new


def test_yarn_without_a_factor_takes_the_ratio_of_lengths():
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": None, "original_max_position_embeddings": 128}
    assert parse_config({**LLAMA, "rope_parameters": rope}).rope.params["factor"] == 4.0


def test_longrope_caps_the_length_at_the_original_one():
    """Beyond it transformers turns every position by other angles, those before included."""
    spec = parse_config({**PHI, "rope_parameters": PHI_LONGROPE})
    assert spec.max_positions == 384
    assert spec.rope.params["short_factor"] == LONGROPE["short_factor"]
    assert spec.rope.params["attention_factor"] == 1.1
    assert "attention_factor" not in parse_config({**LLAMA, "rope_parameters": LONGROPE}).rope.params


@pytest.mark.parametrize("config", [LLAMA, PHI], ids=lambda config: config["model_type"])
def test_an_original_length_beside_the_rope_parameters_counts_as_in_transformers(config):
    config = {**config, "rope_parameters": dict(PHI_LONGROPE), "original_max_position_embeddings": 100}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    original = model.config.rope_parameters["original_max_position_embeddings"]
    assert parse_config(config).max_positions == original == (384 if config["model_type"] == "phimoe" else 100)


def test_a_sliding_window_caps_the_length():
    assert parse_config({**PHI, "sliding_window": 100}).max_positions == 100
    assert parse_config({**QWEN2, "sliding_window": 0, "use_sliding_window": False}).max_positions == 512
    assert parse_config({**MIXTRAL, "sliding_window": 100}).max_positions == 100
    assert parse_config({**MIXTRAL, "sliding_window": 4096}).max_positions == 512
    assert parse_config({**MIXTRAL, "sliding_window": None}).max_positions == 512
    assert parse_config({**QWEN, "sliding_window": 100, "use_sliding_window": False}).max_positions == 512


@pytest.mark.parametrize(
    ("config", "name", "value", "sentence"),
    [
        (LLAMA, "model_type", "gpt2", "model_type 'gpt2' is not supported"),
        (LLAMA, "model_type", None, "model_type None"),
        (LLAMA, "hidden_act", "gelu", "hidden_act 'gelu' is not supported; only 'silu' is"),
        (LLAMA, "mlp_bias", True, "mlp_bias True is not supported"),
        (QWEN, "decoder_sparse_step", 2, "decoder_sparse_step 2"),
        (QWEN, "mlp_only_layers", [0], r"mlp_only_layers \[0\]"),
        (LLAMA, "quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        (LLAMA, "vocab_size", 0, "vocab_size must be a positive integer, not 0"),
        (LLAMA, "vocab_size", None, "the config has no vocab_size"),
        (LLAMA, "hidden_size", "64", "hidden_size must be a positive integer, not '64'"),
        (LLAMA, "hidden_size", True, "hidden_size must be a positive integer"),
        (LLAMA, "hidden_size", 66, "hidden_size 66 is no multiple of num_attention_heads 4"),
        (LLAMA, "head_dim", 15, "head_dim must be even"),
        (LLAMA, "num_key_value_heads", 3, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        (MIXTRAL, "num_key_value_heads", None, "the config has no num_key_value_heads"),
        (MIXTRAL, "num_experts_per_tok", 9, "num_experts_per_tok is 9 but there are 8 experts"),
        (MIXTRAL, "num_local_experts", None, "the config has no num_local_experts"),
        (LLAMA, "rms_norm_eps", -1.0, "rms_norm_eps must be a positive number, not -1.0"),
        (LLAMA, "tie_word_embeddings", "no", "tie_word_embeddings must be true or false"),
        (LLAMA, "torch_dtype", "int8", "dtype 'int8' is not supported"),
        (LLAMA, "eos_token_id", "</s>", "eos_token_id must be an integer"),
        (LLAMA, "rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' .* depends on the length"),
        (LLAMA, "rope_scaling", {"rope_type": "longrope"}, "short_factor must be a list of 8 positive numbers"),
        (LLAMA, "rope_scaling", {**LONGROPE, "short_factor": [1.0] * 7}, "short_factor must be a list of 8 positive"),
        (LLAMA, "rope_scaling", {**LONGROPE, "short_factor": [0.0] * 8}, "short_factor must be a list of 8 positive"),
        (LLAMA, "rope_scaling", {"rope_type": "su"}, "rope_type 'su' is not supported"),
        (PHI, "rope_scaling", LONGROPE, "the config has no short_mscale"),
        (PHI, "rope_scaling", ROPES["yarn"], "rope_type 'yarn' is not supported for phimoe"),
        (LLAMA, "rope_scaling", {"rope_type": "linear"}, "the config has no factor"),
        (LLAMA, "rope_parameters", {"full_attention": {"rope_type": "default"}}, "one flat object"),
        (LLAMA, "partial_rotary_factor", 0.5, "partial_rotary_factor 0.5 is not supported"),
        (LLAMA, "rope_theta", "high", "rope_theta must be a positive number"),
        (QWEN2, "decoder_sparse_step", 2, "decoder_sparse_step 2"),
        (QWEN2, "mlp_only_layers", [1], r"mlp_only_layers \[1\]"),
        (QWEN2, "use_sliding_window", True, "use_sliding_window True is not supported"),
        (QWEN2, "layer_types", ["sliding_attention"] * 3, "layer_types .* is not supported; only 'full_attention' is"),
        (QWEN2, "shared_expert_intermediate_size", 0, "shared_expert_intermediate_size must be a positive integer"),
        (QWEN2, "qkv_bias", "yes", "qkv_bias must be true or false"),
        (PHI, "num_experts_per_tok", 3, "num_experts_per_tok 3 is not supported; only 2 is"),
        (PHI, "router_jitter_noise", -0.1, "router_jitter_noise must be a positive number"),
        (PHI, "hidden_act", "gelu", "hidden_act 'gelu' is not supported"),
        (GRANITE, "position_embedding_type", "nope", "position_embedding_type 'nope' is not supported; only 'rope' is"),
        (GRANITE, "logits_scaling", 0, "logits_scaling must be a positive number"),
        (GRANITE, "model_type", "granitemoeshared", "model_type 'granitemoeshared' is not supported"),
        (OLMOE, "clip_qkv", -1, "clip_qkv must be a positive number"),
    ],
)
def test_what_is_not_supported_is_named(config, name, value, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        parse_config({**config, name: value})


def test_end_tokens_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": [2, 9, 50_279]}))
    assert read_spec(tmp_path).eos_token_ids == (2, 9)  # no such token 50279 in a vocabulary of 512
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read_spec(tmp_path).eos_token_ids == (2, 9, 7)


def test_both_names_of_the_dtype_are_read():
    assert parse_config({**LLAMA, "dtype": "float16"}).dtype == "float16"
    assert parse_config({**LLAMA, "torch_dtype": "bfloat16"}).dtype == "bfloat16"
