"""In bf16 on CPU the bits of a row depend on its tokens only: not on batch, chunking, pages or threads."""

import random
from dataclasses import replace

import pytest
import torch

from serve_app.model.cpu import cpu_has_bf16
from serve_app.model.layers import Linear, padded_rows
from serve_app.model.moe import ExpertHost
from serve_app.model.random_weights import random_checkpoint
from serve_app.model.spec import ModelSpec, RopeSpec
from tests.model.driver import CPU, Driver

pytestmark = pytest.mark.skipif(not cpu_has_bf16(), reason="the promise is for CPUs that multiply bf16 natively")

NUM_PROMPTS = 200
BATCH = 32

MOE = ModelSpec(
    family="qwen3_moe",
    vocab_size=1000,
    hidden_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    num_experts=8,
    top_k=2,
    expert_size=96,
    norm_topk=True,
    max_positions=1024,
    norm_eps=1e-6,
    rope=RopeSpec(),
    tie_embeddings=False,
    qk_norm="head",
)
SPECS = {
    "qwen3_moe": MOE,
    "one-head": replace(MOE, num_heads=1, num_kv_heads=1, num_experts=5, top_k=3, hidden_size=200),
    "olmoe-nine-heads": replace(MOE, family="olmoe", num_heads=9, num_kv_heads=3, qk_norm="full", norm_topk=False),
    "dense-bias": replace(MOE, family="llama", num_experts=1, top_k=1, qk_norm="none", qkv_bias=True, output_bias=True),
    # all that the families after the first four brought, in one model of no family
    "new": replace(
        MOE,
        family="qwen2_moe",
        hidden_size=200,
        qk_norm="none",
        qkv_bias=True,
        output_bias=True,
        head_bias=True,
        norm="layer",
        mixer_jitter=0.3,
        shared_size=80,
        attention_scale=0.1,
        embedding_scale=12.0,
        residual_scale=0.22,
        logits_divisor=6.0,
    ),
}


@pytest.fixture(params=(1, 2), ids=("1 thread", "2 threads"))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SPECS)
def weights(request):
    return random_checkpoint(SPECS[request.param], seed=7)


def prompts_of(seed, num_prompts, vocab_size, longest=280):
    dice = random.Random(seed)
    return [[dice.randrange(vocab_size) for _ in range(dice.randrange(2, longest))] for _ in range(num_prompts)]


def alone(driver, prompts):
    """Logits after each prompt, each a prefill of its own."""
    return [driver.rows(tokens, [len(tokens)])[0] for tokens in prompts]


def interleaved(driver, prompts, dice):
    """The same rows, but `BATCH` sequences at a time in steps that mix chunks of any size with single tokens."""
    rows = []
    for begin in range(0, len(prompts), BATCH):
        group = prompts[begin : begin + BATCH]
        rows.extend(_one_group(driver, group, dice))
    return rows


def _one_group(driver, group, dice):
    sequences = [driver.begin(len(tokens)) for tokens in group]
    rows = [None] * len(group)
    while any(row is None for row in rows):
        parts = []
        for index, (sequence, tokens) in enumerate(zip(sequences, group, strict=True)):
            left = len(tokens) - sequence.num_computed
            size = 1 if left <= 2 else min(left - 1, dice.choice((0, 1, 5, 33, 64, 150)))
            if left and size:
                parts.append((index, tokens[sequence.num_computed : sequence.num_computed + size]))
        if not parts:
            continue
        logits = driver.step([(sequences[index], chunk) for index, chunk in parts])
        for row, (index, _) in zip(logits, parts, strict=True):
            if sequences[index].num_computed == len(group[index]):
                rows[index] = row
    for sequence in sequences:
        driver.end(sequence)
    return rows


def assert_same_bits(expected, found, seed):
    different = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if not torch.equal(a, b)]
    assert not different, f"seed {seed}: rows of prompts {different} differ"


def test_200_prompts_alone_and_as_decode_steps_in_a_mixed_batch(weights):
    seed = 11
    prompts = prompts_of(seed, NUM_PROMPTS, weights.spec.vocab_size)
    driver = Driver(weights, dtype=torch.bfloat16, num_pages=1024, seed=seed)
    torch.set_num_threads(1)
    expected = alone(driver, prompts)
    torch.set_num_threads(2)
    found = interleaved(driver, prompts, random.Random(seed))
    torch.set_num_threads(1)
    assert_same_bits(expected, found, seed)


def test_every_row_of_a_prefill_is_that_of_a_decode_step(weights, threads):
    seed = 12
    [tokens] = prompts_of(seed, 1, weights.spec.vocab_size)
    tokens = (tokens * 200)[:200]
    driver = Driver(weights, dtype=torch.bfloat16, seed=seed)
    decoded = driver.rows(tokens, [1] * len(tokens))
    for length in range(2, len(tokens) + 1, 3):
        chunk = driver.rows(tokens[:length], [length])[0]
        assert torch.equal(chunk, decoded[length - 1]), f"seed {seed}: the row after {length} tokens differs"


