"""What all parts of one virtual cell share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import msgspec

from serve_app.engine.cell import CellEvent
from serve_app.sim.clock import Clock
from serve_app.sim.network import Network
from serve_app.sim.scenario import Scenario, draw_scenario

if TYPE_CHECKING:
    from serve_app.sim.engine import VirtualEngine
    from serve_app.sim.worker import VirtualWorker

Trace = Callable[[str], None]


class ViolationError(Exception):
    """Something happened that must never happen."""


class Tally(msgspec.Struct):
    """What happened in one run, or in many."""

    seeds: int = 0
    epochs: int = 0
    deaths: int = 0
    freezes: int = 0
    engine_deaths: int = 0
    requests: int = 0
    tokens: int = 0
    replays: int = 0

    def add(self, other: "Tally") -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class World:
    """One virtual cell in the making: `engine` and `workers` come and go."""

    scenario: Scenario
    rng: Random
    clock: Clock
    network: Network
    trace: Trace | None = None
    tally: Tally = field(default_factory=lambda: Tally(seeds=1))
    workers: dict[str, "VirtualWorker"] = field(default_factory=dict)  # all that ever were
    engine: "VirtualEngine | None" = None  # None: it is dead
    num_engines: int = 0

    @staticmethod
    def of(seed: int, trace: Trace | None) -> "World":
        rng, clock = Random(seed), Clock()
        scenario = draw_scenario(rng)
        return World(scenario, rng, clock, Network(clock, rng, scenario.weather), trace)

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.clock.now:9.4f} {text}")

    def to_engine(self, engine: int, event: CellEvent, *, is_safe: bool = False) -> None:
        """Send an event to the engine of that number; what comes after its death is lost."""

        def arrive(event: CellEvent) -> None:
            if self.engine is not None and self.engine.number == engine:
                self.engine.take(event)

        self.network.send(arrive, event, is_safe=is_safe)

    def to_worker(self, name: str, message: object, *, is_safe: bool = False) -> None:
        if name in self.workers:
            self.network.send(self.workers[name].take, message, is_safe=is_safe)

    @property
    def living(self) -> list["VirtualWorker"]:
        return [worker for worker in self.workers.values() if worker.is_alive]
