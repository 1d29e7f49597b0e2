"""A request is its tokens: prompt + emitted tokens + sampling parameters are all of its state."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What the answer must be: a JSON schema (`{}` is any JSON), a regular expression, or a grammar in Lark's notation.

    Its state is a function of the emitted tokens, like everything else of a request.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str


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
    top_logprobs: int = 0  # and of so many of the likeliest at its place
    frequency_penalty: float = 0.0  # times how often a token was emitted, taken from its logit
    presence_penalty: float = 0.0  # once for each token that was emitted
    repetition_penalty: float = 1.0  # of tokens in the prompt or emitted: positive logits / it, negative ones * it
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit), sorted by token
    grammar: Grammar | None = None


class Terms(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """On which terms a request asks to be let in. They change who waits for whom, never a token."""

    tenant: str = ""  # who shares the budget fairly with the others: one per API key
    share: float = 1.0  # of the admission budget that its priority may fill
    ttft_s: float = 0.0  # its objective; 0: the server's
    waited_s: float = 0.0  # how long it has been waiting already, elsewhere
    is_accepted: bool = False  # it was let in before: it is not judged again
    drops_late: bool = False  # refuse it as soon as its objective can no longer be met, instead of serving it last


class Request(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What enters the engine. `emitted` is non-empty when a stream is resumed: a fresh add of all its tokens."""

    rid: str
    prompt: list[int]
    sampling: SamplingParams = SamplingParams()
    emitted: list[int] = []
    name: str = ""  # the client's name for it
    terms: Terms = Terms()


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
    predicted_ttft_s: float | None = None  # what was predicted when it was let in; with its first token only
    queued_s: float | None = None  # from its arrival to the first step that had it; with its first token only
    tops: list[list[tuple[int, float]]] = []  # per token the likeliest, likeliest first; empty unless asked for


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A request that is not let in, and when it would be."""

    rid: str
    reason: str  # one word or two with hyphens, for machines: "ttft", "queue-full", "fair-share", "draining", ...
    text: str  # for people
    retry_after_s: float  # come back after so long
