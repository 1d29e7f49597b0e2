"""`POST /v1/chat/completions`: what is asked, and what becomes of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from serve_app.engine.request import Grammar
from serve_app.errors import OctavoError
from serve_app.ingress.body import decode
from serve_app.ingress.door import Door, Prompt, refuse_unsupported, require
from serve_app.ingress.faults import BadInputError
from serve_app.ingress.openai import faults
from serve_app.ingress.openai.chat_call import ChatCall, Reading
from serve_app.ingress.openai.fields import (
    NEUTRAL,
    CommonFields,
    Count,
    Hint,
    check_common,
    guided,
    name_of,
    new_jobs,
    one_grammar,
    sampling,
    schema_grammar,
)
from serve_app.ingress.openai.messages import Message, for_template
from serve_app.ingress.openai.reader import FORCED, CallStyle, style_of
from serve_app.ingress.openai.tools import Tool, Toolbox, ToolChoice, toolbox
from serve_app.ingress.sse import Ticket
from serve_app.model.token_text import TokenTexts
from serve_app.model.tokenizer import Tokenizer

MISTRAL_ID_CHARS = 9  # its templates refuse calls with longer ids
RESERVED_VARIABLES = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt"})


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    pass


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    pass


class JsonSchemaChoice(msgspec.Struct, tag_field="type", tag="json_schema", kw_only=True, forbid_unknown_fields=True):
    json_schema: JsonSchemaFormat


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaChoice


class ChatFields(CommonFields, kw_only=True, forbid_unknown_fields=True):
    """The body as written. Null is unset."""

    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    documents: list[dict[str, Any]] | None = None
    metadata: Hint = None
    store: Hint = None
    service_tier: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    prediction: Hint = None
    verbosity: Hint = None
    reasoning_effort: Hint = None
    include_reasoning: Hint = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: Any = None
    mm_processor_kwargs: Any = None


HINTS = (
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "verbosity",
    "reasoning_effort",
    "include_reasoning",
)
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": ("none",),
    "web_search_options": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "mm_processor_kwargs": ({},),
}


@dataclass(frozen=True)
class ChatPrompt:
    """What is rendered: also for `/tokenize`."""

    messages: Sequence[Message]
    tools: Toolbox
    variables: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    adds_generation_prompt: bool = True


class Chat:
    """The dialect. What the model's template can do is looked up once."""

    def __init__(self, tokenizer: Tokenizer, texts: TokenTexts) -> None:
        self._template = tokenizer.chat_template_source
        self._style = style_of(self._template)
        self._texts = texts

    def parse(self, body: bytes, door: Door, ticket: Ticket) -> ChatCall:
        """Validate and tokenize. Raises BadInputError."""
        try:
            return self._parse(decode(body, ChatFields), door, ticket)
        except RecursionError:
            raise BadInputError("body", "nested too deeply") from None

    def fault(self, error: OctavoError) -> tuple[int, bytes]:
        return faults.fault(error)

    def _parse(self, fields: ChatFields, door: Door, ticket: Ticket) -> ChatCall:
        check_common(door, fields)
        _check_logprobs(fields)
        refuse_unsupported(fields, CHAT_NEUTRAL)
        door.check_count(fields.n or 1, "n")
        stops = door.stops(fields.stop, "stop")
        tools = toolbox(fields.tools, fields.tool_choice)
        grammar = _grammar(door, fields, tools)
        prompt = self.prompt(
            door,
            ChatPrompt(
                fields.messages,
                tools,
                fields.chat_template_kwargs,
                fields.documents,
                fields.add_generation_prompt is not False,
            ),
        )
        top_logprobs = fields.top_logprobs or 0 if fields.logprobs else None
        params = sampling(door, prompt, fields, _asked(fields), door.model.max_context_tokens, top_logprobs, grammar)
        style = self._reads(tools)
        name = name_of(door, ticket, fields)
        skips = style is None or style.skip_special_tokens
        jobs = new_jobs(name, prompt, params, fields, stops, skip_special_tokens=skips)
        return ChatCall(
            name=name,
            jobs=jobs,
            stream=bool(fields.stream),
            progress=ticket.progress(len(jobs)),
            tells_usage=bool(fields.stream_options and fields.stream_options.include_usage),
            reading=Reading(style, 1 if fields.parallel_tool_calls is False else None, self._num_id_chars),
            model=door.model,
            texts=self._texts,
            created=int(time.time()),
        )

    @property
    def _num_id_chars(self) -> int | None:
        return MISTRAL_ID_CHARS if "[TOOL_CALLS]" in self._template else None

    def prompt(self, door: Door, given: ChatPrompt) -> Prompt:
        """Raises BadInputError where the template does not take it."""
        tools = given.tools
        require(bool(given.messages), "messages", "empty")
        require(
            not tools.tools or tools.is_forced or self._style is not None,
            "tools",
            "this model's chat template does not define tools: "
            "send tool_choice none or required, or name the tool to call",
        )
        messages = for_template(given.messages, self._template, has_tools=self._style is not None)
        if tools.tools and self._style is None:
            messages = _with_system(messages, tools.told())
        variables = dict(given.variables or {})
        wrong = next((name for name in variables if name in RESERVED_VARIABLES), None)
        require(wrong is None, "chat_template_kwargs", f"{wrong} is not to be set here")
        for_tools = tools.for_template() if self._style is not None else None
        variables |= {
            "tools": for_tools,
            "documents": given.documents,
            "add_generation_prompt": given.adds_generation_prompt,
        }
        return door.prompt_of_messages(messages, "messages", variables)

    def _reads(self, tools: Toolbox) -> CallStyle | None:
        if not tools.tools:
            return None
        return FORCED if tools.is_forced else self._style


def _check_logprobs(fields: ChatFields) -> None:
    require(not fields.top_logprobs or bool(fields.logprobs), "top_logprobs", "only allowed when logprobs is true")


def _asked(fields: ChatFields) -> tuple[str, int | None]:
    """The field that limits the tokens, and its value."""
    if fields.max_completion_tokens is not None:
        return "max_completion_tokens", fields.max_completion_tokens
    return "max_tokens", fields.max_tokens


def _grammar(door: Door, fields: ChatFields, tools: Toolbox) -> Grammar | None:
    """A forced call's, else what the format or vLLM's fields ask for."""
    if tools.is_forced:
        return schema_grammar(door, tools.schema(), "tools")
    grammar = one_grammar(
        ("response_format", _format(door, fields.response_format)), ("guided_*", guided(door, fields))
    )
    require(
        grammar is None or not tools.tools,
        "response_format",
        "keeps the model from calling tools: send tool_choice none or required with it",
    )
    return grammar


def _format(door: Door, given: ResponseFormat | None) -> Grammar | None:
    match given:
        case JsonObjectFormat():
            return schema_grammar(door, {"type": "object"}, "response_format")
        case JsonSchemaChoice(json_schema=JsonSchemaFormat(schema=schema)):
            return schema_grammar(door, {} if schema is None else schema, "response_format.json_schema.schema")
    return None


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The text behind the system message, or as one."""
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
