"""What became of each request. Seconds of the run's own clock: `at_s` of an arrival is on it, too."""

import time

import msgspec

from serve_app.bench.serve.arrivals import Arrival

REFUSALS = frozenset({429, 503, 529})  # statuses that say: not now


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._begin_s


class Try(msgspec.Struct):
    """One time that a request was sent."""

    sent_s: float  # just before the connection was begun
    answered_s: float | None = None  # when the status and the headers were there
    status: int = 0
    retry_after_s: float | None = None
    reason: str = ""  # of a refusal, as its header says it

    @property
    def is_refused(self) -> bool:
        return self.status in REFUSALS


class Record(msgspec.Struct):
    """One request. It is out once `ended_s` is set, however it went."""

    arrival: Arrival
    tries: list[Try] = []
    token_s: list[float] = []  # of the last try
    ended_s: float | None = None
    error: str = ""
    gave_up: bool = False  # no token came for so long that the client hung up

    @property
    def is_refused(self) -> bool:
        """For good: it was not, or no longer, tried again."""
        return bool(self.tries) and self.tries[-1].is_refused

    @property
    def ttft_s(self) -> float | None:
        """From the try that was let in to its first token; None if none came."""
        return self.token_s[0] - self.tries[-1].sent_s if self.token_s else None

    @property
    def is_whole(self) -> bool:
        """All tokens came."""
        return self.ended_s is not None and not self.error and len(self.token_s) == self.arrival.output_tokens
