"""`POST /tokenize` and `/detokenize`, in vLLM's shapes."""

from collections.abc import Callable
from typing import Any

import msgspec

from serve_app.ingress.body import decode
from serve_app.ingress.door import Door, refuse_unsupported, require
from serve_app.ingress.faults import BadInputError
from serve_app.ingress.openai.chat import Chat, ChatPrompt
from serve_app.ingress.openai.fields import check_model
from serve_app.ingress.openai.messages import Message
from serve_app.ingress.openai.tools import Tool, toolbox


class TokenizeFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A `prompt` or `messages`; what is not of the one that is there must be unset."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None  # true for a prompt, false for messages: the template writes them
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeAnswer(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


class DetokenizeAnswer(msgspec.Struct):
    prompt: str


TOKENIZE_NEUTRAL: dict[str, tuple[Any, ...]] = {"continue_final_message": (False,), "chat_template": ()}


def tokenizing(chat: Chat) -> Callable[[bytes, Door], bytes]:
    """The answer to `/tokenize`, with messages as `chat` renders them."""

    def tokenize(body: bytes, door: Door) -> bytes:
        try:
            return _tokenized(decode(body, TokenizeFields), chat, door)
        except RecursionError:
            raise BadInputError("body", "nested too deeply") from None

    return tokenize


def _tokenized(fields: TokenizeFields, chat: Chat, door: Door) -> bytes:
    check_model(door, fields.model)
    refuse_unsupported(fields, TOKENIZE_NEUTRAL)
    tokens = _tokens(fields, chat, door)
    names = [door.tokenizer.token_name(token) or "" for token in tokens] if fields.return_token_strs else None
    return msgspec.json.encode(TokenizeAnswer(len(tokens), door.model.max_context_tokens, tokens, names))


def _tokens(fields: TokenizeFields, chat: Chat, door: Door) -> list[int]:
    if fields.prompt is not None:
        require(fields.messages is None, "prompt and messages", "exactly one of them is needed")
        return door.tokenizer.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)
    if fields.messages is None:
        raise BadInputError("prompt", "exactly one of prompt and messages is needed")
    require(not fields.add_special_tokens, "add_special_tokens", "not supported for messages")
    given = ChatPrompt(
        fields.messages,
        toolbox(fields.tools, None),
        fields.chat_template_kwargs,
        adds_generation_prompt=fields.add_generation_prompt is not False,
    )
    return chat.prompt(door, given).tokens


def detokenize(body: bytes, door: Door) -> bytes:
    """The text of the tokens, special ones included, as vLLM gives it."""
    fields = decode(body, DetokenizeFields)
    check_model(door, fields.model)
    door.check_ids(fields.tokens, "tokens")
    return msgspec.json.encode(DetokenizeAnswer(door.tokenizer.decode(fields.tokens, skip_special_tokens=False)))
