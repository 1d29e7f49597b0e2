"""Calls of tools are found in an answer's text, however it is cut."""

import random

import pytest

from serve_app.ingress.openai.reader import FORCED, HERMES, LLAMA, MISTRAL, Called, CallReader, Said, style_of


def fold(deltas):
    """(text, [(name, arguments)]) of deltas in their order."""
    text, calls = "", []
    for delta in deltas:
        if isinstance(delta, Said):
            text += delta.text
        elif delta.name is not None:
            assert delta.index == len(calls)
            calls.append([delta.name, delta.arguments])
        else:
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    return text, [tuple(call) for call in calls]


def read(style, pieces, max_calls=None):
    reader = CallReader(style, max_calls)
    deltas = [delta for piece in pieces for delta in reader.push(piece)] + reader.finish()
    told = fold(deltas)
    assert reader.num_calls >= len(told[1])
    return told


HARD = '{"a": "}\\"{", "b": [{"c": "\\\\"}]}'
CASES = {
    "hermes-none": (HERMES, "just <tool> talk", ("just <tool> talk", [])),
    "hermes-one": (HERMES, f'<tool_call>\n{{"name": "f", "arguments": {HARD}}}\n</tool_call>', ("", [("f", HARD)])),
    "hermes-two": (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"arguments": {"x": 1}, "name": "g"}\n</tool_call>\n',
        ("Let me see.\n", [("f", "{}"), ("g", '{"x":1}')]),
    ),
    "hermes-said-after": (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n so be it',
        ("\n so be it", [("f", "{}")]),
    ),
    "hermes-no-call-inside": (HERMES, "a <tool_call> f(x) </tool_call> b", ("a <tool_call> f(x) </tool_call> b", [])),
    "hermes-no-name": (HERMES, 'a <tool_call>{"x": {"y": 1}} b', ('a <tool_call>{"x": {"y": 1}} b', [])),
    "hermes-cut-in-arguments": (HERMES, '<tool_call>{"name": "f", "arguments": {"x": "lo', ("", [("f", '{"x": "lo')])),
    "hermes-cut-in-name": (HERMES, 'so <tool_call>{"name": "f', ('so <tool_call>{"name": "f', [])),
    "hermes-cut-in-mark": (HERMES, "so <tool_c", ("so <tool_c", [])),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}}, {"name": "g", "arguments": {}}]',
        ("", [("f", '{"x": [1]}'), ("g", "{}")]),
    ),
    "llama": (
        LLAMA,
        '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}',
        ("", [("f", '{"x": 1}'), ("g", "{}")]),
    ),
    "llama-none": (LLAMA, 'The set {"name": "f", "parameters": {}}', ('The set {"name": "f", "parameters": {}}', [])),
    "llama-json": (LLAMA, '{"name": "Bob", "age": 4}', ('{"name": "Bob", "age": 4}', [])),
    "forced": (FORCED, '{"name": "f", "arguments": {"x": {}}}', ("", [("f", '{"x": {}}')])),
    "text-arguments": (LLAMA, '{"name": "f", "arguments": "{\\"x\\": 1}"}', ("", [("f", '{"x": 1}')])),
    "extra-field": (FORCED, '{"name": "f", "arguments": {}, "id": {"x": 1}}', ("", [("f", "{}")])),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_found_however_the_text_is_cut(name):
    style, text, told = CASES[name]
    assert read(style, [text]) == told
    assert read(style, list(text)) == told
    seed = 7
    rng = random.Random(seed)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(text) + 1), 3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(style, pieces) == told, (seed, pieces)


@pytest.mark.parametrize("name", CASES)
def test_what_is_told_after_a_text_does_not_depend_on_its_cuts(name):
    style, text, _ = CASES[name]
    whole, bit_by_bit, bits = CallReader(style), CallReader(style), []
    for end in range(1, len(text) + 1):
        bits += bit_by_bit.push(text[end - 1])
        whole = CallReader(style)
        assert fold(whole.push(text[:end])) == fold(bits)


def test_a_call_is_told_before_it_is_whole():
    reader = CallReader(HERMES)
    assert reader.push('<tool_call>{"name": "f", "arguments": ') == []
    assert reader.push('{"city": "Par') == [Called(0, "f", '{"city": "Par')]
    assert reader.push('is"') == [Called(0, None, 'is"')]
    assert reader.push("}}</tool_call>") == [Called(0, None, "}")]
    assert reader.finish() == []


def test_no_more_calls_are_told_than_are_wanted():
    text = '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 1}}'
    assert read(LLAMA, [text], max_calls=1) == ("", [("f", "{}")])


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}<tool_call>\n<function=name>{% endif %}", None),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}[TOOL_CALLS]name[ARGS]{% endif %}", None),
        ('{% if tools %}{"name": function name, "parameters": ...}{% endif %}', LLAMA),
        ("{% if tools %}{{ tools }}{% endif %}", None),
    ],
)
def test_the_template_tells_how_its_model_calls(template, style):
    assert style_of(template) is style
