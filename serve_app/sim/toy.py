"""A model whose every token depends on all tokens before it: whatever is mixed up shows as a wrong token."""

import zlib
from array import array
from collections.abc import Iterable, Sequence

from serve_app.engine.core import EngineConfig
from serve_app.engine.request import FinishReason, Request

VOCAB = 17
EOS = 0
UNWRITTEN = -1  # what a KV page holds at first


def digest(context: "array[int]") -> int:
    """What a stage knows of a sequence: of all its tokens, in their order."""
    return zlib.crc32(context.tobytes())


def choose(context_digest: int, seed: int, banned: Sequence[int]) -> int:
    """The token that follows: any change of any earlier token, of their number or of the seed changes the choice."""
    value = zlib.crc32(seed.to_bytes(8, "little"), context_digest)
    if not banned:
        return value % VOCAB
    allowed = [token for token in range(VOCAB) if token not in banned]
    return allowed[value % len(allowed)]


def expert_of(layer: int, token: int, position: int, num_experts: int) -> int:
    """Where the gate of a layer sends a token."""
    return (7 * token + 3 * position + 5 * layer) % num_experts


def undisturbed(request: Request, config: EngineConfig) -> tuple[list[int], FinishReason]:
    """All emitted tokens of a request, and why they end, where nothing ever fails."""
    sampling, context = request.sampling, array("q", request.prompt)
    ends = _ends(request, config.eos_token_ids)
    num_most = min(len(context) + sampling.max_new_tokens, config.max_context_tokens)
    num_prompt = len(context)
    while len(context) < num_most:
        banned = ends if len(context) - num_prompt < sampling.min_new_tokens else ()
        context.append(choose(digest(context), sampling.seed, banned))
        if context[-1] in ends:
            return list(context[num_prompt:]), "stop"
    return list(context[num_prompt:]), "length"


def _ends(request: Request, eos_token_ids: Iterable[int]) -> tuple[int, ...]:
    sampling = request.sampling
    return tuple(sorted({*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}))
