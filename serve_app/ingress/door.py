"""What every dialect checks at the door: prompts, token budgets, stops, ranges. Everything here names its field."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from llguidance.gbnf_to_lark import any_to_lark

from serve_app.engine.request import Grammar, Request, SamplingParams
from serve_app.ingress.faults import BadInputError, RefusedError
from serve_app.ingress.sse import Ticket
from serve_app.model.grammar_check import GrammarsBusyError
from serve_app.model.tokenizer import Tokenizer

MAX_SEED = (1 << 64) - 1
MAX_TEMPERATURE = 100.0
MAX_BIASES = 1024
MAX_BIAS = 100.0  # OpenAI's
MAX_TOP_LOGPROBS = 20  # OpenAI's
LEAST_REPETITION_PENALTY = 0.01  # what is divided by less soon has no place among fp32 numbers
GRAMMARS_BUSY_S = 5.0  # a Retry-After
MAX_GBNF_CHARS = 1 << 13  # the time to convert it grows with the square of its rules
GREEDY_BELOW = 1e-6  # a temperature under this overflows the logits it divides; SGLang draws the line there too


@dataclass(frozen=True)
class ModelInfo:
    """The model as clients see it."""

    name: str
    max_context_tokens: int  # prompt and answer together
    vocab_size: int
    created: int  # unix seconds


@dataclass(frozen=True)
class Limits:
    """What one HTTP request may ask for."""

    max_body_bytes: int = 2 << 20
    max_prompts: int = 256  # copies by `n` included
    max_rid_chars: int = 256
    max_stops: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 64
    max_status_wait_s: float = 2.0  # how long health pages wait for the engine
    max_placement_wait_s: float = 6.0  # longer than the engine waits for its router: its sentence is the better one


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    name: str  # of its field


@dataclass(frozen=True)
class Job:
    """One sequence to generate, and how its tokens become text.

    The client's name for it is `rid`. The engine knows it by a name that follows from that and all else that makes the
    answer (see `new_job`).
    """

    rid: str
    request: Request
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class Door:
    """The checks that need the model or the limits. Each raises BadInputError; `grammar` also RefusedError."""

    tokenizer: Tokenizer
    model: ModelInfo
    limits: Limits

    def name(self, ticket: Ticket) -> str:
        """The name of a request whose body gives none: the header's, or one made here and told with the answer."""
        if ticket.rid is not None:
            most = self.limits.max_rid_chars
            require(len(ticket.rid) <= most, "x-request-id", f"longer than {most} characters")
            return ticket.rid
        require(ticket.last_event_id is None, "Last-Event-ID", "names no request: its rid or x-request-id is needed")
        return uuid.uuid4().hex

    def prompt_of_text(self, text: str, name: str) -> Prompt:
        require(bool(text), name, "empty")
        tokens = self.tokenizer.encode(text)
        require(bool(tokens), name, "has no token")
        return Prompt(tokens, name)

    def prompt_of_ids(self, ids: Sequence[int], name: str) -> Prompt:
        require(bool(ids), name, "empty")
        self.check_ids(ids, name)
        return Prompt(list(ids), name)

    def prompt_of_messages(
        self, messages: list[dict[str, Any]], name: str, variables: Mapping[str, Any] | None = None
    ) -> Prompt:
        """`variables` are what the chat template sees besides: see `ChatTemplate.render`."""
        require(bool(messages), name, "empty")
        try:
            tokens = self.tokenizer.encode_chat(messages, **(variables or {}))
        except ValueError as error:
            raise BadInputError(name, str(error)) from None
        require(bool(tokens), name, "has no token")
        return Prompt(tokens, name)

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self.model.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.model.vocab_size)
            raise BadInputError(name, f"token {short(wrong)} is outside the vocabulary of {self.model.vocab_size}")

    def check_count(self, num_sequences: int, name: str) -> None:
        most = self.limits.max_prompts
        require(num_sequences <= most, name, f"{num_sequences} sequences in one request; the limit is {most}")

    def budget_tokens(self, prompt: Prompt, asked: int | None, default: int, name: str) -> int:
        """How many tokens may be generated. What was asked for must fit; the default shrinks to what does.

        SGLang and TGI refuse a sum over the context too. A prompt that leaves no room for one token is refused.
        """
        context, num_prompt = self.model.max_context_tokens, len(prompt.tokens)
        room = context - num_prompt
        require(room > 0, prompt.name, f"{num_prompt} tokens leave no room in the context of {context}")
        if asked is None:
            return min(default, room)
        require(asked > 0, name, f"must be at least 1, not {short(asked)}")
        require(asked <= room, name, f"{num_prompt} prompt tokens + {short(asked)} exceed the context of {context}")
        return asked

    def stops(self, stop: str | list[str] | None, name: str, max_stops: int | None = None) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        most = self.limits.max_stops if max_stops is None else max_stops
        require(len(stops) <= most, name, f"{len(stops)} stop strings; the limit is {most}")
        require(all(stops), name, "a stop string is empty")
        longest = self.limits.max_stop_chars
        require(max(map(len, stops), default=0) <= longest, name, f"a stop string is over {longest} characters")
        return stops

    def stop_token_ids(self, ids: Sequence[int], name: str) -> tuple[int, ...]:
        """Sorted, each once. Few: with a minimum of tokens they travel in every plan, which all streams wait for."""
        most = self.limits.max_stop_token_ids
        require(len(ids) <= most, name, f"{len(ids)} stop tokens; the limit is {most}")
        self.check_ids(ids, name)
        return tuple(sorted(set(ids)))

    def logit_bias(self, given: Mapping[str, float], name: str) -> tuple[tuple[int, float], ...]:
        """Sorted by token. The keys are token ids, written as JSON writes names."""
        require(len(given) <= MAX_BIASES, name, f"{len(given)} tokens; the limit is {MAX_BIASES}")
        for key, bias in given.items():
            require(key.isascii() and key.isdecimal() and len(key) < 10, name, f"{key[:24]!r} is no token id")
            in_range(bias, -MAX_BIAS, MAX_BIAS, name)
        biases = {int(key): bias for key, bias in given.items()}
        self.check_ids(list(biases), name)
        return tuple(sorted(biases.items()))

    def grammar(self, kind: Literal["json_schema", "regex", "lark"], text: str, name: str) -> Grammar:
        """A grammar that compiles. It takes milliseconds; a second or two where it is the first, or a bad one."""
        grammar = Grammar(kind, text)
        try:
            self.tokenizer.grammars.check(grammar)
        except ValueError as error:
            raise BadInputError(name, str(error)) from None
        except GrammarsBusyError as error:
            raise RefusedError("grammars-busy", str(error), GRAMMARS_BUSY_S) from None
        return grammar

    def gbnf(self, text: str, name: str) -> Grammar:
        """A grammar in llama.cpp's notation, with a rule `root`; one in Lark's is taken too."""
        require(len(text) <= MAX_GBNF_CHARS, name, f"longer than {MAX_GBNF_CHARS} characters")
        try:
            lark = any_to_lark(text)
        except Exception as error:  # the converter's own kinds are no better
            raise BadInputError(name, f"not a grammar: {' '.join(str(error).split())[:200]}") from None
        return self.grammar("lark", lark, name)

    def top_k(self, value: int) -> int:
        """The engine's form: 0 keeps all."""
        return value if 0 < value < self.model.vocab_size else 0


