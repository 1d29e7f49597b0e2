"""Choosing tokens: a pure function of each row's logits and its `Sample`. There is no generator state.

A row's uniform number is a hash of (seed, position), turned into a token by the inverse of the row's cumulative
distribution. No row's result depends on another's.

Grammars, biases and penalties come first (see `shaping`). Filters apply in this order, each renormalising what the one
before left: temperature, top-k, top-p, min-p. Between equal logits the lower token id is the likelier.

Shapes: S sampled rows, R rows of a subset, V vocabulary, C candidates, L blocks of the vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve_app.engine.plan import Sample
from serve_app.model.grammar import Grammars
from serve_app.model.shaping import shape_logits

Top = list[tuple[int, float]]  # (token, log-probability), likeliest first

_NO_GRAMMARS = Grammars.without_tokenizer()
_BLOCK_TOKENS = 128  # of the two-level searches through the vocabulary
_CANDIDATES = (256, 2048)  # how many of the likeliest tokens to look at before sorting all of them
_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15


class Chosen(NamedTuple):
    """One of each per row. Log-probabilities are those of the model: at temperature 1, before anything is changed."""

    tokens: list[int]
    logprobs: list[float]  # of the tokens; 0.0 where not asked for
    tops: list[Top]  # the likeliest tokens, empty where not asked for; no rows where nobody asks


@torch.inference_mode()
def sample(logits_SV: Tensor, samples: list[Sample], grammars: Grammars | None = None) -> Chosen:
    """Choose a token for each row. Without `grammars` the answer of a row that has one ends at once."""
    shaped_SV = shape_logits(logits_SV, samples, grammars or _NO_GRAMMARS)
    allowed_SV = _without_banned(shaped_SV, samples).float()
    tokens = [0] * len(samples)
    greedy = [row for row, how in enumerate(samples) if how.temperature == 0]
    plain = [row for row, how in enumerate(samples) if how.temperature > 0 and not _is_filtered(how)]
    filtered = [row for row, how in enumerate(samples) if how.temperature > 0 and _is_filtered(how)]
    if greedy:
        _put(tokens, greedy, _greedy(_rows(allowed_SV, greedy)))
    if plain:
        hows = [samples[row] for row in plain]
        _put(tokens, plain, _draw_plain(_heated(_rows(allowed_SV, plain), hows), _uniforms(hows, logits_SV.device)))
    if filtered:
        hows = [samples[row] for row in filtered]
        _put(tokens, filtered, _draw_filtered(_heated(_rows(allowed_SV, filtered), hows), hows))
    return Chosen(tokens, *_log_probabilities(logits_SV, samples, tokens))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: SplitMix64 (doi 10.1145/2660193.2660195) of (seed, position)."""
    return (_splitmix64(_splitmix64(seed) + position) >> 11) * 2.0**-53


def _splitmix64(state: int) -> int:
    z = (state + _GOLDEN64) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _is_filtered(how: Sample) -> bool:
    return how.top_k > 0 or how.top_p < 1 or how.min_p > 0


def _rows(x_SV: Tensor, rows: list[int]) -> Tensor:
    return x_SV if len(rows) == len(x_SV) else x_SV[rows]


def _put(tokens: list[int], rows: list[int], chosen_R: Tensor) -> None:
    for row, token in zip(rows, chosen_R.tolist(), strict=True):
        tokens[row] = token


def _without_banned(logits_SV: Tensor, samples: list[Sample]) -> Tensor:
    banned = [(row, token) for row, how in enumerate(samples) if not _has_grammar(how) for token in how.banned]
    if not banned:
        return logits_SV
    rows, tokens = zip(*banned, strict=True)
    allowed_SV = logits_SV.clone()
    allowed_SV[list(rows), list(tokens)] = float("-inf")
    return allowed_SV


def _has_grammar(how: Sample) -> bool:
    return how.shaping is not None and how.shaping.grammar is not None


