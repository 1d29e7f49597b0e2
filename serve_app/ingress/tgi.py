"""`POST /generate` as Text Generation Inference speaks it: `inputs`, one prompt.

The rules are those of TGI's router (`router/src/validation.rs`): an unset `do_sample` means greedy unless a
temperature, top_k or top_p asks for sampling. Two are wider: a neutral `top_p` of 1 is no error, and an explicit
`do_sample: false` is greedy whatever else is set. A stream has one event per token; their texts, special tokens
left out, add up to `generated_text`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from serve_app.engine.request import Grammar, SamplingParams
from serve_app.errors import OctavoError
from serve_app.ingress.body import decode
from serve_app.ingress.client import EngineUnavailableError
from serve_app.ingress.door import (
    GREEDY_BELOW,
    LEAST_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    Door,
    Job,
    Prompt,
    in_range,
    new_job,
    refuse_unsupported,
    require,
    seed,
    short,
)
from serve_app.ingress.faults import BadInputError, BodyTooLargeError, GenerationError, RefusedError, TimedOutError
from serve_app.ingress.output import Finish, Output, Piece
from serve_app.ingress.sse import Progress, Ticket, sse_event
from serve_app.model.tokenizer import Tokenizer

PROMPT_FIELDS = frozenset({"inputs"})
DEFAULT_NEW_TOKENS = 100
MAX_STOPS = 4
MAX_TOP_TOKENS = 5
MAX_REPETITION_PENALTY = 100.0


class TgiGrammar(msgspec.Struct, forbid_unknown_fields=True):
    """`value`: a JSON schema, whole or as text; or the text of a regular expression."""

    type: Literal["json", "json_schema", "regex"]
    value: str | dict[str, Any]


class TgiParameters(msgspec.Struct, forbid_unknown_fields=True):
    """`parameters` as written. Null is unset. See NEUTRAL for those that must stay neutral."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: bool | None = None
    seed: int | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    details: bool | None = None
    return_full_text: bool | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    watermark: bool | None = None
    decoder_input_details: bool | None = None
    best_of: int | None = None
    top_n_tokens: int | None = None
    grammar: TgiGrammar | None = None
    adapter_id: Any = None


class TgiFields(msgspec.Struct, forbid_unknown_fields=True):
    inputs: str
    parameters: TgiParameters | None = None
    stream: bool | None = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "best_of": (1,),
    "adapter_id": (),
}


def parse(body: bytes, door: Door, ticket: Ticket) -> "TgiCall":
    """Validate and tokenize. Raises BadInputError."""
    fields = decode(body, TgiFields)
    parameters = fields.parameters or TgiParameters()
    refuse_unsupported(parameters, NEUTRAL, "parameters.")
    stream, details = bool(fields.stream), bool(parameters.details)
    prompt = _prompt(door, fields.inputs, parameters.truncate)
    name = door.name(ticket)
    sampling = _sampling(door, prompt, parameters, name, logprobs=stream or details)
    stops = door.stops(parameters.stop, "parameters.stop", MAX_STOPS)
    prefix = fields.inputs if parameters.return_full_text else ""
    jobs = [new_job(name, prompt, sampling, stops)]
    return TgiCall(name, jobs, stream, ticket.progress(1), details, prefix, door.tokenizer)


def _prompt(door: Door, text: str, truncate: int | None) -> Prompt:
    prompt = door.prompt_of_text(text, "inputs")
    if truncate is None:
        return prompt
    most = door.model.max_context_tokens
    in_range(truncate, 1, most, "parameters.truncate")
    return Prompt(prompt.tokens[-truncate:], prompt.name)


def _sampling(door: Door, prompt: Prompt, fields: TgiParameters, rid: str, *, logprobs: bool) -> SamplingParams:
    heat = 1.0 if fields.temperature is None else fields.temperature
    in_range(heat, 0.0, MAX_TEMPERATURE, "parameters.temperature", open_low=True)
    top_p = 1.0 if fields.top_p is None else fields.top_p
    in_range(top_p, 0.0, 1.0, "parameters.top_p", open_low=True)
    top_k = fields.top_k
    require(top_k is None or top_k > 0, "parameters.top_k", f"must be positive, not {short(top_k or 0)}")
    max_new = door.budget_tokens(prompt, fields.max_new_tokens, DEFAULT_NEW_TOKENS, "parameters.max_new_tokens")
    frequency_penalty = fields.frequency_penalty or 0.0
    in_range(frequency_penalty, -2.0, 2.0, "parameters.frequency_penalty")
    repetition = 1.0 if fields.repetition_penalty is None else fields.repetition_penalty
    in_range(repetition, LEAST_REPETITION_PENALTY, MAX_REPETITION_PENALTY, "parameters.repetition_penalty")
    num_top = fields.top_n_tokens or 0
    in_range(num_top, 0, MAX_TOP_TOKENS, "parameters.top_n_tokens")
    is_sampled = _is_sampled(fields) and heat >= GREEDY_BELOW
    return SamplingParams(
        max_new_tokens=max_new,
        temperature=heat if is_sampled else 0.0,
        top_k=door.top_k(top_k or 0),
        top_p=top_p,
        seed=seed(fields.seed, rid, "parameters.seed"),
        logprobs=logprobs,
        top_logprobs=num_top if logprobs else 0,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition,
        grammar=_grammar(door, fields.grammar),
    )


