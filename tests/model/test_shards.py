"""Heads and vocabulary cut over shards: the same function, whatever the cut."""

import random
from dataclasses import replace

import pytest
import torch

from serve_app.model.cpu import cpu_has_bf16
from serve_app.model.random_weights import random_checkpoint
from tests.model.driver import Driver
from tests.model.test_bitwise import MOE, SPECS

NINE_HEADS = SPECS["olmoe-nine-heads"]  # cut unevenly, with a norm across all of them
ALL = {name: spec for name, spec in SPECS.items() if spec.num_heads > 1} | {
    "clipped": replace(NINE_HEADS, clip_qkv=0.5),
    "tied": replace(MOE, tie_embeddings=True),
}


def steps_of(driver, seed, vocab_size):
    """Logits of steps that mix chunks and single tokens, some of them shorter than there are shards."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(length)] for length in (1, 40, 3, 150, 17)]
    sequences = [driver.begin(len(prompt)) for prompt in prompts]
    rows = []
    while any(sequence.num_computed < len(prompt) for sequence, prompt in zip(sequences, prompts, strict=True)):
        parts = []
        for sequence, prompt in zip(sequences, prompts, strict=True):
            chunk = prompt[sequence.num_computed : sequence.num_computed + draw.choice((0, 1, 1, 60))]
            if chunk:
                parts.append((sequence, chunk))
        if parts:
            rows.append(driver.step(parts))
    return torch.cat(rows)


@pytest.mark.parametrize("num_shards", [2, 3, 4])
@pytest.mark.parametrize("name", ALL)
def test_in_fp32_any_number_of_shards_gives_the_logits_of_one(name, num_shards):
    spec = ALL[name]
    weights = random_checkpoint(spec, seed=3)
    expected = steps_of(Driver(weights), 1, spec.vocab_size)
    ours = steps_of(Driver(weights, num_shards=num_shards), 1, spec.vocab_size)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not cpu_has_bf16(), reason="the promise is for CPUs that multiply bf16 natively")
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe-nine-heads", "dense-bias", "new"])
def test_in_bf16_the_same_shards_give_the_same_bits_alone_and_in_a_batch(name):
    spec = ALL[name]
    weights = random_checkpoint(spec, seed=4)
    driver = Driver(weights, dtype=torch.bfloat16, num_shards=3)
    draw = random.Random(5)
    prompts = [[draw.randrange(spec.vocab_size) for _ in range(draw.randrange(1, 200))] for _ in range(12)]
    together = driver.step([(driver.begin(len(prompt)), prompt) for prompt in prompts])
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, driver.rows(prompt, [len(prompt)])[-1])
        if len(prompt) > 1:  # its last token decoded
            assert torch.equal(row, driver.rows(prompt, [len(prompt) - 1, 1])[-1])


@pytest.mark.skipif(not cpu_has_bf16(), reason="the promise is for CPUs that multiply bf16 natively")
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_shards"), [(8, 2, 2), (8, 2, 4), (4, 2, 3), (4, 4, 4), (4, 4, 2)]
)
@pytest.mark.parametrize("head_dim", [2, 8, 16, 32])
def test_small_heads_decode_to_the_same_bits_alone_and_in_a_batch(num_heads, num_kv_heads, num_shards, head_dim):
    spec = replace(MOE, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    driver = Driver(random_checkpoint(spec, seed=8), dtype=torch.bfloat16, num_shards=num_shards)
    draw = random.Random(9)
    prompts = [[draw.randrange(spec.vocab_size) for _ in range(draw.randrange(100, 300))] for _ in range(12)]
    sequences = [driver.begin(len(prompt)) for prompt in prompts]
    driver.step([(sequence, prompt[:-8]) for sequence, prompt in zip(sequences, prompts, strict=True)])
    for place in range(-8, 0):
        pairs = list(zip(sequences, prompts, strict=True))
        together = driver.step([(sequence, [prompt[place]]) for sequence, prompt in pairs])
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, driver.rows(prompt, [len(prompt) - 8] + [1] * 8)[-1])


def test_an_error_of_one_shard_ends_the_step_of_all_and_the_next_one_runs():
    driver = Driver(random_checkpoint(MOE, seed=6), num_shards=3)
    sequence = driver.begin(4)

    def fail(shard):
        if shard == 1:
            raise KeyError("the test ended it")
        driver.group.shards[shard].exchange([torch.zeros(1)] * 3, [(1,)] * 3)

    with pytest.raises(KeyError, match="the test ended it"):
        driver.group.run(fail)
    assert driver.step([(sequence, [1, 2, 3])]).shape == (1, MOE.vocab_size)
