"""A request on its way: its tokens, and how far one replica has come with them."""

import math
from collections.abc import Sequence as Row

from serve_app.engine.plan import Sample
from serve_app.engine.request import Emission, FinishReason, Request


class Sequence:
    """One request inside the engine.

    `request` and `tokens` (prompt + emitted) are its state; all else belongs to a stay on a replica and is rebuilt
    after a preemption or in a new epoch. 0 <= num_done <= num_sent <= len(tokens).
    """

    __slots__ = (
        "arrival",
        "chain",
        "end_ids",
        "finish",
        "limit_tokens",
        "logprobs",
        "max_tokens",
        "num_cached",
        "num_done",
        "num_fruitless",
        "num_in_flight",
        "num_known_then",
        "num_prompt",
        "num_published",
        "num_sent",
        "pages",
        "replica",
        "request",
        "tokens",
        "was_admitted",
    )

    def __init__(self, request: Request, arrival: int, eos_token_ids: Row[int], max_context_tokens: int) -> None:
        sampling = request.sampling
        self.request = request
        self.arrival = arrival  # the order in which requests came: who waits longer is served first
        self.tokens = [*request.prompt, *request.emitted]
        self.num_prompt = len(request.prompt)
        # of the emitted tokens, where they are asked for; what another engine emitted is not known here
        self.logprobs = [math.nan] * len(request.emitted) if sampling.logprobs else []
        self.max_tokens = min(self.num_prompt + sampling.max_new_tokens, max_context_tokens)
        self.limit_tokens = self.max_tokens  # or less, where the page pool is smaller
        self.end_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else {*eos_token_ids})
        self.finish: FinishReason | None = None
        self.num_cached = 0  # prompt tokens found in the prefix cache when first admitted
        self.was_admitted = False
        self.chain: list[bytes] = []  # digests of the leading full pages, see `extend_chain`
        self.replica = -1
        self.num_fruitless = 0  # losses in a row, with the same tokens known
        self.num_known_then = 0
        self.restart()

    def restart(self) -> None:
        """Forget the stay on a replica: nothing of the KV is computed, nothing in flight."""
        self.pages: list[int] = []
        self.num_sent = 0  # tokens in plans issued
        self.num_done = 0  # tokens whose KV is computed: their steps are done
        self.num_in_flight = 0  # steps
        self.num_published = 0  # leading pages offered for reuse, or taken from there

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def num_emitted(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def work_tokens(self) -> int:
        """At most this many tokens have yet to go through the model."""
        return self.limit_tokens - self.num_done

    def verdict(self) -> FinishReason | None:
        """Whether the tokens so far end the request."""
        if not self.tokens:
            return "error"  # nothing to predict from: the door refuses those, and a lone one must not wait for ever
        if self.num_emitted and self.tokens[-1] in self.end_ids:
            return "stop"
        if len(self.tokens) >= self.limit_tokens:
            return "length"
        return None

    def sample(self) -> Sample:
        """How to choose the token that follows all known ones."""
        params, num_known = self.request.sampling, len(self.tokens)
        banned: tuple[int, ...] = ()
        if num_known - self.num_prompt < params.min_new_tokens:
            banned = tuple(sorted(self.end_ids))
        return Sample(
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            num_known,
            params.logprobs,
            banned,
        )

    def accept(self, token: int, logprob: float) -> Emission:
        """Take the sampled token; the emission carries `finish` if it is the last."""
        self.tokens.append(token)
        self.finish = self.verdict()
        logprobs = [logprob] if self.request.sampling.logprobs else []
        self.logprobs += logprobs
        return Emission(self.request.rid, self.num_emitted - 1, [token], logprobs, self.num_cached, self.finish)

    def lose_again(self) -> int:
        """Count the loss of the workers that were running this; how often in a row without a token in between."""
        is_fruitless = self.num_known_then == len(self.tokens)
        self.num_fruitless = self.num_fruitless + 1 if is_fruitless else 1
        self.num_known_then = len(self.tokens)
        return self.num_fruitless

    def again(self, num_known: int) -> Emission:
        """All emitted tokens but the first `num_known`, in one piece."""
        tokens = self.tokens[self.num_prompt + num_known :]
        return Emission(self.rid, num_known, tokens, self.logprobs[num_known:], self.num_cached, self.finish)

    def end(self, reason: FinishReason) -> Emission:
        """End without another token."""
        self.finish = reason
        return Emission(self.request.rid, self.num_emitted, [], [], self.num_cached, reason)
