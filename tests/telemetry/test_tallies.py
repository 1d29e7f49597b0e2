"""Whichever replica is asked, and whoever dies: counts never go backwards, and what was told is not lost."""

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, precondition, rule

from serve_app.runtime import tallies
from serve_app.runtime.tallies import SETTLE_S, TELL_S, EngineTallies, IngressBook
from serve_app.runtime.wire import Tally, decode, encode
from tests.telemetry.cell import Cell

SERIES = ("x", "y|le")
MOST_REPLICAS = 3


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Scraped(RuleBasedStateMachine):
    """Replicas and engines come, count, are scraped and die, in any order; messages arrive late, but in order.

    One replica is always left: that is who the counts live on with.
    """

    replicas = Bundle("replicas")

    @initialize(target=replicas)
    def begin(self):
        self.cell = Cell(is_prompt=False)
        self.shown = {}
        self.num_joined = 0
        first = multiple(self.join(), self.join())
        self.cell.beat(TELL_S)
        self.cell.deliver_all()
        return first

    @precondition(lambda self: len(self.cell.books) < MOST_REPLICAS)
    @rule(target=replicas)
    def join(self):
        self.num_joined += 1
        name = f"r{self.num_joined}"
        self.cell.join(name)
        return name

    @rule(name=replicas, series=st.sampled_from(SERIES), more=st.integers(1, 5))
    def count(self, name, series, more):
        if name in self.cell.books:
            row = self.cell.books[name].row
            row[series] = row.get(series, 0) + more

    @rule(series=st.sampled_from(SERIES), more=st.integers(1, 5))
    def engine_counts(self, series, more):
        self.cell.counted = self.cell.counted | {series: self.cell.counted.get(series, 0) + more}

    @rule(seconds=st.sampled_from([0.1, TELL_S, 2 * SETTLE_S]))
    def beat(self, seconds):
        self.cell.beat(seconds)

    @rule(name=replicas)
    def deliver(self, name):
        if name in self.cell.books:
            self.cell.deliver(name)

    @rule()
    def deliver_to_engine(self):
        self.cell.deliver_to_engine()

    @rule(name=replicas)
    def scrape(self, name):
        if name not in self.cell.books:
            return
        seen = self.cell.scrape(name)
        if seen is None:  # it has not been told yet, and says nothing
            return
        for series, value in self.shown.items():
            assert seen.get(series, 0) >= value, (series, value, seen, name)
        self.shown = seen

    @precondition(lambda self: self.is_known_to_all_but_one())
    @rule(name=consumes(replicas))
    def kill(self, name):
        if name in self.cell.books and len(self.cell.books) > 1:
            self.cell.kill(name)

    @precondition(lambda self: self.cell.engine is not None)
    @rule()
    def engine_dies(self):
        self.cell.stop_engine()

    @precondition(lambda self: self.cell.engine is None)
    @rule()
    def engine_starts(self):
        self.cell.start_engine()

    def is_known_to_all_but_one(self):
        """Killing whoever alone was told of something would be the death of all that know it."""
        return sum(book.totals() is not None for book in self.cell.books.values()) > 1


Scraped.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestNoCountGoesBackwards = Scraped.TestCase


def test_what_a_replica_counted_outlives_it():
    cell = Cell()
    for name in "ab":
        cell.join(name)
    cell.books["a"].row["x"] = 3
    cell.beat(TELL_S)
    cell.kill("a")
    cell.books["b"].row["x"] = 4
    assert cell.scrape("b") == {"x": 7}
    cell.join("c")
    assert cell.scrape("c") == {"x": 7}


def test_what_one_replica_has_shown_the_others_know_even_if_the_engine_dies_right_then():
    cell = Cell()
    for name in "ab":
        cell.join(name)
        cell.scrape(name)
    cell.books["a"].row["x"] = 3
    assert cell.scrape("a") == {"x": 3}
    cell.stop_engine()
    assert cell.scrape("b") == {"x": 3}


def test_what_dead_replicas_and_dead_engines_counted_is_handed_to_the_next_engine():
    cell = Cell()
    for name in "ab":
        cell.join(name)
    cell.books["a"].row["x"] = 3
    cell.counted = {"y": 5}
    cell.beat(TELL_S)
    cell.stop_engine()
    cell.kill("a")
    cell.start_engine()
    cell.join("c")
    assert cell.scrape("c") == {"x": 3, "y": 5}


def test_what_an_engine_counted_outlives_it():
    cell = Cell()
    cell.join("a")
    cell.counted = {"x": 5}
    assert cell.scrape("a") == {"x": 5}
    cell.stop_engine()
    assert cell.scrape("a") == {"x": 5}
    cell.start_engine()
    cell.counted = {"x": 2}
    assert cell.scrape("a") == {"x": 7}


