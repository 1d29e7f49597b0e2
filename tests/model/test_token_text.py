"""Text and bytes of single tokens, whichever way a tokenizer writes bytes."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from serve_app.model.token_text import TokenTexts
from serve_app.model.tokenizer import Tokenizer
from tests.model.families import make_tiny_tokenizer

WORDS = ["\N{LOWER ONE EIGHTH BLOCK}a", "a", "\N{LOWER ONE EIGHTH BLOCK}Oslo", "\N{SNOWMAN}"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder, 400)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def byte_fallback():
    """Llama 2's kind: a mark for spaces, bytes as `<0x..>`."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, None)


def test_the_bytes_of_all_tokens_make_the_text(byte_level):
    text = "Oslo \N{SNOWMAN} and \N{EARTH GLOBE EUROPE-AFRICA} are far"
    texts = TokenTexts(byte_level)
    assert b"".join(texts.of(token)[1] for token in byte_level.encode(text)).decode() == text


def test_a_special_token_is_its_name_and_an_unknown_one_nothing(byte_level):
    texts = TokenTexts(byte_level)
    assert texts.of(2) == ("<|im_end|>", b"<|im_end|>")
    assert texts.of(5000) == ("", b"")


def test_bytes_of_a_tokenizer_with_byte_fallback_are_found(byte_fallback):
    texts = TokenTexts(byte_fallback)
    assert [texts.of(byte)[1] for byte in "\N{SNOWMAN}".encode()] == [b"\xe2", b"\x98", b"\x83"]
    assert texts.of(256 + 3) == ("\N{SNOWMAN}", "\N{SNOWMAN}".encode())


def test_a_token_keeps_the_space_that_it_begins_with(byte_fallback):
    assert TokenTexts(byte_fallback).of(256 + 2)[0] == " Oslo"
