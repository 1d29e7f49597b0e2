"""What the engine tells the last stage of the tokens so far, and what it keeps of the answers."""

import math

import pytest

from serve_app.engine.plan import Emit, StepDone
from serve_app.engine.request import Grammar
from tests.engine.toy import EOS, Cluster, make_config, make_request

GRAMMAR = Grammar("regex", "a+")


def start(**config):
    cluster = Cluster(make_config(**config), 64)
    cluster.begin(1)
    return cluster


def shapings(cluster):
    return [part.sample.shaping for plan in cluster.plans for part in plan.slices if part.sample]


def run(emitted=(), num_tokens=3, prompt=(3, 1, 4), **sampling):
    """The shapings of a request's steps, and its tokens."""
    cluster = start()
    cluster.submit(make_request("a", prompt, num_tokens, emitted, **{"ignore_eos": True, **sampling}))
    cluster.drain(100)
    return shapings(cluster), cluster.streams["a"]


def test_nothing_is_told_where_nothing_is_set():
    told, _ = run(temperature=0.5, top_k=3, stop_token_ids=(5,), logprobs=True, top_logprobs=5)
    assert set(told) == {None}


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties_are_told_all_emitted_tokens_and_no_prompt(name):
    told, tokens = run(**{name: 0.5})
    assert [(s.prompt, s.emitted, s.end_ids) for s in told] == [([], tokens[:i], ()) for i in range(3)]
    assert all(getattr(shaping, name) == 0.5 for shaping in told)


def test_a_repetition_penalty_is_told_the_prompt_too():
    told, tokens = run(repetition_penalty=1.2)
    assert [(s.prompt, s.emitted) for s in told] == [([3, 1, 4], tokens[:i]) for i in range(3)]


def test_a_bias_alone_is_told_no_tokens():
    told, _ = run(logit_bias=((3, 1.0),))
    assert {(s.logit_bias, tuple(s.prompt), tuple(s.emitted)) for s in told} == {(((3, 1.0),), (), ())}


def test_a_grammar_is_told_what_was_emitted_anywhere_and_what_ends_it():
    told, tokens = run(emitted=[7, 8], num_tokens=4, grammar=GRAMMAR, stop_token_ids=(9,))
    assert [s.emitted for s in told] == [tokens[:i] for i in range(2, 2 + len(told))]
    assert {(s.grammar, s.end_ids) for s in told} == {(GRAMMAR, (EOS, 9))}


def test_the_models_own_end_is_never_ignored_where_there_is_a_grammar():
    cluster = start()
    cluster.submit(make_request("a", [3, 1, 4], 60, ignore_eos=True, grammar=GRAMMAR))
    cluster.drain(100)
    assert (cluster.streams["a"][-1], cluster.finishes["a"]) == (EOS, "stop")


def step_with_tops(cluster):
    """End the oldest step; each token's likeliest are itself and the next. What is emitted."""
    plan = cluster.replicas[0].plans.popleft()
    tokens = cluster.replicas[0].compute(plan)
    samples = [part.sample for part in plan.slices if part.sample]
    tops = [likeliest(token)[: how.top_logprobs] for token, how in zip(tokens, samples, strict=True)]
    done = StepDone(plan.epoch, 0, plan.step, tokens, [-0.5] * len(tokens), tops)
    return emissions(cluster.on(done))


def likeliest(token):
    return [(token, -0.5), (token + 1, -1.5)]


def emissions(commands):
    return [command.emission for command in commands if isinstance(command, Emit)]


def test_the_likeliest_are_emitted_to_those_who_asked_and_again_with_the_tokens():
    cluster = start()
    cluster.submit(make_request("no", [1, 2], 9, ignore_eos=True))
    asking = make_request("yes", [3, 4], 9, [5], ignore_eos=True, logprobs=True, top_logprobs=2)
    cluster.submit(asking)
    emitted = []
    while sum(emission.rid == "yes" for emission in emitted) < 3:
        emitted += step_with_tops(cluster)
    assert {emission.rid for emission in emitted} == {"no", "yes"}
    for emission in emitted:
        [token] = emission.tokens
        assert emission.tops == ([likeliest(token)] if emission.rid == "yes" else [])
    [again] = emissions(cluster.submit(make_request("yes", [3, 4], 9)))
    assert again.tokens == cluster.streams["yes"]
    assert again.tops == [[], *map(likeliest, again.tokens[1:])], "what another engine emitted is not known"
    assert math.isnan(again.logprobs[0])
    assert again.logprobs[1:] == [-0.5] * 3


def test_without_tops_in_the_answer_there_are_empty_ones():
    cluster = start()
    cluster.submit(make_request("a", [3, 4], 2, ignore_eos=True, top_logprobs=2))
    assert [emission.tops for emission in emissions(cluster.step())] == [[[]]]
