"""Text to token ids and back, whole or as a stream, from a checkpoint's `tokenizer.json`."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from serve_app.errors import CheckpointError
from serve_app.model.chat_template import ChatTemplate
from serve_app.model.grammar_check import GrammarChecker
from serve_app.model.spec import read_json

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER_TOKENS = 4  # UTF-8 has at most 4 bytes a character, and a token at least one byte
_MAX_WINDOW_TOKENS = 16


class Tokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None) -> None:
        self._backend = backend
        self._chat_template = chat_template

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` and, where they exist, `tokenizer_config.json` and `chat_template.jinja`.

        Raises CheckpointError where they are missing or unreadable.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"the checkpoint folder {folder} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{path} is not a valid tokenizer: {error}") from None
        backend.no_truncation()  # a file may carry the limits of its training; a server has its own
        backend.no_padding()
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        return cls(backend, ChatTemplate.load(folder, config))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id that the tokenizer knows; the model's own vocabulary may be padded."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of control tokens, which `decode` leaves out on request."""
        return frozenset(token for token, added in self._backend.get_added_tokens_decoder().items() if added.special)

    @cached_property
    def grammars(self) -> GrammarChecker:
        """What tries out the grammars that clients send, for this tokenizer."""
        return GrammarChecker(self._backend.to_str)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer's post-processor adds around it.

        Raises ValueError where the text has lone surrogates, which are no Unicode text.
        """
        return self._encode(text, add_special_tokens=add_special_tokens)

    @property
    def chat_template_source(self) -> str:
        """As it was read; empty where the model has none. What it mentions tells which roles and tools it knows."""
        return "" if self._chat_template is None else self._chat_template.source

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt text of chat messages: see `ChatTemplate.render`. ValueError where the model has no template."""
        if self._chat_template is None:
            raise ValueError("this model has no chat template: send a prompt instead of messages")
        return self._chat_template.render(messages, **kwargs)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of chat messages. The template writes the special tokens; none are added to them."""
        return self._encode(self.render(messages, **kwargs), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD; ids that the tokenizer lacks become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_name(self, token: int) -> str | None:
        """How the vocabulary itself writes a token: not its text. None for an id that the tokenizer lacks."""
        return self._backend.id_to_token(token)

    def has_text(self, token: int, skip_special_tokens: bool = True) -> bool:
        """Whether `decode` looks at this id at all: known, and not a special token that it leaves out."""
        if skip_special_tokens and token in self.special_ids:
            return False
        return self._backend.id_to_token(token) is not None

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        text.encode("utf-8")  # UnicodeEncodeError is a ValueError; the library's own would be a TypeError
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids


class Detokenizer:
    """Text of one stream as its tokens come, in steps whose cost does not grow with the text.

    What `push` and `finish` return, joined, is `decode` of all ids. Half a character is held back, for at most
    `_MAX_WINDOW_TOKENS` tokens. (One exception: tokenizers with byte fallback decode a whole run of byte tokens to
    U+FFFD for one bad byte in it; text of such a run that is already out stays as it was.)

    The window holds the last tokens: a clean context, whose text is out and which ends with a whole character, then
    the tokens since. The context is needed because decoders treat the first token apart (its space is stripped).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_context = 0  # tokens at the start of the window
        self._num_out = 0  # characters of the window's text that are out

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        return "".join(self._step(token) for token in ids)

    def finish(self) -> str:
        """What was held back, as it stands."""
        rest = self._text()[self._num_out :]
        self._window, self._num_context, self._num_out = [], 0, 0
        return rest

    def _step(self, token: int) -> str:
        if not self._tokenizer.has_text(token, self._skip_special_tokens):
            return ""  # and it must not become the context
        self._window.append(token)
        text = self._text()
        if not text.endswith(_REPLACEMENT):
            return self._emit(text, num_held=0, num_dropped=self._num_context)
        if len(self._window) > _MAX_WINDOW_TOKENS:
            # Not the start of a character but bytes that are none: only the last of them can still become one.
            return self._emit(text, num_held=1, num_dropped=len(self._window) - _MAX_CHARACTER_TOKENS)
        return ""

    def _emit(self, text: str, num_held: int, num_dropped: int) -> str:
        new = text[self._num_out : len(text) - num_held]
        self._window = self._window[num_dropped:]
        self._num_context = 0 if num_held else len(self._window)
        self._num_out = len(self._text()) - num_held
        return new

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special_tokens)
