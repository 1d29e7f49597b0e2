"""What a step has to do, whatever it runs on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one microbatch of one replica. Means, so no whole numbers are needed."""

    prompt_tokens: float = 0.0
    pairs: float = 0.0  # (token of a prompt, token that it attends to)
    prompt_kv: float = 0.0  # tokens whose keys and values are read for prompts
    decode_rows: float = 0.0
    decode_kv: float = 0.0  # the same for answers: the sum of their contexts
    sampled: float = 0.0  # rows that go through the head

    @property
    def rows(self) -> float:
        return self.prompt_tokens + self.decode_rows

    @staticmethod
    def prompt(num_tokens: float, start: float = 0.0, *, sampled: float = 0.0) -> "Step":
        """A prompt's tokens [start, start + num_tokens), each of which attends to those before it and itself."""
        pairs = num_tokens * (start + num_tokens / 2)
        return Step(num_tokens, pairs, start + num_tokens, sampled=sampled)

    @staticmethod
    def decode(rows: float, context: float) -> "Step":
        """One token each of `rows` sequences of `context` tokens."""
        return Step(decode_rows=rows, decode_kv=rows * context, sampled=rows)

    def __add__(self, other: "Step") -> "Step":
        return Step(
            self.prompt_tokens + other.prompt_tokens,
            self.pairs + other.pairs,
            self.prompt_kv + other.prompt_kv,
            self.decode_rows + other.decode_rows,
            self.decode_kv + other.decode_kv,
            self.sampled + other.sampled,
        )

    def times(self, factor: float) -> "Step":
        """So many times the rows, each with as much to attend to as before."""
        return Step(
            self.prompt_tokens * factor,
            self.pairs * factor,
            self.prompt_kv * factor,
            self.decode_rows * factor,
            self.decode_kv * factor,
            self.sampled * factor,
        )
