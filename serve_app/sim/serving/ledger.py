"""What became of requests, in columns: a hundred thousand of them with millions of tokens take a few megabytes."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from serve_app.engine.request import Emission
from serve_app.sim.serving.losses import Outage

GAP_PRECISION = 0.01  # of the times between tokens, which are counted and not kept


@dataclass(frozen=True)
class Load:
    """Requests in the order of their arrival: three columns of the same length."""

    at_s: "array[float]"
    prompt_tokens: "array[int]"
    output_tokens: "array[int]"

    @staticmethod
    def of(asks: Iterable[tuple[float, int, int]]) -> "Load":
        """From (arrival, prompt tokens, output tokens), sorted by arrival."""
        load = Load(array("d"), array("l"), array("l"))
        for at_s, prompt_tokens, output_tokens in asks:
            load.at_s.append(at_s)
            load.prompt_tokens.append(prompt_tokens)
            load.output_tokens.append(output_tokens)
        return load

    def __len__(self) -> int:
        return len(self.at_s)

    def part(self, start: int, step: int) -> "Load":
        """Every `step`-th request from `start` on."""
        return Load(self.at_s[start::step], self.prompt_tokens[start::step], self.output_tokens[start::step])


class Outcome(IntEnum):
    OPEN = 0
    ENDED = 1  # with all its tokens, as far as the context allowed
    REFUSED = 2  # for good
    GAVE_UP = 3  # its client went away without a token
    BROKEN = 4  # the engine gave up


class Gaps:
    """Times between tokens, counted in classes that are a hundredth wide."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, seconds: float, num: int = 1) -> None:
        self.counts[round(math.log(max(seconds, 1e-9)) / GAP_PRECISION)] += num

    def quantile(self, share: float) -> float | None:
        """The smallest, within half of GAP_PRECISION, that `share` of all do not exceed; None if there is none."""
        left = math.ceil(share * self.counts.total())
        for place in sorted(self.counts):
            left -= self.counts[place]
            if left <= 0:
                return math.exp(place * GAP_PRECISION)
        return None


class Ledger:
    """Of the requests of a load, by their number. nan: it did not come to that. Seconds of the run."""

    def __init__(self, num_requests: int) -> None:
        self.asked_s = array("d", [math.nan]) * num_requests  # when it was last sent
        self.first_s = array("d", [math.nan]) * num_requests  # its first token
        self.last_s = array("d", [math.nan]) * num_requests  # its last token so far
        self.ended_s = array("d", [math.nan]) * num_requests
        self.num_tokens = array("l", [0]) * num_requests
        self.num_tries = array("l", [0]) * num_requests
        self.outcome = array("b", [Outcome.OPEN]) * num_requests
        self.gaps = Gaps()
        self.reasons: Counter[str] = Counter()  # of refusals, those of retries included
        self.sent: Counter[int] = Counter()  # by the second
        self.refused: Counter[int] = Counter()  # by the second in which they were sent
        self.replayed = 0  # running requests that were added again, because their replica was lost
        self.num_steps = 0
        self.outages: list[Outage] = []

    def ask(self, number: int, now_s: float) -> None:
        self.asked_s[number] = now_s
        self.num_tries[number] += 1
        self.sent[int(now_s)] += 1

    def refuse(self, number: int, reason: str) -> None:
        self.reasons[reason] += 1
        self.refused[int(self.asked_s[number])] += 1
        self.outcome[number] = Outcome.REFUSED

    def hear(self, emission: Emission, now_s: float) -> None:
        """Tokens come; each must follow the one before it."""
        number = int(emission.rid)
        num_known, num_new = self.num_tokens[number], len(emission.tokens)
        if num_new:
            assert emission.first == num_known, f"request {number} has token {emission.first} after {num_known}"
            if num_known:
                self.gaps.add(now_s - self.last_s[number])
            else:
                self.first_s[number] = now_s
            if num_new > 1:
                self.gaps.add(0.0, num_new - 1)
            self.last_s[number] = now_s
            self.num_tokens[number] = num_known + num_new
        if emission.finish is not None:
            self.ended_s[number] = now_s
            self.outcome[number] = _OUTCOMES[emission.finish]

    def merge(self, other: "Ledger", start: int, step: int) -> None:
        """Take over what a part of the load came to: its request i is start + i * step here."""
        for name in ("asked_s", "first_s", "last_s", "ended_s", "num_tokens", "num_tries", "outcome"):
            getattr(self, name)[start::step] = getattr(other, name)
        self.gaps.counts.update(other.gaps.counts)
        for name in ("reasons", "sent", "refused"):
            getattr(self, name).update(getattr(other, name))
        self.replayed += other.replayed
        self.num_steps += other.num_steps
        self.outages = sorted([*self.outages, *other.outages], key=lambda o: (o.died_s, o.cell, o.worker))


_OUTCOMES = {
    "stop": Outcome.ENDED,
    "length": Outcome.ENDED,
    "abort": Outcome.GAVE_UP,
    "error": Outcome.BROKEN,
}
