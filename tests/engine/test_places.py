"""A Retry-After is a place that is kept, as far as the refused are known to come back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.places import GRACE_S, LATE_S, MAX_PLACES, Asked, Places, key_of
from serve_app.engine.request import Request, SamplingParams, Terms


def asked(name="a", tenant="", share=0.9, cost_s=1.0):
    return Asked(name.encode(), tenant, share, cost_s)


def over_s(places, who, now=0.0, wait_s=5.0, room_s=5.0):
    return places.over_s(who, wait_s, room_s, 1, now)


def test_a_place_is_due_when_it_was_promised_and_taken_once():
    places = Places()
    retry_s = places.keep(asked(), 3.2, 10.0)
    assert retry_s == 4.0
    assert not places.is_due(b"a", 12.9)
    assert places.is_due(b"a", 10.0 + retry_s)
    places.take(b"a")
    assert not places.is_due(b"a", 10.0 + retry_s)


def test_who_comes_too_early_is_told_of_the_place_it_has():
    places = Places()
    places.keep(asked(), 9.0, 0.0)
    before_s = over_s(places, asked("b"))
    assert places.keep(asked(), 30.0, 4.0) == 6.0
    assert over_s(places, asked("b")) == before_s


def test_copies_of_one_request_have_a_place_each():
    places = Places()
    for _ in range(4):
        places.keep(asked(), 2.0, 0.0)
    for _ in range(4):
        assert places.is_due(b"a", 3.0)
        places.take(b"a")
    assert not places.is_due(b"a", 3.0)
    assert over_s(places, asked("b")) == 0.0


def test_places_of_later_leave_the_time_until_then_to_newcomers():
    """A queue that is done by then is in nobody's way."""
    places = Places()
    for i in range(5):
        places.keep(asked(str(i)), 60.0, 0.0)
    assert over_s(places, asked("new"), wait_s=4.9) == 0.0
    assert over_s(places, asked("new"), now=60.9, wait_s=4.9) > 0


def test_whoever_does_not_come_is_soon_no_longer_expected_but_still_known():
    places = Places()
    places.keep(asked(cost_s=3.0), 0.5, 0.0)
    assert over_s(places, asked("b"), now=1.0) > 0
    places.look(1.1 + LATE_S)
    assert over_s(places, asked("b"), now=1.1 + LATE_S) == 0.0
    assert places.is_due(b"a", 1.1 + LATE_S)
    places.look(1.1 + GRACE_S + 1)
    assert not places.is_due(b"a", 1.1 + GRACE_S + 1)


def test_how_many_come_back_is_learned():
    def booked_s(comes):
        places = Places()
        for i in range(100):
            retry_s = places.keep(asked(str(i)), 1.0, 10.0 * i)
            if comes:
                places.take(str(i).encode())
            places.look(10.0 * i + retry_s + 5)
        for i in range(8):
            places.keep(asked(f"x{i}"), 0.5, 2000.0)
        return over_s(places, asked("new"), now=2000.0)

    assert booked_s(comes=True) > 7.5
    assert booked_s(comes=False) < 0.5


def test_a_tenant_with_many_places_does_not_book_the_time_of_another():
    places = Places()
    for i in range(200):
        places.keep(asked(str(i), "flood"), i / 4, 0.0)
    assert over_s(places, asked("more", "flood")) > 50
    assert over_s(places, asked("new", "other")) < 3


def test_places_of_a_lower_priority_are_not_kept_from_a_higher_one():
    places = Places()
    for i in range(50):
        places.keep(asked(str(i), share=0.5), i / 4, 0.0)
    assert over_s(places, asked("high", share=1.0)) == 0.0
    assert over_s(places, asked("low", share=0.5)) > 10


def test_places_have_a_limit():
    places = Places()
    for i in range(MAX_PLACES + 5):
        places.keep(asked(str(i)), i / 100, 0.0)
    assert len(places._places) == MAX_PLACES


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.1, 20), st.sampled_from("abc")), max_size=60))
def test_what_is_kept_is_what_was_promised_and_nothing_else(events):
    """The sums by second are those of the places that are expected; all given up, nothing is left."""
    places, now = Places(), 0.0
    for name, after_s, tenant in events:
        now += after_s / 4
        who = asked(f"{name}{tenant}", tenant, 0.5 + name / 10, after_s / 10)
        places.look(now)
        if places.is_due(who.key, now):
            places.take(who.key)
        else:
            places.keep(who, after_s, now)
        expected = sum(p.num * p.cost_s for p in places._places.values() if p.is_expected)
        for table in (places._of_share, places._of_tenant):
            assert sum(sum(of.values()) for of in table.values()) == pytest.approx(expected, abs=1e-6)
    places._next_look_s = 0.0
    places.look(now + 1000)
    assert not places._places and not places._of_share and not places._of_tenant


def test_a_request_is_known_by_what_it_asks_whatever_it_is_called():
    def key(rid, prompt=(1, 2), tenant="t", **sampling):
        return key_of(Request(rid, list(prompt), SamplingParams(**sampling), terms=Terms(tenant=tenant)))

    assert key("x", seed=1) == key("y", seed=2)
    assert len({key("x"), key("x", (1, 3)), key("x", tenant="u"), key("x", max_new_tokens=5)}) == 4
