"""What was counted, and by whom: a grow-only ledger (a state-based G-counter, Shapiro et al. 2011).

Each process writes a row of its own, in which nothing ever falls. Two ledgers are merged by the higher value of each
entry, in any order and any number of times; the sums over all rows then never go backwards, whoever dies.

The rows of the dead are kept. To fold them into one would count them twice as soon as two had done so without knowing
of each other; their number has a limit instead.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

log = logging.getLogger(__name__)

Row = dict[str, float]  # series -> what it has come to

MAX_ROWS = 1_000  # one for each ingress replica and each engine that ever was; what further ones count is left out
MAX_SERIES = 2_000  # of a row
MAX_NAME_CHARS = 256  # of a row's or a series's name


class Ledger:
    """Rows by name. `version` grows whenever one of them does."""

    def __init__(self) -> None:
        self.version = 0
        self._rows: dict[str, Row] = {}
        self._changed: dict[str, int] = {}  # row -> the version in which it last grew

    def merge(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Take over what is higher. Zeros, infinities and what is not a number count for nothing."""
        for name, row in rows.items():
            news = {key: value for key, value in row.items() if self._is_news(name, key, value)}
            if news and self._has_room(name, news):
                self._rows.setdefault(name, {}).update(news)
                self.version += 1
                self._changed[name] = self.version

    def since(self, version: int) -> dict[str, Row]:
        """Copies of the rows that have grown since then; since 0: all."""
        return {name: dict(self._rows[name]) for name, changed in self._changed.items() if changed > version}

    def totals(self) -> Row:
        """Sums over all rows. Their rounding does not depend on the order, so that they grow with their summands."""
        values: defaultdict[str, list[float]] = defaultdict(list)
        for row in self._rows.values():
            for key, value in row.items():
                values[key].append(value)
        return {key: math.fsum(summands) for key, summands in values.items()}

    def _is_news(self, name: str, key: str, value: float) -> bool:
        return math.isfinite(value) and value > self._rows.get(name, {}).get(key, 0.0)

    def _has_room(self, name: str, news: Row) -> bool:
        known = self._rows.get(name)
        names = (name, *news)
        if (
            (known is None and len(self._rows) >= MAX_ROWS)
            or len((known or {}).keys() | news.keys()) > MAX_SERIES
            or max(map(len, names)) > MAX_NAME_CHARS
        ):
            log.warning("the metrics' ledger of %d rows takes no more of %.64r", len(self._rows), name)
            return False
        return True


class Book(Protocol):
    """One process's share in a ledger."""

    row: Row  # what this process counts; nothing in it may fall

    def note_engine(self, row: Row) -> None:
        """What the engine's statistics say, once more. A ledger that the engine keeps itself has it already."""
        ...

    async def refresh(self) -> None:
        """Bring the totals up to date, as far as that can be done at once."""
        ...

    def totals(self) -> Row | None:
        """What all have counted; None as long as this process has not been told."""
        ...


class LocalBook:
    """The ledger of a process that shares it with nobody."""

    def __init__(self) -> None:
        self.row: Row = {}
        self._ledger = Ledger()
        self._engine: Row = {}
        self._num_engines = 0

    def note_engine(self, row: Row) -> None:
        """Where something falls, its engine is a new one that has started from zero."""
        if any(value < self._engine.get(key, 0.0) for key, value in row.items()):
            self._num_engines += 1
            self._engine = {}
        self._engine |= row
        self._ledger.merge({f"engine-{self._num_engines}": row})

    async def refresh(self) -> None:
        """There is nobody to ask."""

    def totals(self) -> Row:
        self._ledger.merge({"here": self.row})
        return self._ledger.totals()
