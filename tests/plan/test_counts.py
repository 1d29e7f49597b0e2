"""Parameters and bytes are those of the tensors that a model of that shape has."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.model.files import expected_tensors
from serve_app.model.spec import ModelSpec, parse_config
from serve_app.plan.counts import DTYPE_BYTES, Precision, attention_params, count_params, expert_params, kv_token_bytes
from serve_app.plan.inputs import read_model

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "phimoe", "granitemoe", "llama"]


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small ones of every family."""
    family = draw(st.sampled_from(FAMILIES))
    num_kv_heads = draw(st.integers(1, 4))
    num_experts = draw(st.integers(2, 9))
    config = {
        "model_type": family,
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_attention_heads": num_kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": num_kv_heads,
        "head_dim": 2 * draw(st.integers(1, 8)),
        "num_experts": num_experts,
        "num_experts_per_tok": 2 if family == "phimoe" else draw(st.integers(1, num_experts)),
        "intermediate_size": draw(st.integers(1, 50)),
        "moe_intermediate_size": draw(st.integers(1, 50)),
        "shared_expert_intermediate_size": draw(st.integers(1, 50)),
        "max_position_embeddings": 64,
        "attention_bias": draw(st.booleans()),
        "lm_head_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return parse_config(config)


def left_out(spec: ModelSpec) -> int:
    """What `count_params` does not count: the norms of queries and keys, and the head's bias."""
    heads = 2 if spec.qk_norm == "head" else spec.num_heads + spec.num_kv_heads if spec.qk_norm == "full" else 0
    return spec.num_layers * heads * spec.head_dim + (spec.vocab_size if spec.head_bias else 0)


@given(spec=specs())
def test_the_total_is_that_of_the_tensors_that_a_checkpoint_must_have(spec: ModelSpec):
    held = sum(math.prod(tensor.shape) for tensor in expected_tensors(spec).values())
    assert count_params(spec).total + left_out(spec) == held


@given(spec=specs())
def test_each_part_is_that_of_its_tensors(spec: ModelSpec):
    sizes = {name: math.prod(tensor.shape) for name, tensor in expected_tensors(spec).items()}
    params = count_params(spec)
    assert params.experts == sum(size for name, size in sizes.items() if ".experts." in name)
    assert params.gates == sum(
        size for name, size in sizes.items() if name.endswith(".gate") and "ts." not in name
    ) - sum(size for name, size in sizes.items() if name.endswith("shared.gate"))
    assert params.shared == sum(size for name, size in sizes.items() if ".shared" in name)
    assert params.embedding == sizes["embed"] + sizes.get("head", 0)


@given(spec=specs())
def test_a_token_goes_through_top_k_experts_and_all_else_in_the_layers(spec: ModelSpec):
    params = count_params(spec)
    assert params.active_experts * spec.num_experts == params.experts * spec.top_k
    assert params.active <= params.total
    more = replace(spec, top_k=spec.num_experts)
    assert count_params(more).active == params.experts + params.attention + params.shared


def test_the_parts_of_the_ten_billion_reference_are_those_of_the_reading():
    spec = read_model("reference-10b")
    assert expert_params(spec) == 3 * 2560 * 5120
    assert attention_params(spec) == 4 * 2560 * 2560
    assert 8 * expert_params(spec) * 2 == pytest.approx(0.629e9, rel=1e-3)  # bytes of the experts of one GPU
    assert kv_token_bytes(spec, Precision()) == 160 * 1024
    assert kv_token_bytes(read_model("reference-small"), Precision()) == 32 * 1024
    assert 2 * kv_token_bytes(spec, Precision(kv="fp8")) == kv_token_bytes(spec, Precision())


def test_a_dense_model_has_no_gate():
    spec = parse_config(
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "max_position_embeddings": 8192,
        }
    )
    params = count_params(spec)
    assert params.gates == 0
    assert params.total == 8_030_261_248  # Llama 3 8B, as its checkpoint has it


@pytest.mark.parametrize("name", ["weights", "experts", "kv", "compute"])
def test_an_unknown_dtype_is_refused_by_its_class(name: str):
    with pytest.raises(ValueError, match=f"{name} = 'fp12'"):
        Precision(**{name: "fp12"})


@given(weights=st.sampled_from(sorted(DTYPE_BYTES)), compute=st.sampled_from(sorted(DTYPE_BYTES)))
def test_hidden_vectors_are_never_below_16_bits(weights: str, compute: str):
    precision = Precision(weights=weights, compute=compute)
    assert precision.weight_bytes == DTYPE_BYTES[weights]
    assert precision.activation_bytes == (4 if compute == "fp32" else 2)


def test_four_bits_carry_the_scales_of_their_groups():
    assert DTYPE_BYTES["int4"] == 0.5 + 2 / 32