def new_job(
    rid: str, prompt: Prompt, sampling: SamplingParams, stops: tuple[str, ...], *, skip_special_tokens: bool = True
) -> Job:
    """The engine's name for a request is a digest of the client's name and of all that its tokens depend on.

    So an ingress replica that is sent the same body names the same request, and finds the answer that another one
    began; and nobody comes to an answer who does not know the whole question.
    """
    whole = msgspec.msgpack.encode((rid, prompt.tokens, sampling, stops))
    name = hashlib.blake2b(whole, digest_size=16).hexdigest()
    return Job(rid, Request(name, prompt.tokens, sampling), stops, skip_special_tokens)


def require(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise BadInputError(name, problem)


def short(value: float) -> str:
    """A client's number in a message: never longer than a line."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def temperature(value: float, name: str) -> float:
    in_range(value, 0.0, MAX_TEMPERATURE, name)
    return 0.0 if value < GREEDY_BELOW else value


def seed(value: int | None, rid: str, name: str) -> int:
    """The client's seed, or one that follows from the request's `rid`: sampling has no other source of chance.

    So a request that is resumed or tried again under its name has the same tokens, even if nobody has kept them; and
    one that was given a random name by us has a random seed.
    """
    if value is None:
        return int.from_bytes(hashlib.blake2b(rid.encode(), digest_size=8).digest())
    require(0 <= value <= MAX_SEED, name, f"must be a 64-bit unsigned integer, not {short(value)}")
    return value


def in_range(value: float, low: float, high: float, name: str, *, open_low: bool = False) -> None:
    above = value > low if open_low else value >= low
    bracket = "(" if open_low else "["
    require(above and value <= high, name, f"must be in {bracket}{low:g}, {high:g}], not {short(value)}")


def refuse_unsupported(fields: object, neutral: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Fields of the dialect that this server does not have yet may be null or one of their neutral values."""
    for name, values in neutral.items():
        value = getattr(fields, name)
        require(value is None or value in values, f"{prefix}{name}", "not supported by this server")
