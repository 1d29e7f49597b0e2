"""OpenAI's routes, and what /openapi.json says of them."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve_app.ingress.health import json_response
from serve_app.ingress.openai.answers import ChatAnswer, ChatChunk, CompletionAnswer
from serve_app.ingress.openai.chat import Chat, ChatFields
from serve_app.ingress.openai.completions import CompletionFields, Completions
from serve_app.ingress.openai.faults import ErrorBody, ModelNotFoundError, fault
from serve_app.ingress.openai.models import ModelCard, ModelList, card_of
from serve_app.ingress.openai.tokenize import (
    DetokenizeAnswer,
    DetokenizeFields,
    TokenizeAnswer,
    TokenizeFields,
    detokenize,
    tokenizing,
)
from serve_app.ingress.openapi import schemas_of
from serve_app.ingress.serving import Service
from serve_app.model.token_text import TokenTexts

_CHAT_EXAMPLES: dict[str, Any] = {
    "chat": {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_completion_tokens": 40},
    "stream": {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_completion_tokens": 40,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "json": {
        "messages": [{"role": "user", "content": "Name a city and its country."}],
        "max_completion_tokens": 80,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "city",
                "schema": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
                    "required": ["city", "country"],
                    "additionalProperties": False,
                },
            },
        },
    },
    "tool": {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "max_completion_tokens": 80,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string"}},
                        "required": ["city"],
                    },
                },
            }
        ],
        "tool_choice": "required",
    },
}
_COMPLETION_EXAMPLES: dict[str, Any] = {
    "text": {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0},
    "stream": {"prompt": ["Once upon a time", "The capital of France is"], "max_tokens": 40, "stream": True},
}
_PROBLEMS = {
    400: "What is wrong with the request; `param` names the field",
    404: "Another model than the one that is served",
    408: "Not finished within the time that `x-request-timeout-ms` allows",
    409: "The client came back for its answer by another connection",
    413: "The body is too large",
    429: "Not let in now: `Retry-After` says when; `code` says why",
    499: "Somebody ended the request by its name",
    500: "The answer could not be finished",
    503: "No engine answers, or none has capacity",
}
_LOOK_UP_PROBLEMS = (400, 404, 413)

_TYPES: tuple[type, ...] = (
    ChatFields,
    ChatAnswer,
    ChatChunk,
    CompletionFields,
    CompletionAnswer,
    TokenizeFields,
    TokenizeAnswer,
    DetokenizeFields,
    DetokenizeAnswer,
    ModelCard,
    ModelList,
    ErrorBody,
)
_SCHEMAS = dict(zip(_TYPES, schemas_of(_TYPES), strict=True))


def openai_routes(service: Service) -> APIRouter:
    """Completions, chat, models, and vLLM's tokenizer routes."""
    router = APIRouter(tags=["openai"])
    tokenizer = service.door.tokenizer
    texts = TokenTexts(tokenizer)
    chat, completions = Chat(tokenizer, texts), Completions(texts)

    @router.post("/v1/chat/completions", openapi_extra=_generates(ChatFields, ChatAnswer, ChatChunk, _CHAT_EXAMPLES))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of `chat.completion.chunk` events with ids."""
        return await service.generate(request, chat)

    @router.post(
        "/v1/completions",
        openapi_extra=_generates(CompletionFields, CompletionAnswer, CompletionAnswer, _COMPLETION_EXAMPLES),
    )
    async def text_completions(request: Request) -> Response:
        """Go on with one prompt or several, whole or as a stream of events with ids."""
        return await service.generate(request, completions)

    router.include_router(_tokenizer_routes(service, chat))
    router.include_router(_model_routes(service))
    return router


def _tokenizer_routes(service: Service, chat: Chat) -> APIRouter:
    router = APIRouter()
    answer = tokenizing(chat)

    @router.post(
        "/tokenize", openapi_extra=_looks_up(TokenizeFields, TokenizeAnswer, {"text": {"prompt": "Once upon a time"}})
    )
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt, or of messages as the chat template renders them."""
        return await service.look_up(request, answer, fault)

    @router.post(
        "/detokenize", openapi_extra=_looks_up(DetokenizeFields, DetokenizeAnswer, {"ids": {"tokens": [1, 2, 3]}})
    )
    async def to_text(request: Request) -> Response:
        """The text of token ids."""
        return await service.look_up(request, detokenize, fault)

    return router


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    card = card_of(service.door.model)

    @router.get("/v1/models", openapi_extra={"responses": {"200": _answer("The models", ModelList)}})
    async def models() -> Response:
        """The one model that this server serves, as OpenAI lists models."""
        return json_response(200, ModelList([card]))

    @router.get(
        "/v1/models/{model:path}",
        openapi_extra={
            "responses": {"200": _answer("The model", ModelCard), "404": _answer(_PROBLEMS[404], ErrorBody)}
        },
    )
    async def model_named(model: str) -> Response:
        """The model of this name."""
        if model == card.id:
            return json_response(200, card)
        status, body = fault(ModelNotFoundError(model, card.id))
        return Response(body, status, media_type="application/json")

    return router


def _generates(fields: type, answer: type, chunk: type, examples: dict[str, Any]) -> dict[str, Any]:
    ok = _answer("The whole answer; with `stream`, events", answer)
    ok["content"]["text/event-stream"] = {"schema": _event_schema(chunk)}
    return _documented(fields, examples, ok, tuple(_PROBLEMS))


def _event_schema(chunk: type) -> dict[str, Any]:
    """Of one server-sent event."""
    text = f"JSON of a {chunk.__name__}; of an ErrorBody where the answer could not be finished; `[DONE]` at the end"
    ids = "How many tokens of each choice are told by now: what `Last-Event-ID` takes"
    return {
        "type": "object",
        "properties": {"data": {"type": "string", "description": text}, "id": {"type": "string", "description": ids}},
        "required": ["data"],
    }


def _looks_up(fields: type, answer: type, examples: dict[str, Any]) -> dict[str, Any]:
    return _documented(fields, examples, _answer("The answer", answer), _LOOK_UP_PROBLEMS)


def _documented(
    fields: type, examples: dict[str, Any], ok: dict[str, Any], problems: tuple[int, ...]
) -> dict[str, Any]:
    body = {
        "schema": _SCHEMAS[fields],
        "examples": {name: {"value": example} for name, example in examples.items()},
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": ok, **{str(status): _answer(_PROBLEMS[status], ErrorBody) for status in problems}},
    }


def _answer(text: str, body: type) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _SCHEMAS[body]}}}
