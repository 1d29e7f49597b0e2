"""What steps cost is learned from steps: with noise, pauses and late news among them."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.pace import MAX_OBSERVED, Observed, Pace, Paces, Work, dot, fit
from serve_app.engine.plan import StepDone
from serve_app.engine.request import Request, SamplingParams
from tests.engine.virtual import HIDDEN, World, slo_config

PROBES = [Work(0, 8), Work(512, 0, 131), Work(256, 16, 60), Work(128, 2, 8)]


def steps(rng, num, costs=HIDDEN, noise=0.05):
    works = [Work(rng.choice((0, rng.randint(2, 512))), rng.randint(0, 32), 0.0) for _ in range(num)]
    works = [Work(w.prompt_tokens, w.decode_rows, w.prompt_tokens * rng.uniform(0, 1)) for w in works]
    return [Observed(w, dot(costs, w.row) * math.exp(rng.gauss(0, noise))) for w in works]


def worst(costs, hidden=HIDDEN):
    return max(abs(dot(costs, w.row) / dot(hidden, w.row) - 1) for w in PROBES)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_hidden_costs_are_found(seed):
    assert worst(fit(steps(random.Random(seed), 200), [1.0] * 200)) < 0.08


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_two_ends_told_at_once_do_not_spoil_the_rest(seed):
    """The engine was paused: one interval has both steps' time, the next one next to nothing."""
    rng = random.Random(seed)
    seen = steps(rng, 200)
    for i in range(0, 40, 2):
        seen[i] = Observed(seen[i].work, seen[i].seconds + seen[i + 1].seconds)
        seen[i + 1] = Observed(seen[i + 1].work, 1e-6)
    assert worst(fit(seen, [1.0] * 200)) < 0.25


@pytest.mark.parametrize("pause_s", [2.0, 200.0])
def test_a_pause_says_little(pause_s):
    seen = steps(random.Random(1), 200)
    seen[17] = Observed(seen[17].work, pause_s)
    assert worst(fit(seen, [1.0] * 200)) < 0.15


def test_frequent_stalls_count_in_the_mean():
    """Who waits for a hundred steps waits for those that stall too."""
    rng = random.Random(2)
    seen = [Observed(o.work, o.seconds * (5 if rng.random() < 0.1 else 1)) for o in steps(rng, 250)]
    costs = fit(seen, [1.0] * 250)
    assert sum(dot(costs, o.work.row) for o in seen) == pytest.approx(sum(o.seconds for o in seen), rel=0.1)


def test_costs_are_never_negative_and_nothing_is_known_at_first():
    pace = Pace()
    assert (pace.costs, pace.step_s(Work(100))) == (None, 0.0)
    for _ in range(10):
        pace.observe(Observed(Work(100), 0.0))
    assert pace.costs is not None and min(pace.costs) >= 0 and all(map(math.isfinite, pace.costs))


def test_a_machine_that_becomes_slower_is_noticed():
    pace = Pace(steps(random.Random(1), 20))
    for observed in steps(random.Random(3), MAX_OBSERVED, tuple(2 * cost for cost in HIDDEN)):
        pace.observe(observed)
    assert worst(pace.costs, tuple(2 * cost for cost in HIDDEN)) < 0.15


def test_another_number_of_replicas_is_guessed_and_then_learned():
    paces = Paces()
    assert paces.of(2).costs is None
    paces.seed(1, steps(random.Random(1), 50, noise=0))
    assert paces.of(2).step_s(PROBES[1]) == pytest.approx(2 * paces.of(1).step_s(PROBES[1]), rel=0.05)
    for observed in steps(random.Random(2), 100):
        paces.of(2).observe(observed)
    assert worst(paces.of(2).costs) < 0.2


def test_steps_told_in_the_wrong_order_and_after_a_pause_teach_nothing():
    world = World(slo_config(num_stages=2), seeded=False)
    scheduler = world.core._schedulers[0]
    plans = []
    world._issue = plans.append
    for i in range(2):
        world.come(Request(f"r{i}", [i + 1] * 300, SamplingParams(max_new_tokens=4, ignore_eos=True)))
    world.run(0.0)
    first, second = plans[:2]
    assert scheduler.observed(second.step, 1.0) is None
    num = sum(part.sample is not None for part in second.slices)
    world.on(StepDone(second.epoch, 0, second.step, [7] * num, [0.0] * num))
    assert scheduler.observed(first.step, 1.1) is None, "its interval has the other one's time too"
    assert not world.core.paces.of(1).observed
