"""OpenAI's routes, and vLLM's tokenizer routes."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve_app.ingress.health import json_response
from serve_app.ingress.openai.chat import Chat
from serve_app.ingress.openai.completions import Completions
from serve_app.ingress.openai.document import (
    CHAT_OPENAPI,
    COMPLETIONS_OPENAPI,
    DETOKENIZE_OPENAPI,
    MODEL_OPENAPI,
    MODELS_OPENAPI,
    TOKENIZE_OPENAPI,
)
from serve_app.ingress.openai.faults import ModelNotFoundError, fault
from serve_app.ingress.openai.models import ModelList, card_of
from serve_app.ingress.openai.tokenize import detokenize, tokenizing
from serve_app.ingress.serving import Service
from serve_app.model.token_text import TokenTexts


def openai_routes(service: Service) -> APIRouter:
    """Completions, chat, models, and vLLM's tokenizer routes."""
    router = APIRouter(tags=["openai"])
    tokenizer = service.door.tokenizer
    texts = TokenTexts(tokenizer)
    chat, completions = Chat(tokenizer, texts), Completions(texts)

    @router.post("/v1/chat/completions", openapi_extra=CHAT_OPENAPI)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of `chat.completion.chunk` events with ids."""
        return await service.generate(request, chat)

    @router.post("/v1/completions", openapi_extra=COMPLETIONS_OPENAPI)
    async def text_completions(request: Request) -> Response:
        """Go on with one prompt or several, whole or as a stream of events with ids."""
        return await service.generate(request, completions)

    router.include_router(_tokenizer_routes(service, chat))
    router.include_router(_model_routes(service))
    return router


def _tokenizer_routes(service: Service, chat: Chat) -> APIRouter:
    router = APIRouter()
    answer = tokenizing(chat)

    @router.post("/tokenize", openapi_extra=TOKENIZE_OPENAPI)
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt, or of messages as the chat template renders them."""
        return await service.look_up(request, answer, fault)

    @router.post("/detokenize", openapi_extra=DETOKENIZE_OPENAPI)
    async def to_text(request: Request) -> Response:
        """The text of token ids."""
        return await service.look_up(request, detokenize, fault)

    return router


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    card = card_of(service.door.model)

    @router.get("/v1/models", openapi_extra=MODELS_OPENAPI)
    async def models() -> Response:
        """The one model that this server serves, as OpenAI lists models."""
        return json_response(200, ModelList([card]))

    @router.get("/v1/models/{model:path}", openapi_extra=MODEL_OPENAPI)
    async def model_named(model: str) -> Response:
        """The model of this name."""
        if model == card.id:
            return json_response(200, card)
        status, body = fault(ModelNotFoundError(model, card.id))
        return Response(body, status, media_type="application/json")

    return router
