"""Where the time of a step goes: sums by part, and, while somebody asks for them, the single spans."""

import time
from typing import Literal, get_args

import msgspec

Part = Literal["attention", "experts", "head", "shards", "other"]

MAX_SPANS = 200_000  # of one recording; what comes later is not kept


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Something that took time. Seconds of `time.perf_counter`, which all processes of a machine share."""

    name: str
    begin_s: float
    end_s: float


class StepTimer:
    """Seconds that went to each part of a stage's steps; beside them, spans of any name while `spans` is a list."""

    def __init__(self) -> None:
        self.spans: list[Span] | None = None
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self.start()

    def start(self) -> None:
        self._since_s = time.perf_counter()

    def lap(self, part: Part) -> None:
        """Book the time since the last lap to `part`."""
        since_s, self._since_s = self._since_s, time.perf_counter()
        self.seconds[part] += self._since_s - since_s
        if self.spans is not None:
            self._keep(Span(part, since_s, self._since_s))

    def span(self, name: str, begin_s: float) -> None:
        """Record, while spans are, that `name` has lasted from `begin_s` until now."""
        if self.spans is not None:
            self._keep(Span(name, begin_s, time.perf_counter()))

    def _keep(self, span: Span) -> None:
        if self.spans is not None and len(self.spans) < MAX_SPANS:
            self.spans.append(span)

    def take_spans(self) -> list[Span]:
        """What was recorded; the recording ends."""
        spans, self.spans = self.spans or [], None
        return spans