def test_all_that_is_counted_while_there_is_no_engine_is_shown_later():
    cell = Cell()
    book = cell.join("a")
    cell.scrape("a")
    cell.stop_engine()
    book.row["x"] = 3
    assert cell.scrape("a") == {}
    cell.start_engine()
    assert cell.scrape("a") == {"x": 3}


def test_a_new_engine_tells_nobody_before_all_had_time_to_find_it():
    cell = Cell()
    a, b = cell.join("a"), cell.join("b")
    a.row["x"], b.row["x"] = 3, 4
    cell.beat(TELL_S)
    assert cell.scrape("a") == {"x": 7}
    cell.stop_engine()
    cell.engine = EngineTallies(cell._to_replica, dict, lambda: cell.now_s)
    a.greet()
    a.row["x"] = 10
    assert cell.scrape("a") == {"x": 7}
    b.greet()
    cell.now_s += SETTLE_S
    assert cell.scrape("a") == {"x": 14}


def test_nothing_is_said_where_nothing_is_new():
    cell = Cell(is_prompt=False)
    book = cell.join("a")
    book.row["x"] = 1
    for _ in range(3):
        cell.beat(TELL_S)
        cell.deliver_all()
    for _ in range(5):
        cell.beat(TELL_S)
        assert not cell.outbox
        assert not cell.inboxes["a"]


def test_a_row_is_told_once_a_second_at_most():
    said = []
    now = 0.0
    book = IngressBook("a", said.append, lambda: now)
    book.greet()
    said.clear()
    for tenth in range(1, 31):
        now = tenth / 10
        book.row["x"] = tenth
        book.beat()
    assert [tally.rows["a"]["x"] for tally in said] == [10, 20, 30]


def test_a_large_ledger_goes_in_parts_and_whole(monkeypatch):
    monkeypatch.setattr(tallies, "ROWS_A_MESSAGE", 3)
    cell = Cell()
    for number in range(10):
        cell.join(f"r{number}").row["x"] = 1
        cell.beat(TELL_S)
        if number:
            cell.kill(f"r{number}")
    heard = []
    cell.join("late")
    book = cell.books["late"] = IngressBook("late", cell._to_engine)
    take = book.on
    book.on = lambda tally: (heard.append((len(tally.rows), tally.more)), take(tally))
    book.greet()
    assert cell.scrape("late") == {"x": 10}
    assert all(num_rows <= 3 for num_rows, _ in heard)
    assert [more for _, more in heard][:4] == [True, True, True, False]


def test_a_replica_that_the_engine_has_given_up_is_told_no_more_but_what_it_says_counts():
    said = []
    engine = EngineTallies(lambda name, tally: said.append(name) or True, dict, iter(range(0, 1000, 10)).__next__)
    engine.on(Tally("a", {"a": {"x": 1}}, greets=True))
    engine.leave("a")
    engine.on(Tally("a", {"a": {"x": 2}}, pull=1))
    engine.tell()
    assert not said
    engine.on(Tally("b", {}, greets=True))
    engine.tell()
    assert said == ["b"]


@pytest.mark.anyio
async def test_a_scrape_does_not_wait_long_for_an_engine_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(tallies, "PULL_S", 0.01)
    book = IngressBook("a", lambda _: True)
    await book.refresh()  # nobody is there
    book.greet()
    await book.refresh()  # nobody answers
    assert not book._pulls


@pytest.mark.anyio
async def test_a_scrape_stops_waiting_when_the_engine_is_lost(monkeypatch):
    monkeypatch.setattr(tallies, "PULL_S", 1000.0)
    asked = asyncio.Event()
    book = IngressBook("a", lambda tally: asked.set() if tally.pull else None)
    book.greet()
    refresh = asyncio.create_task(book.refresh())
    await asked.wait()
    book.lose()
    await asyncio.wait_for(refresh, 20)


@pytest.mark.anyio
async def test_scrapes_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(tallies, "PULL_S", 1000.0)
    said = []
    book = IngressBook("a", said.append)
    book.greet()
    said.clear()
    waiting = [asyncio.create_task(book.refresh()) for _ in range(50)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(said) == tallies.MAX_PULLS
    for number in [tally.pull for tally in said]:
        book.on(Tally("engine", {}, number))
    await asyncio.wait_for(asyncio.gather(*waiting), 20)


def test_a_tally_survives_the_wire():
    tally = Tally("a", {"a": {"x|0.5": 3.0, "y": 4}}, pull=7, greets=True, more=True)
    assert decode(encode(tally)) == tally
