"""Random events in random order: what must hold holds after each of them."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.toy import VOCAB, Cluster, make_config, make_request

DOCUMENT = [(7 * i * i + 3) % VOCAB for i in range(40)]  # what prompts have in common

configs = st.fixed_dictionaries(
    {
        "num_stages": st.integers(1, 4),
        "page_tokens": st.sampled_from([1, 2, 4, 8]),
        "max_running": st.integers(1, 6),
        "max_step_tokens": st.integers(1, 24),
        "max_context_tokens": st.integers(8, 60),
        "prefix_cache": st.booleans(),
    }
)
prompts = st.builds(
    lambda num_shared, own: DOCUMENT[:num_shared] + own,
    st.integers(0, 24),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
)
submits = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_new_tokens": st.integers(0, 20),
        "min_new_tokens": st.integers(0, 5),
        "seed": st.integers(0, 3),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(), (1, 2)]),
        "logprobs": st.booleans(),
        "emitted": st.lists(st.integers(3, VOCAB - 1), max_size=4),
    }
)
indices = st.integers(0, 99)
ops = st.one_of(
    st.tuples(st.just("submit"), submits),
    st.tuples(st.just("step"), indices),
    st.tuples(st.just("step"), indices),
    st.tuples(st.just("cancel"), indices),
    st.tuples(st.just("begin"), st.integers(0, 3)),
    st.tuples(st.just("keep"), st.tuples(st.sets(st.integers(0, 2)), st.sets(st.integers(0, 2)))),
    st.tuples(st.just("overtake"), indices),
    st.tuples(st.just("repeat"), indices),
    st.tuples(st.just("resubmit"), indices),
)


def apply(cluster, op, value):
    busy = [i for i, replica in enumerate(cluster.replicas) if replica.plans]
    if op == "submit":
        cluster.submit(make_request(f"r{len(cluster.requests)}", **value))
    elif op == "step" and busy:
        cluster.step(busy[value % len(busy)])
    elif op == "cancel" and cluster.requests:
        cluster.cancel(list(cluster.requests)[value % len(cluster.requests)])
    elif op == "begin":
        cluster.begin(value)
    elif op == "keep":
        resting, kept = value
        cluster.begin(3, resting=tuple(resting), kept=tuple(kept - resting))
    elif op == "overtake" and busy:
        cluster.ended_early(busy[value % len(busy)])
    elif op == "repeat" and cluster.past:
        assert cluster.on(cluster.past[value % len(cluster.past)]) == []
    elif op == "resubmit" and cluster.unfinished():
        rid = cluster.unfinished()[value % len(cluster.unfinished())]
        cluster.submit(cluster.requests[rid])


def finish(cluster):
    """Every request ends within a bounded number of steps, with its own tokens, and gives all pages back."""
    if len(cluster.resting) == len(cluster.replicas):
        cluster.begin(1)
    num_tokens = sum(len(r.prompt) + r.sampling.max_new_tokens for r in cluster.requests.values())
    cluster.drain(most_steps=3 * num_tokens + 10)
    cluster.check_streams()
    cluster.check_idle()


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(configs, st.integers(1, 24), st.lists(ops, min_size=5, max_size=80))
def test_whatever_happens_each_request_ends_once_with_its_own_tokens(config, num_pages, events):
    cluster = Cluster(make_config(**config), num_pages)
    cluster.begin(1)
    for op, value in events:
        apply(cluster, op, value)
    finish(cluster)


def random_op(rng):
    kinds = {"submit": 12, "step": 60, "cancel": 2, "begin": 0.3, "keep": 0.3}
    kinds |= dict.fromkeys(("repeat", "resubmit", "overtake"), 1)
    op = rng.choices(list(kinds), list(kinds.values()))[0]
    if op == "keep":
        return op, ({rng.randrange(3)}, {0, 1, 2})
    if op != "submit":
        return op, rng.randrange(1, 4) if op == "begin" else rng.randrange(100)
    prompt = DOCUMENT[: rng.choice([0, 8, 24, 40])] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
    return op, {"prompt": prompt, "max_new_tokens": rng.randrange(1, 40), "seed": rng.randrange(9), "ignore_eos": True}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_long_day_under_memory_pressure(seed, num_stages):
    rng = random.Random(seed)
    config = make_config(num_stages=num_stages, max_step_tokens=rng.choice([7, 16, 64]), max_context_tokens=90)
    cluster = Cluster(config, num_pages=rng.choice([23, 28]))
    cluster.begin(2)
    for _ in range(400):
        apply(cluster, *random_op(rng))
    finish(cluster)
    stats = cluster.core.stats()
    assert stats.preemptions_total > 0, f"seed {seed}: there was no pressure"
    assert stats.prefix_hits_total > 0, f"seed {seed}: nothing was ever reused"
