"""Figures from records and kills that are made up."""

import pytest

from serve_app.drill.load import Record
from serve_app.drill.report import Kill, Span, digest, digests, phases_of, quantile, report
from serve_app.runtime.snapshot import EventView


def record(*token_s, ask=0, tokens=(1, 2, 3), **rest):
    """A stream sent at 0."""
    return Record(ask, f"r{ask}", 0.0, 100.0, list(tokens), list(token_s), **rest)


def kill(at_s, until_s, *, restored=True, **phases):
    return Kill("worker", "w0.0.0#1", 17, "n1", False, at_s, until_s, restored, phases)


REFERENCE = {0: digest([1, 2, 3])}


def test_an_undisturbed_drill_passes():
    found = report(REFERENCE, [record(1.0, 2.0)], [kill(5.0, 6.0)])
    assert found.passed
    assert (found.failed, found.different, found.num_streams, found.num_resumed) == (0, 0, 1, 0)
    assert (found.max_gap_s, found.p99_gap_s, found.kills[0].num_streams) == (0.0, 0.0, 0)


def test_a_gap_belongs_to_the_kill_whose_healing_it_overlaps():
    streams = [
        record(1.0, 9.0, 14.0, 14.5, 40.0),  # before both; over the first; within it; over the second
        record(2.0, 3.0),  # over none
        record(12.0, 12.5, 13.0),  # began while the first healed
    ]
    found = report(REFERENCE, streams, [kill(10.0, 13.0), kill(20.0, 21.0)])
    first, second = found.kills
    assert (first.num_streams, first.max_gap_s, first.p50_gap_s) == (2, 5.0, 0.5)
    assert (second.num_streams, second.max_gap_s, second.p99_gap_s) == (1, 25.5, 25.5)
    assert (found.max_gap_s, found.p99_gap_s) == (25.5, 25.5)


def test_the_wait_for_a_first_token_is_told_apart():
    found = report(REFERENCE, [record(12.0, 12.5), record(30.0)], [kill(10.0, 11.0)])
    assert (found.kills[0].max_first_token_s, found.kills[0].max_gap_s) == (30.0, 0.0)


def test_streams_that_fail_or_differ_are_counted_once_and_named():
    streams = [
        record(error="status 500", tokens=[1]),
        record(tokens=[1, 2, 4]),
        record(tokens=[1, 2]),
        record(changed="told again"),
        record(num_resumed=2),
    ]
    found = report(REFERENCE, streams, [])
    assert (found.failed, found.different, found.num_streams, found.num_resumed) == (1, 3, 5, 2)
    assert found.problems == [
        "1 of 5 streams failed, r0 first: status 500",
        "3 of 5 streams differ from the undisturbed run, r0 first: it ended with other tokens",
    ]


def test_streams_are_compared_with_their_own_request():
    undisturbed = [record(ask=0, tokens=[1]), record(ask=1, tokens=[2])]
    assert report(digests(undisturbed), undisturbed, []).passed
    swapped = [record(ask=0, tokens=[2]), record(ask=1, tokens=[1])]
    assert report(digests(undisturbed), swapped, []).different == 2


def test_a_cell_that_is_not_restored_is_a_problem():
    found = report(REFERENCE, [], [kill(10.0, 130.0, restored=False)], ["1 of 2 strikes were left out"])
    assert found.problems == [
        "1 of 2 strikes were left out",
        "120 s after worker w0.0.0#1 was struck the cell is not whole",
    ]


def test_phases_come_from_the_events_behind_a_kill():
    events = [
        EventView(9.0, "lost", 1, "an earlier one", {"load": 99.0}),
        EventView(10.25, "lost", 2, "w1", {}),
        EventView(10.75, "epoch", 2, "without w1", {"fence": 0.125, "repair": 0.25}),
        EventView(14.0, "restored", 3, "whole", {"fence": 0.5, "restored": 4.0}),
    ]
    phases = {"notice": 0.25, "fence": 0.125, "repair": 0.25, "restored": 4.0}
    assert phases_of(10.0, events) == phases
    assert phases_of(10.0, events[::-1]) == phases
    assert phases_of(20.0, events) == {}


def test_phases_are_summed_up_over_kills():
    kills = [kill(1.0, 2.0, fence=1.0, load=5.0), kill(3.0, 4.0, fence=2.0), kill(5.0, 6.0, fence=9.0)]
    assert report({}, [], kills).phases == {"fence": Span(9.0, 2.0), "load": Span(5.0, 5.0)}


@pytest.mark.parametrize(("q", "value"), [(0.0, 1), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_quantiles_are_values_that_there_are(q, value):
    assert quantile([4, 1, 3, 2], q) == value
    assert quantile([], q) == 0.0
