"""The demo model in our own code: upcycled equals dense, and the bits hold on real weights."""

import random
from dataclasses import replace

import pytest
import torch

from serve_app.model.checkpoint import Checkpoint
from serve_app.model.cpu import cpu_has_bf16
from tests.model.driver import Driver

NUM_LAYERS = 6  # of 30: what differs, differs in the first


class Cut:
    """The first layers of a checkpoint; `dense` sees expert 0, of which the others are copies, as the only one."""

    def __init__(self, whole, dense=False):
        self._whole = whole
        self.spec = replace(whole.spec, num_layers=NUM_LAYERS)
        if dense:
            self.spec = replace(self.spec, family="llama", num_experts=1, top_k=1)

    def tensor(self, name):
        return self._whole.tensor(name)


@pytest.fixture(scope="module")
def demo(demo_folder):
    return Checkpoint.open(demo_folder)


def prompt_of(seed, num_tokens, vocab_size):
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(num_tokens)]


def test_upcycled_logits_equal_the_dense_model_s(demo):
    tokens = prompt_of(41, 150, demo.spec.vocab_size)
    chunks = [1, 60, 88, 1]
    upcycled = Driver(Cut(demo)).rows(tokens, chunks)
    dense = Driver(Cut(demo, dense=True)).rows(tokens, chunks)
    torch.testing.assert_close(upcycled, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not cpu_has_bf16(), reason="the promise is for CPUs that multiply bf16 natively")
def test_real_weights_give_a_row_the_same_bits_however_it_is_computed(demo):
    seed = 42
    dice = random.Random(seed)
    driver = Driver(demo, dtype=torch.bfloat16, num_pages=300, seed=seed)  # all layers: one bit in a million counts
    prompts = [prompt_of(i, dice.randrange(2, 200), demo.spec.vocab_size) for i in range(16)]
    sequences = [driver.begin(len(tokens)) for tokens in prompts]
    driver.step([(sequence, tokens[:-1]) for sequence, tokens in zip(sequences, prompts, strict=True)])
    decoded = driver.step([(sequence, tokens[-1:]) for sequence, tokens in zip(sequences, prompts, strict=True)])
    for sequence in sequences:
        driver.end(sequence)
    alone = torch.stack([driver.rows(tokens, [len(tokens)])[0] for tokens in prompts])
    assert torch.equal(decoded, alone), f"seed {seed}: rows {(decoded != alone).any(-1).nonzero().flatten().tolist()}"
