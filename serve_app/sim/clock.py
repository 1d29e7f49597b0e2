"""The virtual clock: what is due happens in the order of its time, and of its being set where that is the same."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Clock:
    """`after` sets what will happen, `step` lets the next of it happen. Time is in virtual seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._due, (self.now + delay_s, next(self._order), action, args))

    def step(self) -> None:
        self.now, _, action, args = heapq.heappop(self._due)
        action(*args)