def _grammar(door: Door, given: TgiGrammar | None) -> Grammar | None:
    if given is None:
        return None
    name = "parameters.grammar.value"
    if given.type == "regex":
        if not isinstance(given.value, str):
            raise BadInputError(name, "a regular expression must be a string")
        return door.grammar("regex", given.value, name)
    text = given.value if isinstance(given.value, str) else msgspec.json.encode(given.value).decode()
    return door.grammar("json_schema", text, name)


def _is_sampled(fields: TgiParameters) -> bool:
    if fields.do_sample is not None:
        return fields.do_sample
    return any(value is not None for value in (fields.temperature, fields.top_k, fields.top_p))


class TgiToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class TgiDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None  # null where nothing was sampled
    prefill: list[TgiToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] | msgspec.UnsetType = msgspec.UNSET


class TgiStreamDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class TgiAnswer(msgspec.Struct, omit_defaults=True):
    generated_text: str
    details: TgiDetails | msgspec.UnsetType = msgspec.UNSET


class TgiEvent(msgspec.Struct):
    index: int  # of the token, from 1
    token: TgiToken
    generated_text: str | None = None
    details: TgiStreamDetails | None = None
    top_tokens: list[TgiToken] | msgspec.UnsetType = msgspec.UNSET


_NO_TOKEN = Piece(0, None, "", special=True)  # for an end that came without one: the last event must have a token

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class TgiCall:
    """A validated request. Its answers and events are TGI's."""

    name: str
    jobs: Sequence[Job]
    stream: bool
    progress: Progress
    details: bool
    prefix: str  # the prompt, where the full text is asked for
    tokenizer: Tokenizer
    end: bytes = b""

    def answer(self, outputs: list[Output]) -> bytes:
        output = outputs[0]
        finish_reason = _finish_reason(output.finish)
        answer = TgiAnswer(self.prefix + output.text)
        if self.details:
            tokens = [self._token(piece) for piece in output.pieces]
            answer.details = TgiDetails(finish_reason, len(tokens), self._seed(), [], tokens)
            if self._has_tops:
                answer.details.top_tokens = [self._top(piece) for piece in output.pieces]
        return _encode(answer)

    def events(self, index: int, output: Output, pieces: list[Piece]) -> bytes:
        num_tokens = len(output.pieces)
        numbered = enumerate(pieces, num_tokens - len(pieces) + 1)
        events = [self._event(n, piece) for n, piece in numbered if self.progress.is_news(index, n)]
        if output.finish is not None and not events and self.progress.is_news(index, num_tokens, is_end=True):
            events = [TgiEvent(num_tokens, self._token(_NO_TOKEN))]
        if output.finish is not None and events:
            events[-1].generated_text = self.prefix + output.text
            events[-1].details = self._stream_details(index, output)
        return b"".join(sse_event(_encode(event), self.progress.advance(index, event.index)) for event in events)

    @property
    def _has_tops(self) -> bool:
        return self.jobs[0].request.sampling.top_logprobs > 0

    def _event(self, number: int, piece: Piece) -> TgiEvent:
        event = TgiEvent(number, self._token(piece))
        if self._has_tops:
            event.top_tokens = self._top(piece)
        return event

    def _top(self, piece: Piece) -> list[TgiToken]:
        """Each by itself: what it would have become amid the text nobody has decided."""
        decode, special_ids = self.tokenizer.decode, self.tokenizer.special_ids
        return [
            TgiToken(token, decode([token], skip_special_tokens=False), logprob, token in special_ids)
            for token, logprob in piece.top
        ]

    def _stream_details(self, index: int, output: Output) -> TgiStreamDetails:
        num_prompt = len(self.jobs[index].request.prompt)
        return TgiStreamDetails(_finish_reason(output.finish), len(output.pieces), self._seed(), num_prompt)

    def _token(self, piece: Piece) -> TgiToken:
        """A special token shows its own name, unless it carries text that was held back before it."""
        if piece is _NO_TOKEN:
            return TgiToken(piece.token, piece.text, piece.logprob, piece.special)
        special = piece.special and not piece.text
        text = self.tokenizer.decode([piece.token], skip_special_tokens=False) if special else piece.text
        return TgiToken(piece.token, text, piece.logprob, special)

    def _seed(self) -> int | None:
        sampling = self.jobs[0].request.sampling
        return sampling.seed if sampling.temperature > 0 else None


def _finish_reason(finish: Finish | None) -> str:
    match finish:
        case Finish("length"):
            return "length"
        case Finish("stop", str()):
            return "stop_sequence"
        case Finish("stop"):
            return "eos_token"
    raise GenerationError("the request was aborted")  # TGI has no word for it


def fault(error: OctavoError) -> tuple[int, bytes]:
    """HTTP status and JSON body as TGI's router gives them, with the field added."""
    match error:
        case BodyTooLargeError():
            status, kind, message = 413, "validation", f"Input validation error: {error}"
        case BadInputError():
            status, kind, message = 422, "validation", f"Input validation error: {error}"
        case EngineUnavailableError():
            status, kind, message = 503, "unavailable", str(error)
        case RefusedError():
            status, kind, message = error.status, "overloaded", str(error)
        case TimedOutError():
            status, kind, message = 504, "timeout", str(error)
        case _:
            status, kind, message = 424, "generation", f"Request failed during generation: {error}"
    body: dict[str, Any] = {"error": message, "error_type": kind}
    if isinstance(error, BadInputError):
        body["field"] = error.field
    return status, _encode(body)
