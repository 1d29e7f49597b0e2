"""Answers that keep to a grammar: which tokens may come next is a function of the grammar and the emitted tokens.

llguidance reads the grammars. Its matchers are only a cache here: one that does not stand exactly behind the emitted
tokens is built anew from them. So a step may be run twice, and a stream may go on with another worker.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from serve_app.engine.request import Grammar

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")

MAX_GRAMMAR_BYTES = 1 << 16
MAX_COMPILED = 64  # grammars kept compiled
MAX_MATCHERS = 512  # streams whose place in their grammar is kept
# Between the parts of a JSON text. Without a limit a model that likes spaces never comes to an end.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"

Mask = NDArray[np.bool_]


class LRU(Generic[K, V]):
    """A mapping that forgets what was put there longest ago."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, key: K, value: V) -> None:
        self._items.pop(key, None)
        self._items[key] = value
        if len(self._items) > self._most:
            self._items.popitem(last=False)

    def take(self, key: K) -> V | None:
        """Remove it and return it, if it is there."""
        return self._items.pop(key, None)

    def clear(self) -> None:
        self._items.clear()


class Compiler:
    """Compiles grammars for one tokenizer, each once."""

    def __init__(self, read_tokenizer: Callable[[], str], eos_token_ids: Sequence[int] = ()) -> None:
        """`read_tokenizer`: gives the text of tokenizer.json; called at the first grammar. It may raise ValueError."""
        self._read_tokenizer = read_tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._failure = ""  # why there is no tokenizer
        self._compiled: LRU[Grammar, LLMatcher | str] = LRU(MAX_COMPILED)

    @property
    def tokenizer(self) -> LLTokenizer:
        """Built at the first use, which takes about half a second. ValueError where that cannot be."""
        if self._failure:
            raise ValueError(self._failure)
        if self._tokenizer is None:
            try:
                self._tokenizer = LLTokenizer(self._read_tokenizer(), eos_token=self._eos_token_ids or None)
            except BaseException as error:
                self._failure = f"this model's tokenizer cannot follow a grammar: {_text(error)}"
                raise ValueError(self._failure) from None
        return self._tokenizer

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """One that stands at the beginning. ValueError where the grammar does not compile."""
        tokenizer = self.tokenizer
        compiled = self._compiled.take(grammar)
        if compiled is None:
            compiled = _compile(tokenizer, grammar)
        self._compiled.put(grammar, compiled)
        if isinstance(compiled, str):
            raise ValueError(compiled)
        return compiled.deep_copy()


def _compile(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher | str:
    """The grammar's own matcher, to be copied; or what is wrong with it."""
    try:
        matcher = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=LLParserLimits(verbose_errors=False))
    except BaseException as error:
        return _text(error)
    return (matcher.get_error() or "it does not compile") if matcher.is_error() else matcher


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            if grammar.text.strip() in {"true", "false"}:  # schemas too, but there is nothing to put options in
                return LLMatcher.grammar_from_json_schema(grammar.text)
            return LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def _text(error: BaseException) -> str:
    """What the library says. Its panics are no `Exception`s; what ends this process is not its to say."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error
    return str(error)


def text_mask(matcher: LLMatcher, vocab_size: int, ends: Sequence[int]) -> Mask:
    """mask_V: what may come next, the tokens `ends` and those that the tokenizer lacks left out.

    ValueError where the library gives up.
    """
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    mask = np.zeros(vocab_size, bool)
    known = np.unpackbits(bits, bitorder="little")[:vocab_size]
    mask[: len(known)] = known
    mask[[token for token in ends if token < vocab_size]] = False
    return mask


class Grammars:
    """What the last stage knows of its streams' grammars. All of it may be lost at any time."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._matchers: LRU[tuple[Grammar, bytes], LLMatcher] = LRU(MAX_MATCHERS)

    @classmethod
    def without_tokenizer(cls) -> "Grammars":
        """Every grammar's answer ends at once: for models that are only weights."""

        def read() -> str:
            raise ValueError("there is none")

        return cls(Compiler(read))

    def forget(self) -> None:
        """Drop every stream's place."""
        self._matchers.clear()

    def allowed(self, grammar: Grammar, emitted: list[int], end_ids: Sequence[int], vocab_size: int) -> Mask:
        """mask_V: which tokens may follow `emitted`.

        The tokens `end_ids` may where the grammar is complete. They are the only ones where nothing else may follow,
        and where the library gives up: then the answer is cut short, and the worker lives. Should there be no such
        token either, all may: the answer goes on to its length.
        """
        ends = [token for token in end_ids if token < vocab_size]
        mask = np.zeros(vocab_size, bool)
        try:
            matcher = self._stand(grammar, emitted)
            mask = text_mask(matcher, vocab_size, self._compiler.tokenizer.eos_tokens)
            is_complete = matcher.is_accepting()
        except BaseException as error:
            log.warning("an answer ends where its grammar cannot be followed")
            log.debug("its tokens or its grammar are at fault: %s", _text(error))  # which may quote the answer
            is_complete = True
        if is_complete or not mask.any():
            mask[ends] = True
        return mask if mask.any() else np.ones(vocab_size, bool)

    def _stand(self, grammar: Grammar, emitted: list[int]) -> LLMatcher:
        """The matcher that has seen exactly `emitted`: moved on by one token where it can be, else made anew."""
        here = (grammar, _digest(emitted))
        matcher, rest = self._matchers.take(here), emitted[:0]
        if matcher is None and emitted:
            matcher, rest = self._matchers.take((grammar, _digest(emitted[:-1]))), emitted[-1:]
        if matcher is None:
            matcher, rest = self._compiler.matcher(grammar), emitted
        if rest and not matcher.consume_tokens(rest):
            raise ValueError(matcher.get_error())
        self._matchers.put(here, matcher)
        return matcher


def _digest(tokens: list[int]) -> bytes:
    return blake2b(np.array(tokens, np.int64).tobytes(), digest_size=16).digest()
