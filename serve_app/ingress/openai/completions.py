"""`POST /v1/completions`: what is asked, and what becomes of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta

from serve_app.errors import OctavoError
from serve_app.ingress.body import decode
from serve_app.ingress.door import Door, Job, ModelInfo, Prompt, refuse_unsupported, require
from serve_app.ingress.faults import BadInputError
from serve_app.ingress.openai import faults
from serve_app.ingress.openai.answers import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    encode,
    fingerprint,
    finish_reason,
    usage_of,
)
from serve_app.ingress.openai.fields import (
    NEUTRAL,
    CommonFields,
    check_common,
    guided,
    name_of,
    new_jobs,
    sampling,
)
from serve_app.ingress.openai.logprobs import completion_logprobs, told_pieces
from serve_app.ingress.openai.reader import Delta, PlainReader, Said
from serve_app.ingress.openai.stream import Ends, Turn
from serve_app.ingress.output import Output, Piece
from serve_app.ingress.sse import Progress, Ticket, sse_event
from serve_app.model.token_text import TokenTexts

DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5


class CompletionFields(CommonFields, kw_only=True, forbid_unknown_fields=True):
    """The body as written. Null is unset."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
    response_format: Any = None


COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "suffix": ("",),
    "add_special_tokens": (True,),
    "response_format": ({"type": "text"},),
}


class Completions:
    """The dialect."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def parse(self, body: bytes, door: Door, ticket: Ticket) -> "CompletionCall":
        """Validate and tokenize. Raises BadInputError."""
        try:
            return self._parse(decode(body, CompletionFields), door, ticket)
        except RecursionError:
            raise BadInputError("body", "nested too deeply") from None

    def fault(self, error: OctavoError) -> tuple[int, bytes]:
        return faults.fault(error)

    def _parse(self, fields: CompletionFields, door: Door, ticket: Ticket) -> "CompletionCall":
        check_common(door, fields)
        refuse_unsupported(fields, COMPLETION_NEUTRAL)
        require(not fields.echo or fields.logprobs is None, "echo", "not supported together with logprobs")
        raw_prompts = _raw_prompts(fields.prompt)
        num_copies = fields.n or 1
        door.check_count(len(raw_prompts) * num_copies, "prompt" if num_copies == 1 else "n")
        name = name_of(door, ticket, fields)
        asked = ("max_tokens", fields.max_tokens)
        grammar, stops = guided(door, fields), door.stops(fields.stop, "stop")
        jobs: list[Job] = []
        for i, raw in enumerate(raw_prompts):
            is_one = len(raw_prompts) == 1
            prompt = _prompt(door, raw, "prompt" if is_one else f"prompt[{i}]")
            params = sampling(door, prompt, fields, asked, DEFAULT_MAX_TOKENS, fields.logprobs, grammar)
            jobs += new_jobs(name if is_one else f"{name}_{i}", prompt, params, fields, stops)
        return CompletionCall(
            name=name,
            jobs=jobs,
            stream=bool(fields.stream),
            progress=ticket.progress(len(jobs)),
            num_copies=num_copies,
            tells_usage=bool(fields.stream_options and fields.stream_options.include_usage),
            echoes=[_echo(door, raw) if fields.echo else "" for raw in raw_prompts],
            model=door.model,
            texts=self._texts,
            created=int(time.time()),
        )


def _raw_prompts(given: str | list[Any]) -> list[Any]:
    """Each prompt: a text, or token ids."""
    if isinstance(given, str):
        return [given]
    require(bool(given), "prompt", "empty")
    kinds = {type(item) for item in given}
    require(len(kinds) == 1, "prompt", "a text, a list of texts, token ids or a list of lists of them: no mixture")
    return [given] if kinds == {int} else given


def _prompt(door: Door, raw: str | list[int], name: str) -> Prompt:
    return door.prompt_of_text(raw, name) if isinstance(raw, str) else door.prompt_of_ids(raw, name)


def _echo(door: Door, raw: str | list[int]) -> str:
    return raw if isinstance(raw, str) else door.tokenizer.decode(raw, skip_special_tokens=False)


@dataclass(frozen=True, kw_only=True)
class CompletionCall:
    """A validated request: its answer and its events are OpenAI's."""

    name: str
    jobs: Sequence[Job]  # the copies of each prompt side by side
    stream: bool
    progress: Progress
    num_copies: int
    tells_usage: bool  # at the end of a stream
    echoes: Sequence[str]  # what each prompt's answers begin with
    model: ModelInfo
    texts: TokenTexts
    created: int  # unix seconds
    end: bytes = sse_event(b"[DONE]")

    def answer(self, outputs: list[Output]) -> bytes:
        choices = [self._choice(i, output, output.text, 0, is_first=True) for i, output in enumerate(outputs)]
        return self._body(choices, usage_of(self.jobs, outputs, self.num_copies))

    def events(self, index: int, output: Output, pieces: list[Piece]) -> bytes:
        turn = self._turns[index]
        deltas = turn.read(output, pieces)
        event = b""
        if self.progress.is_news(index, len(output.tokens), is_end=output.finish is not None):
            event = self._event(index, output, deltas)
        usage = self._ends.note(index, output, self.num_copies)
        if usage is None or not self.tells_usage:
            return event
        return event + sse_event(self._body([], usage))

    @cached_property
    def _turns(self) -> list[Turn]:
        return [Turn(PlainReader(), self.progress.had(i)) for i in range(len(self.jobs))]

    @cached_property
    def _ends(self) -> Ends:
        return Ends(self.jobs)

    def _event(self, index: int, output: Output, deltas: Sequence[Delta]) -> bytes:
        turn = self._turns[index]
        text = "".join(delta.text for delta in deltas if isinstance(delta, Said))
        choice = self._choice(index, output, text, turn.num_told, is_first=not turn.is_begun)
        if not choice.text and choice.finish_reason is None and not (choice.logprobs and choice.logprobs.tokens):
            return b""
        turn.num_told = len(output.tokens)
        body = self._body([choice], None if self.tells_usage else UNSET)
        return sse_event(body, self.progress.advance(index, len(output.tokens)))

    def _choice(self, index: int, output: Output, text: str, first: int, *, is_first: bool) -> CompletionChoice:
        """`first`: the first token of it that is told."""
        echo = self.echoes[index // self.num_copies]
        return CompletionChoice(
            index=index,
            text=echo + text if is_first else text,
            logprobs=self._logprobs(index, output, first),
            finish_reason=finish_reason(output.finish),
        )

    def _logprobs(self, index: int, output: Output, first: int) -> CompletionLogprobs | None:
        sampling = self.jobs[index].request.sampling
        if not sampling.logprobs:
            return None
        offset = sum(len(piece.text) for piece in output.pieces[:first])
        return completion_logprobs(self.texts, told_pieces(output, first), offset, sampling.top_logprobs)

    def _body(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> bytes:
        return bytes(
            encode(
                CompletionAnswer(
                    id=f"cmpl-{self.name}",
                    object="text_completion",
                    created=self.created,
                    model=self.model.name,
                    system_fingerprint=fingerprint(self.model),
                    choices=choices,
                    usage=usage,
                )
            )
        )
