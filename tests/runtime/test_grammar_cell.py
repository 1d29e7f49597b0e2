"""Grammars and penalties in a whole cell: through the wire, past the loss of a worker, without the checkpoint."""

import json
import shutil

import jsonschema
import pytest
import torch

from serve_app.engine.request import Grammar, Request, SamplingParams
from serve_app.experts.layout import Seat
from serve_app.model.checkpoint import TOKENIZER, Checkpoint
from serve_app.model.tokenizer import Tokenizer
from serve_app.runtime.load import load_grammars
from serve_app.runtime.local import LocalEngine
from tests.model.families import make_tiny, make_tiny_tokenizer
from tests.runtime.cell import ThreadedCell, collect_local
from tests.runtime.test_cell import config_of

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}, "tag": {"enum": ["red", "blue"]}},
    "required": ["n", "tag"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaking")
    make_tiny("mixtral", folder)
    make_tiny_tokenizer(folder, 512)
    return folder


def requests():
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    plain = {"max_new_tokens": 60, "ignore_eos": True}
    return [
        *(Request(f"json{i}", [5 + i] * 20, SamplingParams(200, grammar=grammar, seed=i)) for i in range(4)),
        Request("repels", [7, 8, 9] * 5, SamplingParams(**plain, repetition_penalty=1.3, frequency_penalty=0.4)),
        Request("biased", [7, 8], SamplingParams(**plain, logit_bias=((40, 3.0), (41, -100.0)), seed=3)),
    ]


def assert_valid(tokens, folder):
    tokenizer = Tokenizer.load(folder)
    for rid, answer in tokens.items():
        if rid.startswith("json"):
            assert answer[-1] == 2
            jsonschema.validate(json.loads(tokenizer.decode(answer[:-1])), SCHEMA)


def test_a_lost_worker_changes_no_token_of_a_grammar_or_of_penalties(folder):
    weights = Checkpoint.open(folder)
    expected = collect_local(LocalEngine.load(weights, config_of(1, 1)), requests())
    assert_valid(expected[0], folder)
    assert 40 in expected[0]["biased"]
    with ThreadedCell(weights, config_of(2, 2)) as cell:
        for request in requests():
            cell.submit(request)
        found = cell.collect(6, lambda num: num == 40 and cell.lose(Seat(1, 0, 0)))
        assert found == expected


def test_the_tokenizer_is_there_after_the_checkpoint_is_gone(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = Checkpoint.open(copy)
    grammars = load_grammars(weights)
    shutil.rmtree(copy)
    mask = grammars.allowed(Grammar("regex", "a"), [], [2], 512)
    assert mask.sum() == 1
    text = weights.tensor(TOKENIZER)
    assert text.dtype == torch.uint8
    assert bytes(text.numpy()) == (folder / TOKENIZER).read_bytes()


def test_the_likeliest_tokens_come_through_the_wire(folder):
    request = Request("a", [5] * 9, SamplingParams(6, temperature=0.0, ignore_eos=True, top_logprobs=3, logprobs=True))
    weights = Checkpoint.open(folder)
    alone = list(LocalEngine.load(weights, config_of(1, 1)).generate([request]))
    with ThreadedCell(weights, config_of(2, 1)) as cell:
        cell.submit(request)
        found = []
        for emission in cell.emissions():
            found.append(emission)
            if emission.finish:
                break
    for emission in (*alone, *found):
        for token, logprob, top in zip(emission.tokens, emission.logprobs, emission.tops, strict=True):
            assert len(top) == 3
            assert top[0] == (token, logprob)
    assert [e.tops for e in found] == [e.tops for e in alone]
