"""What clients send as grammars is tried out beside the server: nothing they write can end or stop it."""

import json
import re
import threading

import pytest

from serve_app.engine.request import Grammar
from serve_app.model.grammar_check import GrammarChecker, GrammarsBusyError
from tests.model.families import make_tiny_tokenizer


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder, 400)
    checker = GrammarChecker((folder / "tokenizer.json").read_text)
    yield checker
    checker.close()


GOOD = {
    "any json": Grammar("json_schema", "{}"),
    "anything": Grammar("json_schema", "true"),
    "any object": Grammar("json_schema", '{"type": "object"}'),
    "recursive": Grammar("json_schema", '{"type": "object", "properties": {"next": {"$ref": "#"}}}'),
    "regex": Grammar("regex", r"\d{4}-\d{2}-\d{2}"),
    "lark": Grammar("lark", 'start: "a" start | "b"'),
    "deep": Grammar("json_schema", '{"items":' * 100 + "{}" + "}" * 100),
}


@pytest.mark.parametrize("name", GOOD)
def test_grammars_that_compile_pass(checker, name):
    checker.check(GOOD[name])


BAD = {
    "no json": (Grammar("json_schema", "{"), "EOF while parsing"),
    "no schema": (Grammar("json_schema", '{"type": "strin"}'), "strin"),
    "schema of nothing": (Grammar("json_schema", "false"), "Unsatisfiable"),
    "remote": (Grammar("json_schema", '{"$ref": "http://localhost/a"}'), "localhost"),
    "regex": (Grammar("regex", "(a"), "unclosed group"),
    "regex of nothing": (Grammar("regex", r"[^\x00-\x{10FFFF}]"), "nothing can satisfy it"),
    "look-ahead": (Grammar("regex", "(?=a)b"), "look-around"),
    "parentheses": (Grammar("regex", "(" * 20000 + ")" * 20000), "regex"),
    "lark": (Grammar("lark", "begin: 5"), "1("),
    "endless rule": (Grammar("lark", "start: start"), "nothing can satisfy it"),
    "file": (Grammar("lark", '%import "/etc/passwd"\nstart: "a"'), "1("),
    "long": (Grammar("regex", "a" * 70_000), "longer than 65536 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_compile_is_refused_with_a_reason(checker, name):
    grammar, reason = BAD[name]
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        checker.check(grammar)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


def chain(num_rules):
    """Overflows the stack of the library's parser."""
    return Grammar(
        "lark", "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(num_rules)), f'r{num_rules}: "a"'])
    )


HOSTILE = {
    "overflows the stack": chain(4000),
    "takes minutes": Grammar("json_schema", '{"type": "integer", "multipleOf": 9999991}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_ends_or_stops_its_process_is_refused_and_the_next_is_answered(checker, name):
    checker.check(GOOD["regex"])
    first = checker._child
    with pytest.raises(ValueError, match="too complex"):
        checker.check(HOSTILE[name])
    assert checker._child is not first, "it was meant to end the process"
    checker.check(Grammar("regex", f"after {name}"))


def test_a_step_that_takes_long_is_refused(checker):
    with pytest.raises(ValueError, match="too complex"):
        checker.check(Grammar("regex", "((a{1000}){1000}){1000}"))


def test_a_verdict_is_given_twice_for_one_trial(checker, monkeypatch):
    tried = []
    monkeypatch.setattr(checker, "_try_out", lambda grammar, do=checker._try_out: tried.append(grammar) or do(grammar))
    good, bad = Grammar("regex", "once"), Grammar("regex", "once(")
    for _ in range(3):
        checker.check(good)
        with pytest.raises(ValueError, match="unclosed"):
            checker.check(bad)
    assert tried == [good, bad]


def test_a_process_that_somebody_else_ended_is_started_again(checker):
    checker.check(GOOD["regex"])
    checker._child._process.kill()
    checker._child._process.wait()
    checker.check(Grammar("regex", "next"))  # that was no fault of this one


def test_a_process_that_does_not_start_says_nothing_of_the_grammar(tmp_path, monkeypatch):
    checker = GrammarChecker(lambda: "{}")
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", str(tmp_path / "missing"))
        with pytest.raises(GrammarsBusyError, match="try again later"):
            checker.check(GOOD["regex"])
    with pytest.raises(ValueError, match="tokenizer"):
        checker.check(GOOD["regex"])
    checker.close()


def test_threads_get_each_their_own_verdict(checker):
    verdicts = {}

    def ask(i):
        grammar = Grammar("regex", f"thread{i}" + "(" * (i % 2))
        try:
            checker.check(grammar)
            verdicts[i] = ""
        except ValueError as error:
            verdicts[i] = str(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bool(verdicts[i]) for i in range(16)] == [i % 2 == 1 for i in range(16)]


def test_a_tokenizer_that_cannot_follow_grammars_is_named():
    checker = GrammarChecker(lambda: json.dumps({"model": 5}))
    for _ in range(2):
        with pytest.raises(ValueError, match="this model's tokenizer cannot follow a grammar"):
            checker.check(GOOD["regex"])
    checker.close()
