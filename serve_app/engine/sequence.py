"""A request on its way: its tokens, and how far one replica has come with them."""

import math
from collections.abc import Sequence as Row

from serve_app.engine.plan import Sample, Shaping
from serve_app.engine.request import Emission, FinishReason, Request


class Sequence:
    """One request inside the engine.

    `request` and `tokens` (prompt + emitted) are its state; all else belongs to a stay on a replica and is rebuilt
    after a preemption or in a new epoch. 0 <= num_done <= num_sent <= len(tokens).
    """

    __slots__ = (
        "arrival",
        "chain",
        "deadline_s",
        "due_s",
        "end_ids",
        "finish",
        "foreseen_s",
        "is_late",
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
        "planned_s",
        "predicted_ttft_s",
        "replica",
        "request",
        "submitted_s",
        "tokens",
        "tops",
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
        self.tops: list[list[tuple[int, float]]] = [[] for _ in request.emitted] if sampling.top_logprobs else []
        self.max_tokens = min(self.num_prompt + sampling.max_new_tokens, max_context_tokens)
        self.limit_tokens = self.max_tokens  # or less, where the page pool is smaller
        # a complete grammar leaves nothing but the end: there it is never ignored
        ignores_eos = sampling.ignore_eos and sampling.grammar is None
        self.end_ids = frozenset(sampling.stop_token_ids) | (frozenset() if ignores_eos else {*eos_token_ids})
        self.finish: FinishReason | None = None
        self.num_cached = 0  # prompt tokens found in the prefix cache when first admitted
        self.was_admitted = False
        self.chain: list[bytes] = []  # digests of the leading full pages, see `extend_chain`
        self.replica = -1
        self.submitted_s = self.planned_s = 0.0  # when it came, when it was first in a plan
        self.due_s = self.deadline_s = math.inf  # of its first token: as promised, and as it counts in the queue
        self.is_late = False
        self.predicted_ttft_s: float | None = None
        self.foreseen_s = 0.0  # from its judgement to its first token, as the pace had it
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
    def order(self) -> tuple[float, int]:
        """In the queue for prompt computation the lowest comes first."""
        return self.deadline_s, self.arrival

    def promise(self, now: float, objective_s: float) -> None:
        """Its first token is due `objective_s` after `now`."""
        self.submitted_s = now
        self.due_s = self.deadline_s = now + objective_s

    def demote(self) -> None:
        """It is late: those that can still be in time come first. Not for ever: their deadlines grow."""
        self.is_late = True
        self.deadline_s += 2.0 * (self.due_s - self.submitted_s)

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
            params.top_logprobs,
            self._shaping(),
        )

    def _shaping(self) -> Shaping | None:
        """What the last stage must know of the tokens so far. It travels with every step, so only where it counts."""
        params = self.request.sampling
        repels_prompt = params.repetition_penalty != 1
        penalises = repels_prompt or params.frequency_penalty != 0 or params.presence_penalty != 0
        if not (penalises or params.logit_bias or params.grammar):
            return None
        return Shaping(
            params.frequency_penalty,
            params.presence_penalty,
            params.repetition_penalty,
            params.logit_bias,
            params.grammar,
            tuple(sorted(self.end_ids)) if params.grammar else (),
            self.request.prompt if repels_prompt else [],
            self.tokens[self.num_prompt :] if penalises or params.grammar else [],
        )

    def accept(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Emission:
        """Take the sampled token, and the likeliest at its place; the emission carries `finish` if it is the last."""
        self.tokens.append(token)
        self.finish = self.verdict()
        params, first = self.request.sampling, self.num_emitted - 1
        logprobs = [logprob] if params.logprobs else []
        tops = [top] if params.top_logprobs else []
        self.logprobs += logprobs
        self.tops += tops
        return Emission(self.rid, first, [token], logprobs, self.num_cached, self.finish, tops=tops)

    def lose_again(self) -> int:
        """Count the loss of the workers that were running this; how often in a row without a token in between."""
        is_fruitless = self.num_known_then == len(self.tokens)
        self.num_fruitless = self.num_fruitless + 1 if is_fruitless else 1
        self.num_known_then = len(self.tokens)
        return self.num_fruitless

    def again(self, num_known: int) -> Emission:
        """All emitted tokens but the first `num_known`, in one piece."""
        tokens = self.tokens[self.num_prompt + num_known :]
        logprobs, tops = self.logprobs[num_known:], self.tops[num_known:]
        return Emission(self.rid, num_known, tokens, logprobs, self.num_cached, self.finish, tops=tops)

    def end(self, reason: FinishReason) -> Emission:
        """End without another token."""
        self.finish = reason
        return Emission(self.request.rid, self.num_emitted, [], [], self.num_cached, reason)
