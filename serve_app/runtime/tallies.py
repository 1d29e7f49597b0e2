"""How the metrics' ledger is kept by the processes of a cell, so that all ingress replicas show the same counts.

Each ingress replica counts in a row of its own and tells the engine; the engine adds its own, merges, and tells all.
What a replica shows is what the engine has told it: a scrape asks the engine first, and the engine answers the asker
last. So whatever has been shown was sent to every other replica before, and each of them hands all that it was told to
the next engine: no count goes backwards, whichever replica is asked, as long as one of them lives. Without an engine
counts stand still; what is counted meanwhile is shown when there is one again. A process that is killed takes with it
what it had not told yet: what it counted in its last second.
"""

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from serve_app.runtime.wire import Tally
from serve_app.telemetry.ledger import Ledger, Row

log = logging.getLogger(__name__)

TELL_S = 1.0  # between two rows from an ingress replica to its engine, scrapes aside
PULL_S = 0.3  # that the engine may take to answer a scrape
MAX_PULLS = 8  # scrapes that wait for the engine at a time; others show what was told last
SETTLE_S = 4.0  # that a new engine waits for all replicas to find it before it tells any what the others know
ROWS_A_MESSAGE = 64

Clock = Callable[[], float]


class EngineTallies:
    """The engine's side. `send` takes a peer's name, and says whether it could; `row` is what the engine counts."""

    def __init__(
        self, send: Callable[[str, Tally], bool], row: Callable[[], Row], clock: Clock = time.monotonic
    ) -> None:
        self._name = f"engine-{uuid.uuid4().hex[:12]}"  # a new engine starts from zero, in a row of its own
        self._send = send
        self._row = row
        self._clock = clock
        self._began_s = clock()
        self._ledger = Ledger()
        self._told: dict[str, int] = {}  # ingress replica -> the version that it has; -1: nothing

    def on(self, tally: Tally) -> None:
        """An ingress replica tells, or asks."""
        if tally.greets:
            self._told[tally.name] = -1
        self._ledger.merge(tally.rows)
        if tally.pull and tally.name in self._told:
            self._answer(tally.name, tally.pull)

    def tell(self) -> None:
        """Once a second: what is new, to all."""
        if self._is_settled:
            self._ledger.merge({self._name: self._row()})
            for name in self._told:
                self._tell_one(name)

    def leave(self, name: str) -> None:
        """An ingress replica is gone. What it counted stays."""
        self._told.pop(name, None)

    @property
    def _is_settled(self) -> bool:
        return self._clock() - self._began_s >= SETTLE_S

    def _answer(self, asker: str, pull: int) -> None:
        """The others first: nobody shows what they have not been sent."""
        if not self._is_settled:
            self._send(asker, Tally(self._name, {}, pull, more=True))
            return
        self._ledger.merge({self._name: self._row()})
        for name in self._told:
            if name != asker:
                self._tell_one(name)
        self._tell_one(asker, pull)

    def _tell_one(self, name: str, pull: int = 0) -> None:
        told = self._told[name]
        if told == self._ledger.version and not pull:
            return
        if all(self._send(name, tally) for tally in _in_parts(self._name, self._ledger.since(told), pull)):
            self._told[name] = self._ledger.version


class IngressBook:
    """An ingress replica's side, and its `Book`. `send` gives a message to the engine. In one event loop only."""

    def __init__(self, name: str, send: Callable[[Tally], object], clock: Clock = time.monotonic) -> None:
        self.row: Row = {}
        self._name = name
        self._send = send
        self._clock = clock
        self._ledger = Ledger()  # what the engine has told
        self._sent: Row = {}  # our row as the engine has it
        self._sent_s = clock()
        self._is_told = False
        self._is_linked = False
        self._numbers = itertools.count(1)
        self._pulls: dict[int, asyncio.Future[None]] = {}

    # -- towards the metrics ------------------------------------------------------------------------------------------

    def note_engine(self, row: Row) -> None:
        """The engine tells this in its own row."""

    def totals(self) -> Row | None:
        return self._ledger.totals() if self._is_told else None

    async def refresh(self) -> None:
        """Tell our row, and wait a moment for the engine's answer."""
        if not self._is_linked or len(self._pulls) >= MAX_PULLS:
            return
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = self.ask(answered)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(PULL_S):
                    await answered
        finally:
            self._pulls.pop(number, None)

    def ask(self, answered: "asyncio.Future[None] | None" = None) -> int:
        """Tell our row, to be answered at once. Returns the number of the question."""
        number = next(self._numbers)
        if answered is not None:
            self._pulls[number] = answered
        self._tell(number)
        return number

    # -- towards the engine -------------------------------------------------------------------------------------------

    def greet(self) -> None:
        """There is an engine: it is given all that is known here."""
        self._is_linked = True
        self._mark_sent()
        rows = self._ledger.since(0) | {self._name: self._sent}
        for tally in _in_parts(self._name, rows, greets=True):
            self._send(tally)

    def beat(self) -> None:
        """Called again and again while there is an engine."""
        if self._is_linked and self._clock() - self._sent_s >= TELL_S and self.row != self._sent:
            self._tell()

    def lose(self) -> None:
        """The engine is gone: nobody waits for it."""
        self._is_linked = False
        self._wake(*self._pulls)

    def on(self, tally: Tally) -> None:
        """The engine tells."""
        self._ledger.merge(tally.rows)
        if not tally.more:
            self._is_told = True
        if tally.pull:
            self._wake(tally.pull)

    def _tell(self, pull: int = 0) -> None:
        self._mark_sent()
        self._send(Tally(self._name, {self._name: self._sent}, pull))

    def _mark_sent(self) -> None:
        self._sent, self._sent_s = dict(self.row), self._clock()

    def _wake(self, *numbers: int) -> None:
        for answered in [self._pulls[number] for number in numbers if number in self._pulls]:
            if not answered.done():
                answered.set_result(None)


def _in_parts(name: str, rows: dict[str, Row], pull: int = 0, *, greets: bool = False) -> list[Tally]:
    """Messages of a limited size; the last one answers the pull."""
    names = list(rows)
    parts = [names[i : i + ROWS_A_MESSAGE] for i in range(0, len(names), ROWS_A_MESSAGE)] or [[]]
    last = len(parts) - 1
    return [
        Tally(
            name,
            {row: {key: value for key, value in rows[row].items() if value} for row in part},
            pull if i == last else 0,
            greets=greets and i == 0,
            more=i < last,
        )
        for i, part in enumerate(parts)
    ]
