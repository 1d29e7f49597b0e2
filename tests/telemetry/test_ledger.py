"""The ledger is a G-counter: its order of merging does not matter, and what it has shown it never takes back."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.telemetry import ledger as ledger_module
from serve_app.telemetry.ledger import Ledger, LocalBook

NAMES = st.sampled_from(["a", "b", "c"])
SERIES = st.sampled_from(["x", "y", "z|le"])
VALUES = st.floats(0, 1e12) | st.integers(0, 2**40)
ROWS = st.dictionaries(NAMES, st.dictionaries(SERIES, VALUES))


def merged(*many):
    ledger = Ledger()
    for rows in many:
        ledger.merge(rows)
    return ledger


@given(ROWS, ROWS)
def test_merging_is_commutative(one, other):
    assert merged(one, other).since(0) == merged(other, one).since(0)
    assert merged(one, other).totals() == merged(other, one).totals()


@given(ROWS, ROWS, ROWS)
def test_merging_is_associative(one, other, third):
    left = merged(merged(one, other).since(0), third)
    right = merged(one, merged(other, third).since(0))
    assert left.since(0) == right.since(0)
    assert left.totals() == right.totals()


@given(ROWS)
def test_merging_is_idempotent(rows):
    once = merged(rows)
    version = once.version
    once.merge(rows)
    once.merge(once.since(0))
    assert once.version == version
    assert once.since(0) == merged(rows).since(0)


@given(st.lists(ROWS, max_size=8))
def test_totals_never_fall(many):
    ledger = Ledger()
    before = {}
    for rows in many:
        ledger.merge(rows)
        after = ledger.totals()
        assert all(after[key] >= value for key, value in before.items())
        before = after


@given(st.lists(ROWS, max_size=8), st.data())
def test_who_is_told_what_is_new_since_then_has_all(many, data):
    ledger, follower, version = Ledger(), Ledger(), 0
    for rows in many:
        ledger.merge(rows)
        if data.draw(st.booleans()):
            follower.merge(ledger.since(version))
            version = ledger.version
    follower.merge(ledger.since(version))
    assert follower.since(0) == ledger.since(0)


def test_what_is_no_count_is_left_out():
    ledger = merged({"a": {"x": math.nan, "y": math.inf, "z": -1.0, "v": 0.0, "w": 2}})
    assert ledger.since(0) == {"a": {"w": 2}}


def test_rows_and_series_are_bounded(monkeypatch):
    monkeypatch.setattr(ledger_module, "MAX_ROWS", 2)
    monkeypatch.setattr(ledger_module, "MAX_SERIES", 3)
    ledger = merged({"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 4}})
    assert ledger.totals() == {"x": 3}
    ledger.merge({"a": {f"s{i}": 1 for i in range(3)}})
    assert set(ledger.since(0)["a"]) == {"x"}
    ledger.merge({"a": {"x": 5, "y": 1, "z": 1}, "b": {"long" * 100: 1}})
    assert ledger.totals() == {"x": 7, "y": 1, "z": 1}


def test_the_copies_that_are_handed_out_are_not_the_ledger_s():
    ledger = merged({"a": {"x": 1}})
    ledger.since(0)["a"]["x"] = 7
    assert ledger.totals() == {"x": 1}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_an_engine_that_starts_again_from_zero_takes_nothing_back(events):
    book, row, truth = LocalBook(), {"x": 0, "y": 0}, {"x": 0, "y": 0}
    for starts_anew, more_x, more_y in events:
        if starts_anew and row["x"] > 0:
            row = {"x": 0, "y": 0}
            book.note_engine(dict(row))
        for key, more in (("x", more_x), ("y", more_y)):
            row[key] += more
            truth[key] += more
        book.note_engine(dict(row))
    assert book.totals() == {key: value for key, value in truth.items() if value}
