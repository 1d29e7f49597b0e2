"""Tokens become text, cut at stop strings wherever the tokens are cut."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.engine.request import Emission
from serve_app.ingress.faults import GenerationError
from serve_app.ingress.output import Finish, Output, StopMatcher

TEXT = st.text("ab\u20ac", max_size=24)
STOPS = st.lists(st.text("ab\u20ac", min_size=1, max_size=5), max_size=4)


def reference(text, stops):
    """(kept text, matched stop): read a character at a time; the first stop that is complete ends it."""
    for end in range(1, len(text) + 1):
        matched = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if matched is not None:
            return text[: end - len(matched)], matched
    return text, None


def split(text, cuts):
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@example("abab", ["abab", "ba"], [])  # complete first is not begun first
@example("aab", ["b", "ab", "zab"], [1])  # complete at once: the longer
@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=12))
def test_a_stop_string_is_found_however_the_text_is_split(text, stops, cuts):
    matcher = StopMatcher(stops)
    released = "".join(matcher.push(piece) for piece in split(text, cuts)) + matcher.flush()
    assert (released, matcher.matched) == reference(text, stops)


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=12))
def test_only_text_that_may_begin_a_stop_string_is_held_back(text, stops, cuts):
    matcher = StopMatcher(stops)
    seen = released = ""
    for piece in split(text, cuts):
        seen += piece
        released += matcher.push(piece)
        if matcher.matched is None:
            held = seen.removeprefix(released)
            assert held == "" or any(stop.startswith(held) for stop in stops)


def feed(tokenizer, ids, stops=(), *, finish="length", skip_special_tokens=True, sizes=1):
    """An Output that was given `ids`, `sizes` at a time."""
    output = Output(tokenizer, stops, skip_special_tokens)
    for first in range(0, len(ids), sizes):
        tokens = ids[first : first + sizes]
        last = first + sizes >= len(ids)
        output.take(Emission("r", first, tokens, [], 0, finish if last else None))
        if output.finish is not None:
            break
    return output


@given(st.text(max_size=40), st.integers(1, 5))
def test_the_text_is_the_decoded_tokens(tokenizer, text, sizes):
    ids = tokenizer.encode(text)
    if ids:
        output = feed(tokenizer, ids, sizes=sizes)
        assert output.text == tokenizer.decode(ids)
        assert "".join(piece.text for piece in output.pieces) == output.text
        assert output.finish == Finish("length")


def test_a_stop_string_across_tokens_cuts_the_text_and_the_tokens_after_it(tokenizer):
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog")
    for sizes in (1, 2, len(ids)):
        output = feed(tokenizer, ids, stops=["wn f"], sizes=sizes)
        assert output.text == "The quick bro"
        assert output.finish == Finish("stop", "wn f")
        assert tokenizer.decode(output.tokens[:-1]) != tokenizer.decode(output.tokens)
        assert "wn f" in tokenizer.decode(output.tokens)
        assert "wn f" not in tokenizer.decode(output.tokens[:-1])


def test_text_that_was_held_back_is_there_at_the_end(tokenizer):
    ids = tokenizer.encode("The quick brown")
    assert feed(tokenizer, ids, stops=["brown fox"]).text == "The quick brown"
    output = feed(tokenizer, [*ids, 2], stops=["brown fox"], finish="stop")
    assert output.text == "The quick brown"
    assert output.finish == Finish("stop", 2)


def test_the_end_token_is_not_in_the_text_even_if_it_is_a_word(tokenizer):
    ids = tokenizer.encode("Paris is the capital of France")
    output = feed(tokenizer, ids, finish="stop", skip_special_tokens=False)
    assert output.text == tokenizer.decode(ids[:-1])
    assert output.tokens == ids
    assert feed(tokenizer, [ids[0], 2], finish="stop", skip_special_tokens=False).text == tokenizer.decode(ids[:1])


def test_special_tokens_are_shown_only_when_asked_for(tokenizer):
    ids = [*tokenizer.encode("Paris"), 1, *tokenizer.encode(" is")]
    assert feed(tokenizer, ids).text == "Paris is"
    assert feed(tokenizer, ids, skip_special_tokens=False).text == "Paris<|im_start|> is"


def test_tokens_that_come_twice_are_taken_once(tokenizer):
    ids = tokenizer.encode("The quick brown fox")
    output = Output(tokenizer, [], True)
    output.take(Emission("r", 0, ids[:3], [], 5))
    output.take(Emission("r", 1, ids[1:5], [], 5))
    output.take(Emission("r", 0, ids, [], 5, "length"))
    assert output.tokens == ids
    assert output.text == "The quick brown fox"
    assert output.num_cached_tokens == 5


def test_lost_tokens_are_an_error_and_not_a_gap(tokenizer):
    output = Output(tokenizer, [], True)
    with pytest.raises(GenerationError, match=r"tokens \[0, 2\)"):
        output.take(Emission("r", 2, [5], [], 0))


def test_an_end_without_a_token_ends_the_output(tokenizer):
    output = Output(tokenizer, ["brown fox"], True)
    output.take(Emission("r", 0, tokenizer.encode("The brown"), [], 0))
    assert output.text == "The "
    assert output.take(Emission("r", len(output.tokens), [], [], 0, "abort")) == []
    assert (output.text, output.finish) == ("The brown", Finish("abort"))