def _heated(x_RV: Tensor, hows: list[Sample]) -> Tensor:
    """Logits relative to the row's highest, divided by the temperature."""
    temperature_R1 = _column((how.temperature for how in hows), x_RV.device).float()
    return (x_RV - x_RV.amax(-1, keepdim=True)) / temperature_R1


def _uniforms(hows: list[Sample], device: torch.device) -> Tensor:
    return _column((uniform(how.seed, how.position) for how in hows), device)


def _column(values: Iterable[float], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=device).unsqueeze(1)


def _blocks(x_RV: Tensor, padding: float) -> Tensor:
    """RLB: the vocabulary cut in blocks. Reductions of a block at a time are fast, and the same for any R."""
    missing = -x_RV.shape[1] % _BLOCK_TOKENS
    padded = F.pad(x_RV, (0, missing), value=padding) if missing else x_RV
    return padded.view(len(x_RV), -1, _BLOCK_TOKENS)


def _block(x_RLB: Tensor, block_R: Tensor) -> Tensor:
    return x_RLB[torch.arange(len(x_RLB), device=x_RLB.device), block_R]


def _greedy(x_RV: Tensor) -> Tensor:
    """The first of the highest logits of each row."""
    x_RLB = _blocks(x_RV, float("-inf"))
    block_R = x_RLB.amax(-1).argmax(-1)
    return block_R * _BLOCK_TOKENS + _block(x_RLB, block_R).argmax(-1)


