"""What one token stands for: its text, and its bytes where they are only part of a character."""

import re
from functools import lru_cache

from serve_app.model.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how tokenizers with byte fallback name a byte
_MAX_CACHED = 1 << 16


def _byte_of_letter() -> dict[str, int]:
    """Byte-level tokenizers (GPT-2's and what followed) write each byte as one printable letter."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()


class TokenTexts:
    """Texts and bytes of single tokens, special ones by their names, as they stand amid a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)  # decoders strip the space of a first token
        self._anchor_text = self._decode([])
        self.of = lru_cache(_MAX_CACHED)(self._of)

    def _of(self, token: int) -> tuple[str, bytes]:
        """Text and bytes. Part of a character has U+FFFD in its text; an id that means nothing has neither."""
        text = self._decode([token]).removeprefix(self._anchor_text)
        return text, self._bytes(token, text)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode([*self._anchor, *tokens], skip_special_tokens=False)

    def _bytes(self, token: int, text: str) -> bytes:
        name = self._tokenizer.token_name(token)
        if _REPLACEMENT not in text or name is None:
            return text.encode()
        if fallback := _BYTE_NAME.fullmatch(name):
            return bytes([int(fallback[1], 16)])
        if all(letter in _BYTE_OF_LETTER for letter in name):
            return bytes(_BYTE_OF_LETTER[letter] for letter in name)
        return text.encode()
