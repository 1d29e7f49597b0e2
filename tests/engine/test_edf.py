"""Prompts are computed in the order of their deadlines; who is late comes later, but comes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.plan import Begin
from serve_app.engine.request import Request, SamplingParams, Terms
from tests.engine.virtual import TTFT_S, World, slo_config


def arrive(world, rid, when_s=0.0, num=400, **terms):
    """Let in without being judged, so that the queue is what the test says."""
    terms = Terms(**{"is_accepted": True, **terms})
    return world.come(Request(rid, [7] * num, SamplingParams(max_new_tokens=2), terms=terms), when_s)


def order(world):
    first = {rid: visit.first_s for rid, visit in world.visits.items()}
    return sorted(first, key=first.get)


def test_a_shorter_objective_goes_first():
    world = World(slo_config(prefix_cache=False), noise=0.0)
    for i in range(6):
        arrive(world, f"long{i}", ttft_s=20.0)
    arrive(world, "short", 0.01, ttft_s=3.0)
    world.run()
    assert order(world).index("short") <= 3, "only what was begun before comes first"


def test_equal_objectives_go_in_the_order_of_their_arrival():
    world = World(slo_config(prefix_cache=False), noise=0.0)
    for i in range(8):
        arrive(world, f"r{i}", i / 1000)
    world.run()
    assert order(world) == [f"r{i}" for i in range(8)]


def test_what_was_waited_elsewhere_is_not_waited_again():
    world = World(slo_config(prefix_cache=False), noise=0.0)
    for i in range(4):
        arrive(world, f"r{i}")
    arrive(world, "held", 0.01, waited_s=5.0)
    world.run()
    assert order(world).index("held") <= 2


def test_a_late_one_comes_after_those_in_time_and_is_served():
    world = World(slo_config(prefix_cache=False), noise=0.0)
    for i in range(4):
        arrive(world, f"r{i}")
    arrive(world, "late", 0.01, waited_s=TTFT_S + 1)
    world.run()
    assert order(world)[-1] == "late"
    assert world.visits["late"].num_tokens == 2


def test_a_late_one_waits_for_two_objectives_more_at_most():
    """However many come after it, in time."""
    world = World(slo_config(prefix_cache=False), noise=0.0)
    arrive(world, "first", num=512)
    late = arrive(world, "late", 0.01, waited_s=TTFT_S + 1)
    for i in range(300):
        arrive(world, f"r{i}", i * 0.17)
    world.run()
    assert late.first_s is not None
    assert late.first_s <= 2 * TTFT_S + 1, "its place is fixed, two objectives behind"


def test_one_that_asked_to_be_dropped_when_late_is_dropped():
    world = World(slo_config(prefix_cache=False), noise=0.0)
    for i in range(4):
        arrive(world, f"r{i}", num=2000)
    dropped = arrive(world, "drop", 0.01, ttft_s=0.5, drops_late=True)
    kept = arrive(world, "keep", 0.01, ttft_s=0.5)
    world.run()
    assert dropped.late_refusal and dropped.first_s is None
    assert kept.num_tokens == 2
    assert world.core.stats().refused_total == {"late": 1}
    world.core.check_integrity()


def test_nobody_is_late_before_the_pace_is_known():
    world = World(slo_config(prefix_cache=False), noise=0.0, seeded=False)
    visits = [arrive(world, f"r{i}", ttft_s=1.0) for i in range(3)]
    world.run(0.0)
    assert not any(seq.is_late for seq in world.core._live.values())
    world.run()
    assert all(visit.num_tokens == 2 for visit in visits)


def test_a_preempted_one_keeps_its_deadline_and_is_never_late():
    """It has its first token: its objective was met, and its place is that of its arrival."""
    world = World(slo_config(prefix_cache=False), noise=0.0)
    world.on(Begin(world.core.epoch + 1, 1, 12))
    for i in range(2):
        sampling = SamplingParams(max_new_tokens=200, ignore_eos=True)
        world.come(Request(f"r{i}", [i] * 100, sampling, terms=Terms(is_accepted=True, ttft_s=1.0)))
    preempted = []
    while world._events:
        world.run(world._events[0][0])
        preempted += [seq for seq in world.core._schedulers[0].waiting.values() if seq.num_emitted]
    assert preempted and world.core.stats().preemptions_total
    assert all(not seq.is_late and seq.deadline_s == seq.due_s == 1.0 for seq in preempted)
    assert [visit.num_tokens for visit in world.visits.values()] == [200, 200]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 900), st.sampled_from([0.2, 1.0, 5.0, 60.0]), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([1, 2]),
)
def test_everybody_is_served_and_the_queue_is_in_order(arrivals, num_stages):
    world = World(slo_config(num_stages=num_stages, max_running=4, prefix_cache=False), noise=0.0)
    for i, (when, num, ttft_s, has_waited) in enumerate(arrivals):
        arrive(world, f"r{i}", when / 100, num, ttft_s=ttft_s, waited_s=2.0 * has_waited)
    while world._events:
        world.run(world._events[0][0])
        world.core.check_integrity()
    assert not world.lost()
    assert all(visit.num_tokens == 2 for visit in world.visits.values())
