"""Chat messages to prompt text, by the template that comes with a model: untrusted code, so in Jinja's sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve_app.errors import CheckpointError


class ChatTemplate:
    """A compiled template. `variables` are what it sees besides the messages: the names of the special tokens."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self.source = source
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the model's chat template does not compile: {error}") from None

    @classmethod
    def load(cls, folder: Path, tokenizer_config: Mapping[str, Any]) -> "ChatTemplate | None":
        """From `chat_template.jinja`, else `tokenizer_config.json`: a string, or a list of which "default" is taken."""
        path = folder / "chat_template.jinja"
        source = path.read_text("utf-8") if path.is_file() else _embedded(tokenizer_config)
        return None if source is None else cls(source, _special_tokens(tokenizer_config))

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt text, open for the assistant's answer unless `add_generation_prompt=False`.

        Raises ValueError, with the template's own sentence where it has one, for messages that it does not take.
        """
        variables = {**self._variables, "tools": None, "documents": None, "add_generation_prompt": True, **kwargs}
        try:
            return self._template.render(messages=messages, **variables)
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # the template is foreign code: whatever it trips over, the messages are refused
            raise ValueError(f"the chat template does not take these messages: {error}") from None


def _embedded(tokenizer_config: Mapping[str, Any]) -> str | None:
    given = tokenizer_config.get("chat_template")
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    if not isinstance(given, str | None):
        raise CheckpointError("chat_template in tokenizer_config.json is neither a string nor a list of named ones")
    return given


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, each a string or an object with `content`."""
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (the name that Jinja reads)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates, since templates are written against it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
