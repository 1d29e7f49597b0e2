"""How far the logits of four shards are from those of one, on the reference model."""

import random

import pytest
import torch

from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.checkpoint import Checkpoint
from tests.model.driver import Driver

pytestmark = pytest.mark.slow

LENGTHS = (3, 40, 129, 200)


def logits_of(weights, dtype, num_shards):
    draw = random.Random(2)
    prompts = [[draw.randrange(weights.spec.vocab_size) for _ in range(length)] for length in LENGTHS]
    driver = Driver(weights, dtype=dtype, num_shards=num_shards)
    return torch.stack([driver.rows(prompt, [len(prompt) - 2, 1, 1])[-1] for prompt in prompts])


@pytest.fixture(scope="module")
def weights():
    return Checkpoint.open(resolve("reference", silent, fetch=True))


@pytest.fixture(scope="module")
def exact(weights):
    return logits_of(weights, torch.float32, 1)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_in_fp32_shards_move_the_logits_by_rounding_only(weights, exact, num_shards):
    apart = (logits_of(weights, torch.float32, num_shards) - exact).abs()
    print(f"\n{num_shards} shards in fp32: {apart.max():.1e} apart at most, logits up to {exact.abs().max():.1f}")
    assert apart.max() <= 1e-4


def test_in_bf16_shards_are_no_farther_from_fp32_than_one_process_is(weights, exact):
    """They are not within 1e-2 of each other, nor is any of them of fp32: near ties at the gate fall otherwise."""
    of_one = logits_of(weights, torch.bfloat16, 1)
    one = (of_one - exact).abs().mean()
    for num_shards in (2, 4):
        of_many = logits_of(weights, torch.bfloat16, num_shards)
        many = (of_many - exact).abs().mean()
        between = (of_many - of_one).abs().mean()
        print(f"\nmean distance from fp32: one shard {one:.3f}, {num_shards} {many:.3f}; between them {between:.3f}")
        assert many <= 1.25 * one
