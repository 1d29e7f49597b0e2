"""The model as OpenAI lists it."""

from typing import Literal

import msgspec

from serve_app.ingress.door import ModelInfo


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int  # vLLM's


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


def card_of(model: ModelInfo) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, owned_by="octavo", max_model_len=model.max_context_tokens)