def _draw_plain(x_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """From the whole distribution, token ids ascending: first the block of the vocabulary, then within it."""
    weights_RLB = _blocks(x_RV.exp(), 0.0)
    block_R, uniform_R1 = _invert(weights_RLB.sum(-1), uniform_R1)
    within_R, _ = _invert(_block(weights_RLB, block_R), uniform_R1)
    return block_R * _BLOCK_TOKENS + within_R


def _invert(weights_RC: Tensor, uniform_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The index at which the cumulative weight passes `uniform_R1` of the total, and how far into it that lies.

    Never one of weight zero.
    """
    cumulative_RC = weights_RC.double().cumsum(-1)
    total_R1 = cumulative_RC[:, -1:]
    target_R1 = torch.minimum(uniform_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    index_R1 = (cumulative_RC <= target_R1).sum(-1, keepdim=True)
    weight_R1 = weights_RC.gather(1, index_R1).double()
    return index_R1.squeeze(1), (target_R1 - (cumulative_RC.gather(1, index_R1) - weight_R1)) / weight_R1


def _draw_filtered(x_RV: Tensor, hows: list[Sample]) -> Tensor:
    """From what top-k, top-p and min-p leave, likeliest first. A row looks at more candidates only if it must."""
    total_R1 = _blocks(x_RV.exp(), 0.0).sum(-1).double().sum(-1, keepdim=True)
    chosen_R = torch.zeros(len(hows), dtype=torch.int64, device=x_RV.device)
    pending = list(range(len(hows)))
    for num_candidates in (*_CANDIDATES, x_RV.shape[1]):
        likeliest = _likeliest(_rows(x_RV, pending), num_candidates)
        chosen_R[pending], is_decided_R = _pick(*likeliest, total_R1[pending], [hows[row] for row in pending])
        pending = [row for row, is_decided in zip(pending, is_decided_R.tolist(), strict=True) if not is_decided]
        if not pending or num_candidates >= x_RV.shape[1]:
            break
    return chosen_R


def _likeliest(x_RV: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """(logits_RC, ids_RC) of the highest logits, descending; between equals the lower id first.

    Among equals at the end the choice of ids is the kernel's: see `_pick`.
    """
    if num_candidates >= x_RV.shape[1]:
        return torch.sort(x_RV, dim=-1, descending=True, stable=True)
    ids_RC = x_RV.topk(num_candidates, sorted=False).indices.sort(-1).values
    logits_RC, order_RC = torch.sort(x_RV.gather(1, ids_RC), dim=-1, descending=True, stable=True)
    return logits_RC, ids_RC.gather(1, order_RC)


def _pick(logits_RC: Tensor, ids_RC: Tensor, total_R1: Tensor, hows: list[Sample]) -> tuple[Tensor, Tensor]:
    """(token, whether the candidates were enough) of each row.

    They are enough where what is kept ends above the last candidate's logit: then no token left out could matter.
    """
    num_candidates, device = logits_RC.shape[1], logits_RC.device
    weights_RC = logits_RC.double().exp()
    cumulative_RC = weights_RC.cumsum(-1)
    is_whole_R1 = _column((how.top_k == 0 for how in hows), device).bool()
    top_k_R1 = _column((how.top_k or num_candidates for how in hows), device).long()
    mass_R1 = cumulative_RC.gather(1, top_k_R1.clamp(max=num_candidates) - 1)
    mass_R1 = torch.where(is_whole_R1, total_R1, mass_R1)
    top_p_R1 = _column((how.top_p for how in hows), device)
    is_kept_RC = (cumulative_RC - weights_RC < top_p_R1 * mass_R1) | (top_p_R1 >= 1)
    is_kept_RC &= torch.arange(num_candidates, device=device) < top_k_R1
    is_kept_RC &= weights_RC >= _column((how.min_p for how in hows), device)
    last_R1 = (is_kept_RC & (weights_RC > 0)).sum(-1, keepdim=True).clamp(min=1) - 1
    target_R1 = _uniforms(hows, device) * cumulative_RC.gather(1, last_R1)
    index_R1 = torch.minimum((cumulative_RC <= target_R1).sum(-1, keepdim=True), last_R1)
    is_enough_R1 = (logits_RC.gather(1, last_R1) > logits_RC[:, -1:]) & (is_whole_R1 | (top_k_R1 <= num_candidates))
    return ids_RC.gather(1, index_R1).squeeze(1), is_enough_R1.squeeze(1)


def _log_probabilities(logits_SV: Tensor, samples: list[Sample], tokens: list[int]) -> tuple[list[float], list[Top]]:
    logprobs = [0.0] * len(samples)
    most = max((how.top_logprobs for how in samples), default=0)
    tops: list[Top] = [[] for _ in samples] if most else []
    rows = [row for row, how in enumerate(samples) if how.logprob or how.top_logprobs]
    if rows:
        chosen_R1 = torch.tensor([tokens[row] for row in rows], device=logits_SV.device).unsqueeze(1)
        log_probs_RV = logits_SV[rows].float().log_softmax(-1)
        for row, value in zip(rows, log_probs_RV.gather(1, chosen_R1).squeeze(1).tolist(), strict=True):
            logprobs[row] = value if samples[row].logprob else 0.0
    if most:
        for row, top in zip(rows, _tops(log_probs_RV, most), strict=True):
            tops[row] = top[: samples[row].top_logprobs]
    return logprobs, tops


def _tops(log_probs_RV: Tensor, most: int) -> list[Top]:
    """The `most` likeliest of each row; among equals the lower ids, which `topk` alone does not promise."""
    num = min(most, log_probs_RV.shape[1])
    least_R1 = log_probs_RV.topk(num).values[:, -1:]
    is_above_RV, is_equal_RV = log_probs_RV > least_R1, log_probs_RV == least_R1
    num_left_R1 = num - is_above_RV.sum(-1, keepdim=True)
    is_kept_RV = is_above_RV | (is_equal_RV & (is_equal_RV.cumsum(-1) <= num_left_R1))
    ids_RC = is_kept_RV.nonzero()[:, 1].view(-1, num)
    values_RC, order_RC = log_probs_RV.gather(1, ids_RC).sort(dim=-1, descending=True, stable=True)
    rows = zip(ids_RC.gather(1, order_RC).tolist(), values_RC.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in rows]
