"""Sampling against a plain reference that sorts the whole vocabulary of one row at a time."""

import math
import random
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import torch

from serve_app.engine.plan import Sample
from serve_app.model.sampling import _splitmix64, sample, uniform

BASE = Sample(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0, logprob=False)


def how(**changes):
    return msgspec.structs.replace(BASE, **changes)


@dataclass
class Reference:
    """What is left of one row's distribution after its filters."""

    ids: np.ndarray  # likeliest first; between equals the lower id
    probs: np.ndarray

    @classmethod
    def of(cls, logits, wanted):
        x = logits.double().numpy().copy()
        x[list(wanted.banned)] = -np.inf
        x = (x - x.max()) / np.float64(np.float32(wanted.temperature))
        ids = np.lexsort((np.arange(len(x)), -x))
        ids = ids[np.isfinite(x[ids])]
        probs = np.exp(x[ids])
        if wanted.top_k:
            ids, probs = ids[: wanted.top_k], probs[: wanted.top_k]
        probs /= probs.sum()
        if wanted.top_p < 1:
            keep = np.cumsum(probs) - probs < wanted.top_p
            ids, probs = ids[keep], probs[keep]
        keep = probs >= wanted.min_p * probs[0]
        ids, probs = ids[keep], probs[keep]
        return cls(ids, probs / probs.sum())


FILTERS = {
    "top-k": {"top_k": 5},
    "top-k of one": {"top_k": 1},
    "top-k beyond the first candidates": {"top_k": 700},
    "top-k beyond the vocabulary": {"top_k": 10**6, "top_p": 0.999},
    "top-p": {"top_p": 0.7},
    "top-p of almost nothing": {"top_p": 1e-9},
    "min-p": {"min_p": 0.05},
    "min-p of almost nothing": {"min_p": 1e-6},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "all, hot": {"top_k": 3000, "top_p": 0.95, "min_p": 0.001, "temperature": 1.9},
    "cold": {"top_p": 0.95, "temperature": 0.3},
    "banned": {"top_k": 4, "banned": (1, 2, 3, 700)},
}


@pytest.mark.parametrize("vocab_size", [1000, 5000])
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_the_reference_keeps(name, spread, vocab_size):
    seed = 21
    logits = spread * torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits = logits.bfloat16()  # as the model gives them: many are equal
    wanted = [how(**FILTERS[name], seed=row, position=3) for row in range(40)]
    tokens = sample(logits, wanted).tokens
    for row, (token, own) in enumerate(zip(tokens, wanted, strict=True)):
        reference = Reference.of(logits[row].float(), own)
        u = uniform(own.seed, own.position)
        ends = np.cumsum(reference.probs)
        [rank] = np.flatnonzero(reference.ids == token)
        # the token whose share of the cumulative distribution holds u, but for rounding
        assert ends[rank] - reference.probs[rank] - 1e-6 <= u <= ends[rank] + 1e-6, f"seed {seed}, row {row}"


@pytest.mark.parametrize("wanted", [{}, {"temperature": 0.7}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_the_distribution_is_the_model_s(wanted):
    num_draws = 20_000
    logits = 1.5 * torch.randn(300, generator=torch.Generator().manual_seed(22))
    reference = Reference.of(logits, how(**wanted))
    counts = np.zeros(300)
    for begin in range(0, num_draws, 2000):
        rows = [how(**wanted, seed=draw, position=draw % 7) for draw in range(begin, begin + 2000)]
        np.add.at(counts, sample(logits.expand(2000, -1), rows)[0], 1)
    expected = np.zeros(300)
    expected[reference.ids] = num_draws * reference.probs
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted_counts = np.append(expected[often], expected[~often].sum())
    chi_square = ((observed - wanted_counts) ** 2 / np.maximum(wanted_counts, 1e-9)).sum()
    freedom = len(observed) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4, f"chi-square {chi_square} at {freedom} degrees"


def any_sample(dice):
    return how(
        temperature=dice.choice((0.0, 0.5, 1.0, 1.5)),
        top_k=dice.choice((0, 0, 1, 40, 1200)),
        top_p=dice.choice((1.0, 0.3, 0.9, 0.999)),
        min_p=dice.choice((0.0, 0.0, 0.1)),
        seed=dice.getrandbits(64),
        position=dice.randrange(4000),
        logprob=dice.random() < 0.5,
        banned=tuple(dice.sample(range(3000), dice.choice((0, 0, 2)))),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_other_rows(dtype):
    seed = 23
    dice = random.Random(seed)
    logits = (3 * torch.randn(64, 3000, generator=torch.Generator().manual_seed(seed))).to(dtype)
    wanted = [any_sample(dice) for _ in range(64)]
    tokens, logprobs, _ = sample(logits, wanted)
    for row in range(64):
        assert sample(logits[row : row + 1], [wanted[row]]) == ([tokens[row]], [logprobs[row]], []), f"seed {seed}"
    for _ in range(20):
        rows = dice.sample(range(64), dice.randrange(2, 64))
        again = sample(logits[rows], [wanted[row] for row in rows])
        expected = [tokens[row] for row in rows], [logprobs[row] for row in rows], []
        assert again == expected, f"seed {seed}, rows {rows}"


def test_greedy_takes_the_first_of_the_highest():
    logits = torch.zeros(3, 1000)
    logits[0, [300, 999]] = 2.0
    logits[1, 999] = 1.0
    assert sample(logits, [how(temperature=0.0)] * 3)[0] == [300, 999, 0]


def test_banned_tokens_are_never_chosen():
    logits = torch.zeros(200, 4)
    wanted = [how(seed=seed, banned=(0, 2)) for seed in range(200)]
    assert set(sample(logits, wanted)[0]) == {1, 3}
    assert sample(torch.tensor([[9.0, 1.0, 5.0]]), [how(temperature=0.0, banned=(0,))])[0] == [2]


def test_the_log_probability_is_that_of_the_unmodified_distribution():
    logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(24))
    wanted = [how(temperature=0.2, top_k=3, banned=(7,), logprob=True), how()]
    tokens, logprobs, _ = sample(logits, wanted)
    assert logprobs[0] == pytest.approx(float(logits[0].log_softmax(-1)[tokens[0]]), abs=1e-5)
    assert logprobs[1] == 0.0


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 100), []) == ([], [], [])


def test_the_uniform_numbers_are_those_of_splitmix64():
    assert _splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published generator for seed 0
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx([1000] * 10, rel=0.15)
