"""What changes logits as a function of the tokens so far: grammars, biases and penalties, in vLLM's order.

Each row is changed by its own `Sample` only, in fp32. Shapes: S sampled rows, V vocabulary, U different tokens.
"""

import torch
from torch import Tensor

from serve_app.engine.plan import Sample, Shaping
from serve_app.model.grammar import Grammars


def shape_logits(logits_SV: Tensor, samples: list[Sample], grammars: Grammars) -> Tensor:
    """Logits to choose from. Where no row is shaped they are the very tensor that came in; else a copy in fp32."""
    if not any(how.shaping for how in samples):
        return logits_SV
    shaped_SV = logits_SV.to(torch.float32, copy=True)
    for x_V, how in zip(shaped_SV, samples, strict=True):
        if how.shaping:
            _keep_to_grammar(x_V, how, how.shaping, grammars)
            _add_biases(x_V, how.shaping)
            _repel_repeats(x_V, how.shaping)
    return shaped_SV


def _keep_to_grammar(x_V: Tensor, how: Sample, shaping: Shaping, grammars: Grammars) -> None:
    """Where the grammar leaves only what is banned (ends that come too early) it counts more than the ban."""
    if shaping.grammar is None:
        return
    allowed = grammars.allowed(shaping.grammar, shaping.emitted, shaping.end_ids, len(x_V))
    unbanned = allowed.copy()
    unbanned[list(how.banned)] = False
    kept_V = torch.from_numpy(unbanned if unbanned.any() else allowed)
    x_V.masked_fill_(~kept_V.to(x_V.device), float("-inf"))


def _add_biases(x_V: Tensor, shaping: Shaping) -> None:
    if shaping.logit_bias:
        ids, biases = zip(*shaping.logit_bias, strict=True)
        ids_U = torch.tensor(ids, device=x_V.device)
        x_V[ids_U] += torch.tensor(biases, dtype=torch.float32, device=x_V.device)


def _repel_repeats(x_V: Tensor, shaping: Shaping) -> None:
    """Repetition (arXiv 1909.05858) first, then frequency and presence as OpenAI defines them."""
    if shaping.repetition_penalty != 1 and (shaping.prompt or shaping.emitted):
        seen = torch.tensor(shaping.prompt + shaping.emitted, device=x_V.device)
        ids_U = seen.unique()  # type: ignore[no-untyped-call]
        x_U, penalty = x_V[ids_U], shaping.repetition_penalty
        x_V[ids_U] = torch.where(x_U > 0, x_U / penalty, x_U * penalty)
    if (shaping.frequency_penalty or shaping.presence_penalty) and shaping.emitted:
        emitted = torch.tensor(shaping.emitted, device=x_V.device)
        ids_U, counts_U = emitted.unique(return_counts=True)  # type: ignore[no-untyped-call]
        x_V[ids_U] -= counts_U.float() * shaping.frequency_penalty + shaping.presence_penalty
