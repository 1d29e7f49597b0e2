"""From emitted tokens to text: detokenized, cut at stop strings, with a possible stop held back until decided."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.engine.request import Emission, FinishReason
from serve_app.ingress.faults import GenerationError
from serve_app.model.tokenizer import Detokenizer, Tokenizer


class StopMatcher:
    """Finds the stop string that is complete first in text that comes in pieces, wherever the pieces are cut.

    Of two that are complete at the same character, the one that began first (the longer) counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = stops
        self._held = ""  # text that may be the beginning of a stop string
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is now known not to belong to a stop string. Nothing comes after a match."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        hit = min(self._hits(), default=None)
        if hit is None:
            return self._release(len(self._held) - self._num_open())
        self.matched = self._held[hit[1] : hit[0]]
        released = self._release(hit[1])
        self._held = ""
        return released

    def flush(self) -> str:
        """What is still held when no more text comes."""
        return self._release(len(self._held))

    def _hits(self) -> Iterator[tuple[int, int]]:
        """(end, start) of each stop string's first occurrence."""
        for stop in self._stops:
            start = self._held.find(stop)
            if start >= 0:
                yield start + len(stop), start

    def _num_open(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(_overlap(self._held, stop) for stop in self._stops)

    def _release(self, num_chars: int) -> str:
        released, self._held = self._held[:num_chars], self._held[num_chars:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Finish:
    reason: Literal["stop", "length", "abort"]
    matched: int | str | None = None  # for stop: the end token's id, or the stop string


@dataclass(frozen=True)
class Piece:
    """One token and the text that became certain with it."""

    token: int
    logprob: float | None
    text: str
    special: bool
    top: tuple[tuple[int, float], ...] = ()  # the likeliest at its place, likeliest first; empty unless asked for


class Output:
    """What one request has answered so far."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], skip_special_tokens: bool) -> None:
        self._special_ids = tokenizer.special_ids
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._matcher = StopMatcher(stops)
        self.text = ""
        self.tokens: list[int] = []
        self.pieces: list[Piece] = []  # one per token
        self.num_cached_tokens = 0
        self.finish: Finish | None = None

    def take(self, emission: Emission) -> list[Piece]:
        """Add an emission; tokens that are already here are dropped, and so is all that follows a stop string.

        The last piece also carries the text that was held back until the end. Raises GenerationError when the
        engine reports an error or tokens are missing.
        """
        num_known = len(self.tokens) - emission.first
        if emission.finish == "error":
            raise GenerationError("the engine could not finish the request")
        if num_known < 0:
            raise GenerationError(f"tokens [{len(self.tokens)}, {emission.first}) of the answer were lost")
        if not self.tokens:  # what another engine that goes on with it says is about itself
            self.num_cached_tokens = emission.num_cached
        pieces: list[Piece] = []
        for i in range(num_known, len(emission.tokens)):
            is_last = emission.finish is not None and i == len(emission.tokens) - 1
            logprob = emission.logprobs[i] if emission.logprobs else None
            top = emission.tops[i] if emission.tops else []
            pieces.append(self._take_token(emission.tokens[i], logprob, top, emission.finish if is_last else None))
            self.pieces.append(pieces[-1])
            if self.finish is not None:
                return pieces
        if emission.finish is not None:  # with no token of its own
            self._end(emission.finish)
        return pieces

    def _take_token(
        self, token: int, logprob: float | None, top: list[tuple[int, float]], finish: FinishReason | None
    ) -> Piece:
        num_chars = len(self.text)
        self.tokens.append(token)
        if finish != "stop":  # the end token is no text
            self.text += self._matcher.push(self._detokenizer.push([token]))
        if self._matcher.matched is not None:
            self.finish = Finish("stop", self._matcher.matched)
        elif finish is not None:
            self._end(finish)
        return Piece(token, logprob, self.text[num_chars:], token in self._special_ids, tuple(top))

    def _end(self, reason: FinishReason) -> None:
        assert reason != "error", "raised by take"
        self.text += self._matcher.push(self._detokenizer.finish()) + self._matcher.flush()
        if self._matcher.matched is not None:
            self.finish = Finish("stop", self._matcher.matched)
        else:
            self.finish = Finish(reason, self.tokens[-1] if reason == "stop" and self.tokens else None)
