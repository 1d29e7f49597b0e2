"""How far it reaches: many experts, stages of uneven depth, many sequences at once, and long prompts. All tiny."""

import random
from dataclasses import replace

import pytest

from serve_app.config import OctavoConfig
from serve_app.engine.request import Request, SamplingParams
from serve_app.model.random_weights import random_checkpoint
from serve_app.model.spec import ModelSpec, RopeSpec
from serve_app.runtime.local import LocalEngine
from tests.runtime.cell import ThreadedCell, collect_local

TINY = ModelSpec(
    family="qwen3_moe",
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    num_experts=4,
    top_k=2,
    expert_size=32,
    norm_topk=True,
    max_positions=32_768,
    norm_eps=1e-6,
    rope=RopeSpec(),
    tie_embeddings=True,
    qk_norm="head",
    dtype="float32",
)


def config_of(pp, dp, kv_gib=0.01, **scheduler):
    return OctavoConfig.model_validate(
        {
            "model": "random",
            "dtype": "bfloat16",
            "layout": {"pp": pp, "dp": dp},
            "worker": {"kv_gib": kv_gib},
            "scheduler": {"max_context_tokens": 512} | scheduler,
        }
    )


def requests_of(num, num_prompt_tokens, num_new_tokens):
    draw = random.Random(num)
    sampling = SamplingParams(max_new_tokens=num_new_tokens, temperature=0.0, ignore_eos=True)
    prompts = [[draw.randrange(TINY.vocab_size) for _ in range(num_prompt_tokens)] for _ in range(num)]
    return [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(prompts)]


def generate(weights, config, requests):
    """What a cell emits, once it has been seen that it ends with all pages free."""
    with ThreadedCell(weights, config) as cell:
        for request in requests:
            cell.submit(request)
        outcome = cell.collect(len(requests))
        assert cell.idle_stats().kv_usage == 0
        cell.core.check_integrity()
        return outcome


def alone(weights, config, requests):
    return collect_local(LocalEngine.load(weights, config), requests)


def test_512_experts_over_four_workers_give_the_tokens_of_one_process():
    weights = random_checkpoint(replace(TINY, num_layers=16, num_experts=32))
    requests = requests_of(8, 24, 16)
    assert generate(weights, config_of(2, 2), requests) == alone(weights, config_of(1, 1), requests)


@pytest.mark.parametrize("stage_layers", [None, [1, 14, 8, 7]])
def test_30_layers_over_four_stages_give_the_tokens_of_one_process(stage_layers):
    weights = random_checkpoint(replace(TINY, num_layers=30))
    requests = requests_of(6, 40, 12)
    config = config_of(4, 1)
    cut = config.model_copy(update={"layout": config.layout.model_copy(update={"stage_layers": stage_layers})})
    assert generate(weights, cut, requests) == alone(weights, config_of(1, 1), requests)


def test_256_sequences_at_once_give_the_tokens_of_one_process():
    weights = random_checkpoint(TINY)
    requests = requests_of(256, 32, 16)
    config = config_of(2, 2, max_running=128)
    assert generate(weights, config, requests) == alone(weights, config_of(1, 1, max_running=256), requests)


def test_a_prompt_of_20480_tokens_gives_the_token_of_one_process():
    weights = random_checkpoint(TINY)
    requests = requests_of(1, 20_480, 4)
    limits = {"max_context_tokens": 20_484, "max_step_tokens": 2048}
    config = config_of(2, 2, kv_gib=0.02, **limits)
    outcome = generate(weights, config, requests)
    assert outcome == alone(weights, config_of(1, 1, kv_gib=0.02, **limits), requests)
