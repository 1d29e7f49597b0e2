"""A validated chat request: its answer and its events are OpenAI's."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from msgspec import UNSET

from serve_app.ingress.door import Job, ModelInfo
from serve_app.ingress.openai.answers import (
    AnswerCall,
    AnswerFunction,
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatDeltaChoice,
    ChatLogprobs,
    DeltaCall,
    DeltaFunction,
    Usage,
    encode,
    fingerprint,
    finish_reason,
    usage_of,
)
from serve_app.ingress.openai.logprobs import chat_logprobs, told_pieces
from serve_app.ingress.openai.reader import Called, CallReader, CallStyle, Delta, PlainReader, Reader, Said
from serve_app.ingress.openai.stream import Ends, Turn
from serve_app.ingress.output import Output, Piece
from serve_app.ingress.sse import Progress, sse_event
from serve_app.model.token_text import TokenTexts

_ID_CHARS = 24


@dataclass(frozen=True)
class Reading:
    """How calls of tools are found in an answer, and named."""

    style: CallStyle | None  # None: there are none
    max_calls: int | None
    num_id_chars: int | None  # of an id in all; None: OpenAI's form

    def reader(self) -> Reader:
        return PlainReader() if self.style is None else CallReader(self.style, self.max_calls)

    def call_id(self, rid: str, index: int) -> str:
        """The same for a stream that is resumed."""
        digest = hashlib.blake2b(f"{rid} {index}".encode(), digest_size=16).hexdigest()
        return f"call_{digest[:_ID_CHARS]}" if self.num_id_chars is None else digest[: self.num_id_chars]


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    name: str
    jobs: Sequence[Job]  # copies of one prompt
    stream: bool
    progress: Progress
    tells_usage: bool  # at the end of a stream
    reading: Reading
    model: ModelInfo
    texts: TokenTexts
    created: int  # unix seconds
    end: bytes = sse_event(b"[DONE]")

    def answer(self, outputs: list[Output]) -> bytes:
        return bytes(
            encode(
                ChatAnswer(
                    id=self._id,
                    created=self.created,
                    model=self.model.name,
                    system_fingerprint=fingerprint(self.model),
                    choices=[self._choice(i, output) for i, output in enumerate(outputs)],
                    usage=usage_of(self.jobs, outputs, len(self.jobs)),
                )
            )
        )

    def events(self, index: int, output: Output, pieces: list[Piece]) -> bytes:
        turn = self._turns[index]
        deltas = turn.read(output, pieces)
        event = b""
        if self.progress.is_news(index, len(output.tokens), is_end=output.finish is not None):
            event = self._event(index, output, deltas)
        usage = self._ends.note(index, output, len(self.jobs))
        if usage is None or not self.tells_usage:
            return event
        return event + sse_event(self._chunk([], usage))

    @property
    def _id(self) -> str:
        return f"chatcmpl-{self.name}"

    @cached_property
    def _turns(self) -> list[Turn]:
        return [Turn(self.reading.reader(), self.progress.had(i)) for i in range(len(self.jobs))]

    @cached_property
    def _ends(self) -> Ends:
        return Ends(self.jobs)

    def _choice(self, index: int, output: Output) -> ChatChoice:
        reader = self.reading.reader()
        text, calls = _folded(reader.push(output.text) + reader.finish())
        told = [
            AnswerCall(id=self.reading.call_id(self.jobs[index].rid, i), function=AnswerFunction(*call))
            for i, call in enumerate(calls)
        ]
        reason = finish_reason(output.finish, len(told))
        assert reason is not None, "finished"
        return ChatChoice(
            index=index,
            message=AnswerMessage(
                role="assistant", content=None if told and not text else text, refusal=None, tool_calls=told or UNSET
            ),
            logprobs=self._logprobs(index, output, 0),
            finish_reason=reason,
        )

    def _event(self, index: int, output: Output, deltas: Sequence[Delta]) -> bytes:
        """One event, however much is new: its id says that the client has it all. None where nothing is to be seen."""
        turn = self._turns[index]
        logprobs = self._logprobs(index, output, turn.num_told)
        reason = finish_reason(output.finish, turn.reader.num_calls)
        delta = self._delta(index, deltas, is_first=not turn.is_begun)
        if reason is None and not deltas and turn.is_begun and not (logprobs and logprobs.content):
            return b""
        turn.num_told = len(output.tokens)
        choice = ChatDeltaChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return sse_event(self._chunk([choice]), self.progress.advance(index, len(output.tokens)))

    def _delta(self, index: int, deltas: Sequence[Delta], *, is_first: bool) -> ChatDelta:
        text = "".join(delta.text for delta in deltas if isinstance(delta, Said))
        calls = [self._delta_call(index, delta) for delta in deltas if isinstance(delta, Called)]
        return ChatDelta(
            role="assistant" if is_first else UNSET,
            content=text if text or is_first else UNSET,
            tool_calls=calls or UNSET,
        )

    def _delta_call(self, index: int, call: Called) -> DeltaCall:
        if call.name is None:
            return DeltaCall(index=call.index, function=DeltaFunction(arguments=call.arguments))
        call_id = self.reading.call_id(self.jobs[index].rid, call.index)
        function = DeltaFunction(call.name, call.arguments)
        return DeltaCall(index=call.index, id=call_id, type="function", function=function)

    def _logprobs(self, index: int, output: Output, first: int) -> ChatLogprobs | None:
        if not self.jobs[index].request.sampling.logprobs:
            return None
        return chat_logprobs(self.texts, told_pieces(output, first))

    def _chunk(self, choices: list[ChatDeltaChoice], usage: Usage | None = None) -> bytes:
        return bytes(
            encode(
                ChatChunk(
                    id=self._id,
                    object="chat.completion.chunk",
                    created=self.created,
                    model=self.model.name,
                    system_fingerprint=fingerprint(self.model),
                    choices=choices,
                    usage=usage if self.tells_usage else UNSET,
                )
            )
        )


def _folded(deltas: Sequence[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """All that is said, and name and arguments of each call."""
    text = "".join(delta.text for delta in deltas if isinstance(delta, Said))
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        if isinstance(delta, Called):
            name, arguments = calls.get(delta.index, (delta.name or "", ""))
            calls[delta.index] = name, arguments + delta.arguments
    return text, list(calls.values())
