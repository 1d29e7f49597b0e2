"""What /openapi.json says of OpenAI's routes and of vLLM's tokenizer routes."""

from typing import Any

from serve_app.ingress.openai import chat, completions, fields, tokenize
from serve_app.ingress.openai.answers import ChatAnswer, ChatChunk, CompletionAnswer
from serve_app.ingress.openai.chat import ChatFields
from serve_app.ingress.openai.completions import CompletionFields
from serve_app.ingress.openai.faults import ErrorBody, ModelNotFoundError, fault
from serve_app.ingress.openai.models import ModelCard, ModelList
from serve_app.ingress.openai.tokenize import DetokenizeAnswer, DetokenizeFields, TokenizeAnswer, TokenizeFields
from serve_app.ingress.openapi.generate import TOKEN_NAMES
from serve_app.ingress.openapi.problems import GENERATE_ERRORS, LOOK_UP_ERRORS, problems
from serve_app.ingress.openapi.schemas import (
    Schema,
    holds_tokens,
    ignored,
    names_model,
    narrow,
    narrow_to_neutral,
    one_of_them,
    schema_of,
    schemas_of,
)
from serve_app.ingress.openapi.words import (
    GENERATE_PARAMETERS,
    NAME_HEADER,
    event_stream,
    json_answer,
    request_body,
)

_CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
    "required": ["city", "country"],
    "additionalProperties": False,
}
_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_ASKED = [{"role": "user", "content": "What is the capital of France?"}]
_CHATS: dict[str, Any] = {
    "chat": {"messages": _ASKED, "max_completion_tokens": 40},
    "stream": {
        "messages": _ASKED,
        "max_completion_tokens": 40,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "json": {
        "messages": [{"role": "user", "content": "Name a city and its country."}],
        "max_completion_tokens": 80,
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY}},
    },
    "tool": {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "max_completion_tokens": 80,
        "tools": [_WEATHER],
        "tool_choice": "required",
    },
}
_COMPLETIONS: dict[str, Any] = {
    "text": {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0},
    "stream": {"prompt": ["Once upon a time", "The capital of France is"], "max_tokens": 40, "stream": True},
}
_USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_MADE = {"created": 1_790_000_000, "model": "tiny", "system_fingerprint": "fp_44709d6fcb"}
_CHAT_ANSWER = {
    "id": "chatcmpl-my-request-1",
    "object": "chat.completion",
    **_MADE,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE,
}
_COMPLETION_ANSWER = {
    "id": "cmpl-my-request-1",
    "object": "text_completion",
    **_MADE,
    "choices": [{"index": 0, "text": " there was", "logprobs": None, "finish_reason": "length"}],
    "usage": _USAGE,
}
_CARD = {
    "id": "tiny",
    "object": "model",
    "created": 1_790_000_000,
    "owned_by": "octavo",
    "max_model_len": 4096,
}
_STREAM_TEXT = (
    "With `stream`: events `data: JSON`, most with a line `id: N` before, each ended by an empty line. The id is what "
    "`Last-Event-ID` takes. `data: [DONE]` is the last. An answer that cannot be finished has an event with an `error` "
    "before that"
)
_CHAT_STREAM = (
    'id: 1\ndata: {"id":"chatcmpl-my-request-1","object":"chat.completion.chunk","created":1790000000,"model":"tiny",'
    '"system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"delta":{"content":"Paris."},"logprobs":null,'
    '"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
_COMPLETION_STREAM = (
    'id: 1\ndata: {"id":"cmpl-my-request-1","object":"text_completion","created":1790000000,"model":"tiny",'
    '"system_fingerprint":"fp_44709d6fcb","choices":[{"index":0,"text":" there","logprobs":null,'
    '"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
)
_NOT_FOUND = ModelNotFoundError("gpt-9", "tiny")
_FAULTS = {"openai": (fault, schema_of(ErrorBody))}


def _narrow() -> None:
    for body in (ChatFields, CompletionFields):
        narrow(body, {"top_p": {"exclusiveMinimum": 0}, "stop": {"minLength": 1}, "logit_bias": TOKEN_NAMES})
        holds_tokens(body, "stop_token_ids")
        ignored(body, fields.HINTS)
    ignored(ChatFields, chat.HINTS)
    narrow_to_neutral(ChatFields, chat.CHAT_NEUTRAL)
    narrow_to_neutral(CompletionFields, completions.COMPLETION_NEUTRAL)
    narrow_to_neutral(TokenizeFields, tokenize.TOKENIZE_NEUTRAL)
    one_of_them(TokenizeFields, ("prompt", "messages"))
    narrow(ChatFields, {"messages": {"minItems": 1}})
    narrow(CompletionFields, {"prompt": {"minLength": 1, "minItems": 1}})
    holds_tokens(CompletionFields, "prompt")
    holds_tokens(DetokenizeFields, "tokens")
    names_model(ChatFields, CompletionFields, TokenizeFields, DetokenizeFields)


def _generates(asked: type, bodies: dict[str, Any], ok: Schema) -> Schema:
    return {
        "parameters": GENERATE_PARAMETERS,
        "requestBody": request_body(schema_of(asked), bodies),
        "responses": {"200": ok, **problems(_FAULTS, (*GENERATE_ERRORS, _NOT_FOUND))},
    }


def _answer(answer: type, example: Any, chunk: type, stream: str) -> Schema:
    ok = json_answer("The whole answer; with `stream`, events", schema_of(answer), {"one": example}, NAME_HEADER)
    ok["content"] |= event_stream(_STREAM_TEXT, {"anyOf": schemas_of([chunk, ErrorBody])}, {"one": stream})
    return ok


def _looks_up(asked: type, bodies: dict[str, Any], answer: type, example: Any) -> Schema:
    return {
        "requestBody": request_body(schema_of(asked), bodies),
        "responses": {
            "200": json_answer("The answer", schema_of(answer), {"one": example}),
            **problems(_FAULTS, (*LOOK_UP_ERRORS, _NOT_FOUND)),
        },
    }


_narrow()
CHAT_OPENAPI = _generates(ChatFields, _CHATS, _answer(ChatAnswer, _CHAT_ANSWER, ChatChunk, _CHAT_STREAM))
COMPLETIONS_OPENAPI = _generates(
    CompletionFields,
    _COMPLETIONS,
    _answer(CompletionAnswer, _COMPLETION_ANSWER, CompletionAnswer, _COMPLETION_STREAM),
)
TOKENIZE_OPENAPI = _looks_up(
    TokenizeFields,
    {"text": {"prompt": "Once upon a time"}, "chat": {"messages": _ASKED}},
    TokenizeAnswer,
    {"count": 4, "max_model_len": 4096, "tokens": [9, 8, 7, 6], "token_strs": None},
)
DETOKENIZE_OPENAPI = _looks_up(DetokenizeFields, {"ids": {"tokens": [9, 8, 7]}}, DetokenizeAnswer, {"prompt": "Once"})
MODELS_OPENAPI: Schema = {
    "responses": {"200": json_answer("The models", schema_of(ModelList), {"one": {"object": "list", "data": [_CARD]}})}
}
MODEL_OPENAPI: Schema = {
    "responses": {
        "200": json_answer("The model", schema_of(ModelCard), {"one": _CARD}),
        **problems(_FAULTS, (_NOT_FOUND,)),
    }
}
