"""A request is its tokens: prompt + emitted tokens + sampling parameters are all of its state."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose tokens. Validated at the door (`ingress`); the engine trusts these values.

    Sampling is a pure function of (seed, position, logits): there is no generator state.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0  # end tokens are not sampled before this many tokens are out
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the likeliest token's probability
    seed: int = 0  # 64 bits, unsigned
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's end tokens
    ignore_eos: bool = False
    logprobs: bool = False  # report the log-probability of each emitted token


class Request(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What enters the engine. `emitted` is non-empty when a stream is resumed: a fresh add of all its tokens."""

    rid: str
    prompt: list[int]
    sampling: SamplingParams = SamplingParams()
    emitted: list[int] = []


class Emission(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. The last one of a request carries `finish`.

    `first` is the index of `tokens[0]` among all tokens that the request ever emitted, so that a receiver can
    drop what it already has. `logprobs` is empty unless asked for.
    """

    rid: str
    first: int
    tokens: list[int]
    logprobs: list[float]
    num_cached: int  # prompt tokens whose KV was found in the prefix cache at first scheduling
    finish: FinishReason | None = None
