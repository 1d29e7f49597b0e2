"""Biases and penalties against a plain reference that goes token by token, and the likeliest against a sort."""

import math
import random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.plan import Sample, Shaping
from serve_app.model.grammar import Grammars
from serve_app.model.sampling import sample
from serve_app.model.shaping import shape_logits

VOCAB = 300
GREEDY = Sample(0.0, 0, 1.0, 0.0, 0, 0, False)
PLAIN = Shaping(0.0, 0.0, 1.0, (), None, (), [], [])
NONE = Grammars.without_tokenizer()


def how(base=GREEDY, shaping=None, **changes):
    return msgspec.structs.replace(base, shaping=shaping, **changes)


def reference(logits, shaping):
    """As the documents of OpenAI, HF and vLLM tell it, one token after another."""
    x = [np.float32(value) for value in logits.tolist()]
    for token, bias in shaping.logit_bias:
        x[token] += np.float32(bias)
    for token in sorted({*shaping.prompt, *shaping.emitted}):
        if shaping.repetition_penalty != 1:
            penalty = np.float32(shaping.repetition_penalty)
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in sorted({*shaping.emitted}):
        count = shaping.emitted.count(token)
        x[token] -= np.float32(count * shaping.frequency_penalty + shaping.presence_penalty)
    return x


def random_logits(num_rows, seed, vocab=VOCAB):
    return (3 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))).bfloat16()


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
SHAPINGS = st.builds(
    Shaping,
    st.sampled_from([0.0, 0.3, -1.5, 2.0]),
    st.sampled_from([0.0, 0.7, -2.0]),
    st.sampled_from([1.0, 1.3, 0.5, 2.0]),
    st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=8).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
    st.none(),
    st.just(()),
    TOKENS,
    TOKENS,
)


@given(st.lists(st.none() | SHAPINGS, min_size=1, max_size=5), st.integers(0, 1000))
def test_logits_are_those_of_the_reference(shapings, seed):
    logits = random_logits(len(shapings), seed)
    before = logits.clone()
    shaped = shape_logits(logits, [how(shaping=shaping) for shaping in shapings], NONE)
    assert torch.equal(logits, before), "the model's own logits are needed for log-probabilities"
    for row, shaping in enumerate(shapings):
        expected = logits[row].float().tolist() if shaping is None else reference(logits[row].float(), shaping)
        assert shaped[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_fp32_logits_are_not_changed_in_place():
    logits = random_logits(2, 5).float()
    before = logits.clone()
    shape_logits(logits, [how(shaping=msgspec.structs.replace(PLAIN, logit_bias=((1, 5.0),)))] * 2, NONE)
    assert torch.equal(logits, before)


def test_without_shaping_the_logits_are_the_very_same_tensor():
    logits = random_logits(3, 1)
    assert shape_logits(logits, [how()] * 3, NONE) is logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_shaped_row_changes_no_bit_of_the_others(dtype):
    seed = 31
    dice = random.Random(seed)
    logits = random_logits(24, seed, 3000).to(dtype)
    base = Sample(0.9, 40, 0.95, 0.0, 0, 0, True)
    plain = [how(base, seed=row, top_logprobs=row % 3) for row in range(24)]
    alone = sample(logits, plain)
    shaped = list(plain)
    for row in range(0, 24, 3):
        emitted = [dice.randrange(3000) for _ in range(50)]
        shaping = Shaping(0.5, 0.5, 1.2, ((7, 3.0),), None, (), emitted[:9], emitted)
        shaped[row] = msgspec.structs.replace(plain[row], shaping=shaping)
    mixed = sample(logits, shaped)
    for row in range(24):
        if row % 3:
            for before, after in zip(alone, mixed, strict=True):
                assert before[row] == after[row], f"seed {seed}, row {row}"
        single = sample(logits[row : row + 1], [shaped[row]])
        assert (single.tokens, single.logprobs) == ([mixed.tokens[row]], [mixed.logprobs[row]]), f"seed {seed}"


def test_a_bias_of_100_decides_and_log_probabilities_stay_the_model_s():
    logits = random_logits(1, 2)
    shaping = msgspec.structs.replace(PLAIN, logit_bias=((5, 100.0),))
    chosen = sample(logits, [how(shaping=shaping, logprob=True)])
    assert chosen.tokens == [5]
    assert chosen.logprobs[0] == pytest.approx(float(logits[0].float().log_softmax(-1)[5]), abs=1e-5)


def test_penalties_make_a_greedy_answer_move_on():
    logits = torch.zeros(1, 10)
    logits[0, :4] = torch.tensor([4.0, 3.5, 3.0, 2.9])
    emitted = []
    for _ in range(6):
        shaping = msgspec.structs.replace(PLAIN, frequency_penalty=0.8, emitted=list(emitted))
        emitted += sample(logits, [how(shaping=shaping)]).tokens
    assert emitted == [0, 1, 0, 2, 3, 1]


@pytest.mark.parametrize("vocab", [7, 300, 5000])
def test_the_likeliest_come_in_order_and_the_lower_id_first_among_equals(vocab):
    logits = random_logits(30, 33, vocab).mul(2).round().div(2)  # many are equal
    wanted = [how(top_logprobs=row % 21, logprob=row % 2 == 0) for row in range(30)]
    chosen = sample(logits, wanted)
    log_probs = logits.float().log_softmax(-1)
    for row, top in enumerate(chosen.tops):
        order = sorted(range(vocab), key=lambda token: (-float(log_probs[row, token]), token))
        assert top == [(token, float(log_probs[row, token])) for token in order[: row % 21]]
    assert all((value == 0.0) == (row % 2 == 1) for row, value in enumerate(chosen.logprobs))


def test_there_are_no_tops_where_nobody_asks():
    assert sample(random_logits(2, 1), [how(), how(logprob=True)]).tops == []


def test_all_numbers_stay_finite_at_the_ends_of_the_ranges():
    logits = torch.full((1, VOCAB), 80.0)
    shaping = Shaping(2.0, 2.0, 0.01, ((1, 100.0), (2, -100.0)), None, (), [1, 2], [1] * 5000)
    shaped = shape_logits(logits, [how(shaping=shaping)], NONE)
    assert all(map(math.isfinite, shaped[0].tolist()))
