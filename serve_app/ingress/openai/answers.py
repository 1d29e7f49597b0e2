"""The bodies of answers and events, as OpenAI has them."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec

from serve_app import __version__
from serve_app.ingress.door import Job, ModelInfo
from serve_app.ingress.faults import AbortedError
from serve_app.ingress.output import Finish, Output

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Four lists of one length, an entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]  # in characters of the choice's text


class AnswerFunction(msgspec.Struct):
    name: str
    arguments: str


class AnswerCall(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(msgspec.Struct, omit_defaults=True, kw_only=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnswerCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaFunction(msgspec.Struct, omit_defaults=True):
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET


class DeltaCall(msgspec.Struct, omit_defaults=True, kw_only=True):
    index: int
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET
    function: DeltaFunction


class ChatDelta(msgspec.Struct, omit_defaults=True, kw_only=True):
    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[DeltaCall] | msgspec.UnsetType = msgspec.UNSET


class ChatDeltaChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(msgspec.Struct, omit_defaults=True, kw_only=True):
    """`usage` is null in all chunks but the last where it is asked for, else left out."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatDeltaChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionAnswer(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A whole answer, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


def usage_of(jobs: Sequence[Job], outputs: Sequence[Output], num_copies: int) -> Usage:
    """A prompt counts once, whatever the number of its copies; what was cached is what its first copy found."""
    firsts = range(0, len(jobs), num_copies)
    num_prompt = sum(len(jobs[i].request.prompt) for i in firsts)
    num_new = sum(len(output.tokens) for output in outputs)
    num_cached = sum(outputs[i].num_cached_tokens for i in firsts)
    return Usage(num_prompt, num_new, num_prompt + num_new, PromptDetails(num_cached))


def finish_reason(finish: Finish | None, num_calls: int = 0) -> FinishReason | None:
    """Raises AbortedError where somebody ended the request: OpenAI has no word for that."""
    match finish:
        case None:
            return None
        case Finish("length"):
            return "length"
        case Finish("abort"):
            raise AbortedError("the request was aborted")
    return "tool_calls" if num_calls else "stop"


@lru_cache(8)
def fingerprint(model: ModelInfo) -> str:
    """Changes with what may change the tokens of one seed."""
    whole = f"{model.name} {model.created} {__version__}".encode()
    return f"fp_{hashlib.blake2b(whole, digest_size=5).hexdigest()}"


encode: Any = msgspec.json.Encoder().encode
