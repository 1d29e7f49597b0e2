"""What the streams of chat and completions have in common: who has how much, and what is told at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.ingress.door import Job
from serve_app.ingress.openai.answers import Usage, usage_of
from serve_app.ingress.openai.reader import Delta, Reader
from serve_app.ingress.output import Output, Piece


@dataclass
class Turn:
    """One sequence of a stream, read as its text comes. `had`: tokens that the client has from another connection."""

    reader: Reader
    had: int
    num_chars: int = 0  # that were read
    num_told: int = 0  # tokens that were told, or that the client had

    def __post_init__(self) -> None:
        self.num_told = self.had

    @property
    def is_begun(self) -> bool:
        return self.num_told > 0

    def read(self, output: Output, pieces: Sequence[Piece]) -> list[Delta]:
        """What the client lacks, of an output that has just got these pieces."""
        num_before = len(output.pieces) - len(pieces)
        had = "".join(piece.text for piece in pieces[: max(0, self.had - num_before)])
        self._read(had)
        if len(output.pieces) < self.had:
            return []
        deltas = self._read(output.text[self.num_chars :])
        return deltas + self.reader.finish() if output.finish is not None else deltas

    def _read(self, text: str) -> list[Delta]:
        self.num_chars += len(text)
        return self.reader.push(text)


@dataclass
class Ends:
    """Which sequences of a stream have ended, for the usage of all."""

    jobs: Sequence[Job]
    outputs: dict[int, Output] = field(default_factory=dict)

    def note(self, index: int, output: Output, num_copies: int) -> Usage | None:
        """The usage, when this is the last to end."""
        if output.finish is None:
            return None
        self.outputs[index] = output
        if len(self.outputs) < len(self.jobs):
            return None
        return usage_of(self.jobs, [self.outputs[i] for i in range(len(self.jobs))], num_copies)
