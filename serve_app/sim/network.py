"""A network worse than ours: messages between the same two may overtake each other, come twice, or never.

ZeroMQ does none of this on a connection that lives, but a connection may break, and the protocol is to bear it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from serve_app.sim.clock import Clock

M = TypeVar("M")


@dataclass(frozen=True)
class Weather:
    """How likely a message is late, doubled or lost."""

    late: float = 0.0
    doubled: float = 0.0
    lost: float = 0.0


class Network:
    def __init__(self, clock: Clock, rng: Random, weather: Weather) -> None:
        self.weather = weather
        self._clock, self._rng = clock, rng

    def send(self, deliver: Callable[[M], None], message: M, *, is_safe: bool = False) -> None:
        """Deliver a message after a while. One that `is_safe` is not lost."""
        if not is_safe and self._happens(self.weather.lost):
            return
        self._clock.after(self._delay_s(), deliver, message)
        if self._happens(self.weather.doubled):
            self._clock.after(self._delay_s(), deliver, message)

    def _delay_s(self) -> float:
        if self._happens(self.weather.late):
            return self._rng.uniform(0.01, 0.3) if self._rng.random() < 0.5 else self._rng.uniform(0.3, 3.0)
        return self._rng.uniform(0.001, 0.01)

    def _happens(self, chance: float) -> bool:
        return chance > 0 and self._rng.random() < chance
