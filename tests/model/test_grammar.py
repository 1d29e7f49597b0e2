"""Answers keep to their grammar, whoever goes on with them, and the state of a grammar is its tokens."""

import json
import random

import jsonschema
import msgspec
import numpy as np
import pytest
import torch

from serve_app.engine.plan import Sample, Shaping
from serve_app.engine.request import Grammar
from serve_app.model import grammar as grammar_module
from serve_app.model.grammar import Compiler, Grammars
from serve_app.model.sampling import sample
from serve_app.model.tokenizer import Tokenizer
from tests.model.families import make_tiny_tokenizer

VOCAB = 420  # padded beyond the tokenizer's 400
END = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "y": {"type": "boolean"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "at"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
BASE = Sample(1.0, 0, 1.0, 0.0, 0, 0, False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder, 400)
    return Tokenizer.load(folder), (folder / "tokenizer.json").read_text()


@pytest.fixture
def grammars(tokenizer):
    return Grammars(Compiler(lambda: tokenizer[1], [END]))


def how(grammar, emitted, seed=0, banned=(), end_ids=(END,)):
    shaping = Shaping(0.0, 0.0, 1.0, (), grammar, end_ids, [], list(emitted))
    return msgspec.structs.replace(BASE, seed=seed, position=len(emitted), banned=banned, shaping=shaping)


def logits_at(seed, num_emitted):
    return 2 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1000 * seed + num_emitted))


def generate(grammars, grammar, seed, before_step=lambda: None, most=1500):
    """Tokens of one answer from random logits at temperature 1."""
    emitted = []
    while len(emitted) < most:
        before_step()
        [token] = sample(logits_at(seed, len(emitted)), [how(grammar, emitted, seed)], grammars).tokens
        emitted.append(token)
        if token == END:
            return emitted
    raise AssertionError(f"seed {seed}: no end after {most} tokens")


@pytest.mark.parametrize("seeds", [range(50), range(50, 100)], ids=["first", "second"])
def test_every_sampled_answer_is_valid_json_of_its_schema_also_when_its_state_is_lost(tokenizer, grammars, seeds):
    for seed in seeds:
        tokens = generate(grammars, JSON, seed)
        jsonschema.validate(json.loads(tokenizer[0].decode(tokens[:-1])), SCHEMA)
        dice = random.Random(seed)
        other = Grammars(Compiler(lambda: tokenizer[1], [END])) if seed % 25 == 0 else grammars
        again = generate(other, JSON, seed, lambda: other.forget() if dice.random() < 0.1 else None)  # noqa: B023
        assert again == tokens, f"seed {seed}"


def test_streams_side_by_side_have_the_tokens_that_each_has_alone(grammars, tokenizer):
    seeds = range(6)
    alone = {seed: generate(grammars, JSON, seed) for seed in seeds}
    grammars.forget()
    emitted = {seed: [] for seed in seeds}
    dice = random.Random(3)
    while open_ := [seed for seed in seeds if emitted[seed] != alone[seed]]:
        rows = dice.sample(open_, dice.randint(1, len(open_)))
        logits = torch.cat([logits_at(seed, len(emitted[seed])) for seed in rows])
        plan = [how(JSON, emitted[seed], seed) for seed in rows]
        tokens = sample(logits, plan, grammars).tokens
        assert sample(logits, plan, grammars).tokens == tokens, "a step is idempotent"
        for seed, token in zip(rows, tokens, strict=True):
            emitted[seed].append(token)
            assert token == alone[seed][len(emitted[seed]) - 1]


def test_a_step_of_long_ago_may_be_run_again(grammars):
    tokens = generate(grammars, JSON, 7)
    for place in (0, len(tokens) // 2, 3, len(tokens) - 1):
        assert sample(logits_at(7, place), [how(JSON, tokens[:place], 7)], grammars).tokens == [tokens[place]]


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("regex", "(yes|no)"), "yes"),
        (Grammar("lark", 'start: "yes" | "no"'), "no"),
        (Grammar("json_schema", '{"const": 12}'), "12"),
    ],
)
def test_where_a_grammar_is_complete_only_the_end_may_come(tokenizer, grammars, grammar, text):
    emitted = tokenizer[0].encode(text)
    for i in range(len(emitted)):
        mask = grammars.allowed(grammar, emitted[:i], [END], VOCAB)
        assert mask[emitted[i]]
        assert not mask[END]
    assert np.flatnonzero(grammars.allowed(grammar, emitted, [END], VOCAB)).tolist() == [END]