def test_neighbours_do_not_matter(weights, threads):
    seed = 13
    prompts = prompts_of(seed, BATCH, weights.spec.vocab_size)
    driver = Driver(weights, dtype=torch.bfloat16, num_pages=1024, seed=seed)
    sequences = [driver.begin(len(tokens)) for tokens in prompts]
    together = driver.step(list(zip(sequences, prompts, strict=True)))
    assert_same_bits(alone(driver, prompts), together, seed)


def test_expert_batches_of_any_size_give_a_row_the_same_bits(threads):
    seed = 14
    weights = random_checkpoint(MOE, seed)
    host = ExpertHost(MOE, torch.bfloat16, CPU)
    for expert in range(8):
        host.load(weights, 0, expert)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, MOE.hidden_size, generator=generator).bfloat16()
    expected = {expert: torch.cat([host.forward(0, row[None], [expert], [1]) for row in x]) for expert in (0, 3, 7)}
    dice = random.Random(seed)
    for _ in range(60):
        counts = [dice.randrange(1, 100) for _ in range(3)]
        rows = [torch.tensor(dice.sample(range(300), count)) for count in counts]
        y = host.forward(0, x[torch.cat(rows)], [0, 3, 7], counts)
        want = torch.cat([expected[expert][own] for expert, own in zip((0, 3, 7), rows, strict=True)])
        assert torch.equal(y, want), f"seed {seed}, counts {counts}"


@pytest.mark.parametrize("num_inputs", [64, 576, 1024, 1025, 1536, 2048, 4096])
def test_a_linear_gives_a_row_the_same_bits_at_every_number_of_rows(num_inputs, threads):
    """1,536 is where a matrix of one row was once summed in another order than any other."""
    seed = num_inputs
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for num_outputs in (8, 576, 2048):
        weight = torch.randn(num_outputs, num_inputs, generator=generator) * 0.05
        linear = Linear(weight, None, torch.bfloat16, torch.device("cpu"))
        x_TI = torch.randn(256, num_inputs, generator=generator).bfloat16()
        expected = linear(x_TI)
        for num_rows in [1] * 40 + [2, 3, 5, 8, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 255]:
            begin = dice.randrange(256 - num_rows + 1)
            found = linear(x_TI[begin : begin + num_rows].contiguous())
            same = torch.equal(found, expected[begin : begin + num_rows])
            assert same, f"seed {seed}: {num_outputs} outputs, rows [{begin}, {begin + num_rows})"


def assert_mapped_as_packed(seed, hidden_size, expert_size, numbers_of_rows):
    spec = replace(MOE, hidden_size=hidden_size, expert_size=expert_size)
    weights = random_checkpoint(spec, seed)
    packed, mapped = (ExpertHost(spec, torch.bfloat16, CPU) for _ in range(2))
    packed.load(weights, 0, 0)
    mapped.map(weights, 0, 0)
    x_ND = torch.randn(400, hidden_size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for num_rows in numbers_of_rows:
        rows = x_ND[400 - num_rows :]
        same = torch.equal(mapped.forward(0, rows, [0], [num_rows]), packed.forward(0, rows, [0], [num_rows]))
        assert same, f"seed {seed}: D={hidden_size}, F={expert_size}, {num_rows} rows"


@pytest.mark.parametrize(
    ("hidden_size", "expert_size"),
    [(192, 96), (64, 48), (64, 96), (99, 28), (512, 1024), (576, 1536), (1536, 64), (2048, 768)],
)
def test_a_mapped_expert_gives_a_row_the_same_bits_as_a_packed_one(hidden_size, expert_size, threads):
    """(99, 28) is where `F.linear` once made other bits of a single row, and 1,536 inputs where a single row did."""
    assert_mapped_as_packed(hidden_size, hidden_size, expert_size, range(1, 131))


def test_mapped_experts_of_any_size_give_a_row_the_same_bits_as_packed_ones(threads):
    dice = random.Random(15)
    for seed in range(40):
        hidden_size = dice.choice([dice.randrange(1, 40), dice.randrange(1, 300), dice.randrange(1025, 2500)])
        expert_size = dice.choice([dice.randrange(1, 40), dice.randrange(1, 300)])
        rows = [1, 2, 3, 16, 17, *dice.sample(range(4, 131), 5), dice.randrange(131, 400)]
        assert_mapped_as_packed(seed, hidden_size, expert_size, rows)


def test_products_come_in_few_sizes():
    """Each costs a kernel of 1.3 MB, for as long as the process lives."""
    for num_inputs in (512, 2048):
        sizes = {padded_rows(num_rows, num_inputs) for num_rows in range(1, 4097)}
        assert len(sizes) < 60
        assert all(padded_rows(n, num_inputs) >= n for n in range(1, 4097))
