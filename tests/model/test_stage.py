"""The model step against transformers on the same tiny random checkpoints, in fp32."""

import random

import pytest
import torch

from serve_app.model.checkpoint import Checkpoint
from serve_app.model.layers import Linear
from serve_app.model.stage import _sharpen
from tests.model.driver import Driver
from tests.model.families import VARIANTS, make_tiny

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request, tmp_path_factory):
    """(transformers model, our weights) of one variant."""
    family, overrides = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = make_tiny(family, folder, **overrides)
    return model, Checkpoint.open(folder)


def tokens_of(seed, num_tokens, vocab_size=512):
    draw = random.Random(seed)
    return [draw.randrange(3, vocab_size) for _ in range(num_tokens)]


@torch.no_grad()
def oracle(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


def test_a_prefill_gives_the_logits_of_transformers(tiny):
    model, weights = tiny
    tokens = tokens_of(1, 300)
    expected = oracle(model, tokens)
    driver = Driver(weights)
    for length in (1, 2, 15, 16, 17, 127, 128, 129, 300):
        ours = driver.rows(tokens[:length], [length])[0]
        torch.testing.assert_close(ours, expected[length - 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunks", [(7,) * 20, (1, 33, 5, 64, 37), (129, 1, 10), (65, 66, 9)])
def test_odd_chunks_give_the_same_logits(tiny, chunks):
    model, weights = tiny
    tokens = tokens_of(2, sum(chunks))
    ends = torch.tensor(chunks).cumsum(0) - 1
    ours = Driver(weights).rows(tokens, chunks)
    torch.testing.assert_close(ours, oracle(model, tokens)[ends], atol=TOLERANCE, rtol=0)


def test_decode_steps_give_the_logits_of_a_prefill(tiny):
    model, weights = tiny
    tokens = tokens_of(3, 150)
    ours = Driver(weights).rows(tokens, [110] + [1] * 40)
    torch.testing.assert_close(ours, oracle(model, tokens)[109:], atol=TOLERANCE, rtol=0)


def test_chunks_and_decodes_of_many_sequences_share_a_step(tiny):
    model, weights = tiny
    driver = Driver(weights, num_stages=2)
    prompts = [tokens_of(seed, length) for seed, length in enumerate((140, 3, 70, 129, 260, 18))]
    expected = [oracle(model, tokens) for tokens in prompts]
    sequences = [driver.begin(len(tokens)) for tokens in prompts]
    dice = random.Random(4)
    while any(sequence.num_computed < len(tokens) for sequence, tokens in zip(sequences, prompts, strict=True)):
        parts, rows = [], []
        for sequence, tokens, row_of in zip(sequences, prompts, expected, strict=True):
            size = dice.choice((0, 1, 1, 13, 40, 130))
            if chunk := tokens[sequence.num_computed : sequence.num_computed + size]:
                parts.append((sequence, chunk))
                rows.append(row_of[sequence.num_computed + len(chunk) - 1])
        if parts:
            torch.testing.assert_close(driver.step(parts), torch.stack(rows), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_shards", [2, 3])
def test_shards_give_the_logits_of_transformers(tiny, num_shards):
    model, weights = tiny
    chunks = (1, 70, 1, 1, 60)
    tokens = tokens_of(7, sum(chunks))
    ends = torch.tensor(chunks).cumsum(0) - 1
    ours = Driver(weights, num_shards=num_shards, num_stages=2).rows(tokens, chunks)
    torch.testing.assert_close(ours, oracle(model, tokens)[ends], atol=TOLERANCE, rtol=0)


def test_64_greedy_tokens_are_those_of_transformers(tiny):
    model, weights = tiny
    tokens = tokens_of(5, 90)
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    expected = model.generate(torch.tensor([tokens]), **options)
    driver = Driver(weights)
    sequence = driver.begin(160)
    ours = [int(driver.step([(sequence, tokens)])[0].argmax())]
    while len(ours) < 64:
        ours.append(int(driver.step([(sequence, ours[-1:])])[0].argmax()))
    assert ours == expected[0, 90:].tolist()


def test_a_heads_bias_counts_where_first_places_are_tied():
    """Logits near 25 are 0.125 apart in bf16: the choice between them is made in fp32, with the bias in it."""
    generator = torch.Generator().manual_seed(8)
    weight = (torch.randn(2000, 64, generator=generator) * 0.1).bfloat16()
    bias = (torch.randn(2000, generator=generator) * 0.2 + 25).bfloat16()
    x = torch.randn(400, 64, generator=generator).bfloat16()
    rounded = Linear(weight, bias, torch.bfloat16, torch.device("cpu"))(x)
    exact = x.float() @ weight.float().T + bias.float()
    assert (rounded.argmax(-1) != exact.argmax(-1)).sum() > 20
    assert torch.equal(_sharpen(rounded, x, weight, bias).argmax(-1), exact.argmax(-1))


def test_running_a_step_again_changes_nothing(tiny):
    _, weights = tiny
    driver = Driver(weights)
    tokens = tokens_of(6, 50)
    sequence = driver.begin(50)
    driver.step([(sequence, tokens[:37])])
    first = driver.step([(sequence, tokens[37:])])
    sequence.num_computed = 37
    assert torch.equal(driver.step([(sequence, tokens[37:])]), first)


def test_a_page_size_that_does_not_divide_the_block_is_refused(tiny):
    with pytest.raises(ValueError, match="page_tokens must divide 128, not be 48"):
        Driver(tiny[1], page_tokens=48)