def test_an_optional_rest_leaves_both_ways_open(tokenizer, grammars):
    mask = grammars.allowed(Grammar("regex", "a+"), tokenizer[0].encode("a"), [END, 7], VOCAB)
    assert mask[[END, 7, tokenizer[0].encode("a")[0]]].all()


def test_a_bans_of_ends_gives_way_where_nothing_else_is_left(tokenizer, grammars):
    grammar, logits = Grammar("regex", "ab?"), torch.zeros(1, VOCAB)
    after_a, after_ab = (tokenizer[0].encode(text) for text in ("a", "ab"))
    banned = [how(grammar, after_a, seed, banned=(END,)) for seed in range(20)]
    assert {sample(logits, [row], grammars).tokens[0] for row in banned} == {tokenizer[0].encode("b")[0]}
    assert sample(logits, [how(grammar, after_ab, banned=(END,))], grammars).tokens == [END]


def test_without_any_end_a_complete_answer_is_free_until_its_length(tokenizer, grammars):
    assert grammars.allowed(Grammar("regex", "a"), tokenizer[0].encode("a"), [], VOCAB).all()


BROKEN = {
    "not compiling": (Grammar("regex", "("), []),
    "no json": (Grammar("json_schema", "{"), []),
    "unsatisfiable": (Grammar("regex", r"[^\x00-\x{10FFFF}]"), []),
    "left by the tokens": (Grammar("regex", "a"), [50, 51, 52]),
    "tokens of no vocabulary": (Grammar("regex", "a"), [2**40, -5]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_followed_ends_the_answer_and_harms_no_other(grammars, name):
    grammar, emitted = BROKEN[name]
    for _ in range(2):
        logits = torch.cat([logits_at(1, 0), logits_at(1, 0)])
        rows = [how(grammar, emitted), BASE]
        assert sample(logits, rows, grammars).tokens == [END, sample(logits[1:], [BASE]).tokens[0]]


def test_a_model_without_a_tokenizer_ends_such_answers():
    assert sample(logits_at(1, 0), [how(JSON, [])], Grammars.without_tokenizer()).tokens == [END]
    assert sample(logits_at(1, 0), [how(JSON, [])]).tokens == [END]


def test_special_tokens_are_no_text(grammars):
    """`<|im_start|>` spelt as a token is no part of a string."""
    mask = grammars.allowed(Grammar("regex", ".*"), [], [END], VOCAB)
    assert not mask[[0, 1]].any()
    assert mask[END]
    assert not mask[400:].any()
    assert mask[3:259].sum() > 90


def test_caches_are_bounded(grammars, monkeypatch):
    monkeypatch.setattr(grammars._matchers, "_most", 5)
    monkeypatch.setattr(grammars._compiler._compiled, "_most", 3)
    for i in range(20):
        grammars.allowed(Grammar("regex", f"a{{{i + 1}}}"), [], [END], VOCAB)
    assert (len(grammars._matchers), len(grammars._compiler._compiled)) == (5, 3)


def test_a_step_consumes_one_token_and_rebuilds_nothing(grammars, monkeypatch):
    made = []
    compiler = grammars._compiler
    monkeypatch.setattr(compiler, "matcher", lambda g, make=compiler.matcher: made.append(g) or make(g))
    generate(grammars, JSON, 3)
    assert len(made) == 1


def test_white_space_has_a_limit(tokenizer, grammars):
    space = tokenizer[0].encode(" ")[0]
    start = [*tokenizer[0].encode("{"), *[space] * 40]
    mask = grammars.allowed(JSON, start, [END], VOCAB)
    assert not mask[space]
    assert grammar_module.WHITESPACE.endswith("{1,40}")
