"""Clients, and the router in front of some cells: of two cells taken at random the one with fewer requests open.

That is what Ray Serve's router does (power of two choices, doi 10.1109/71.963420). Cells depend on each other by it
alone, so only the two in question are moved along to the moment of an arrival.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from heapq import heappop, heappush

from serve_app.engine.request import Emission, Request, SamplingParams, Terms
from serve_app.sim.serving.cell import Cell, CellSetup
from serve_app.sim.serving.ledger import Ledger, Load
from serve_app.sim.serving.losses import Loss
from serve_app.sim.serving.spans import Spans

MAX_RETRY_WAIT_S = 600.0  # whoever is told to wait longer stays away


@dataclass(frozen=True)
class Clients:
    """What all of them do."""

    num_retries: int = 0  # who is refused waits as told and comes back, so many times
    hang_up_s: float = math.inf  # without a first token
    terms: Terms = field(default_factory=Terms)


class Router:
    """Of the cells with these numbers. `run` serves a load and returns what became of it."""

    def __init__(
        self,
        cells: range,
        setup: CellSetup,
        clients: Clients,
        seed: int,
        losses: tuple[Loss, ...] = (),
        spans: dict[int, Spans] | None = None,
    ) -> None:
        """`spans`: by cell, where what its workers do is kept. Losses of other cells are passed over."""
        self._clients = clients
        self._draw = random.Random(f"router {seed} {cells.start}")
        self._returns: list[tuple[float, int]] = []  # who was refused: when it comes back
        spans = spans or {}
        self._cells = [Cell(number, setup, self._hear, spans.get(number)) for number in cells]
        for loss in losses:
            if loss.cell in cells:
                self._cells[loss.cell - cells.start].expect(loss)

    def run(self, load: Load) -> Ledger:
        self._load, self._ledger = load, Ledger(len(load))
        self._filling = [0] * max(load.prompt_tokens, default=0)
        for number, at_s in self._arrivals():
            self._send(number, at_s)
        for cell in self._cells:
            cell.advance()
            stats = cell.core.stats()
            assert not stats.running + stats.waiting, f"cell {cell.number} is left with requests"
            self._ledger.replayed += stats.replayed_total
            self._ledger.num_steps += stats.steps_total
            self._ledger.outages += cell.outages
        return self._ledger

    def _arrivals(self) -> Iterator[tuple[int, float]]:
        """Of the load and of those who come back, in the order of time."""
        for number, at_s in enumerate(self._load.at_s):
            while self._returns and self._returns[0][0] <= at_s:
                yield self._return()
            yield number, at_s
        while self._returns:
            yield self._return()

    def _return(self) -> tuple[int, float]:
        at_s, number = heappop(self._returns)
        return number, at_s

    def _send(self, number: int, now_s: float) -> None:
        cell = self._choose(now_s)
        self._ledger.ask(number, now_s)
        refusal = cell.submit(self._request(number))
        if refusal is not None:
            self._ledger.refuse(number, refusal.reason)
            comes_back = 0 < refusal.retry_after_s <= MAX_RETRY_WAIT_S
            if comes_back and self._ledger.num_tries[number] <= self._clients.num_retries:
                heappush(self._returns, (now_s + refusal.retry_after_s, number))
        elif self._clients.hang_up_s < math.inf:
            cell.at(now_s + self._clients.hang_up_s, self._hang_up, cell, number)

    def _choose(self, now_s: float) -> Cell:
        """Both are moved along to now."""
        cells = self._cells
        one = int(self._draw.random() * len(cells))
        first = cells[one]
        first.advance(now_s)
        if len(cells) == 1:
            return first
        second = cells[(one + 1 + int(self._draw.random() * (len(cells) - 1))) % len(cells)]
        second.advance(now_s)
        return second if second.num_open < first.num_open else first

    def _request(self, number: int) -> Request:
        """All prompts differ in their first token and have the rest in common: no prefix cache helps."""
        num_tokens = self._load.prompt_tokens[number]
        prompt = [number + 1, *self._filling[: num_tokens - 1]]
        return Request(str(number), prompt, _sampling(self._load.output_tokens[number]), terms=self._clients.terms)

    def _hear(self, emission: Emission, now_s: float) -> None:
        self._ledger.hear(emission, now_s)

    def _hang_up(self, cell: Cell, number: int) -> None:
        if math.isnan(self._ledger.first_s[number]):
            cell.cancel(str(number))


@cache
def _sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
