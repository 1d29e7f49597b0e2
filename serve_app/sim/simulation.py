"""One seed: a virtual cell with the real engine, from nothing through all its faults to full strength and idleness.

Everything that happens follows from the seed: running it again is the same, event for event.
"""

from serve_app.sim.client import Client
from serve_app.sim.engine import MakeCell, VirtualEngine, make_cell
from serve_app.sim.faults import Faults
from serve_app.sim.keeper import Keeper
from serve_app.sim.network import Weather
from serve_app.sim.scenario import LOAD_S
from serve_app.sim.witness import Epochs, Witness
from serve_app.sim.world import Tally, Trace, ViolationError, World

HEAL_S = 60.0  # after the last fault: freezes and kills take up to 20 s, and who does not join is awaited for 15 s
LOOK_S = 0.5

__all__ = ["Simulation", "SimulationError", "simulate"]


class SimulationError(Exception):
    """What a seed has brought to light."""

    def __init__(self, seed: int, text: str) -> None:
        super().__init__(seed, text)
        self.seed, self.text = seed, text

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.text}"


def simulate(seed: int, make: MakeCell = make_cell, trace: Trace | None = None) -> Tally:
    """Run one seed; raises SimulationError for whatever did not hold. `trace` is called with a line for each event."""
    simulation = Simulation(seed, make, trace)
    try:
        return simulation.run()
    except (ViolationError, AssertionError, LookupError) as error:  # the engine's own assertions among them
        what = str(error) if isinstance(error, ViolationError) else f"{type(error).__name__}: {error}"
        raise SimulationError(seed, f"at {simulation.now_s:.3f} s: {what}") from error


class Simulation:
    def __init__(self, seed: int, make: MakeCell, trace: Trace | None) -> None:
        self._make = make
        self._world = World.of(seed, trace)
        self._epochs = Epochs()
        self._keeper = Keeper(self._world)
        self._client = Client(self._world)
        self._start_engine()
        Faults(self._world, self._keeper, self._kill_engine)
        self._world.clock.after(LOAD_S, self._calm)
        self._is_calm = False

    @property
    def now_s(self) -> float:
        return self._world.clock.now

    def run(self) -> Tally:
        clock, look_s = self._world.clock, LOAD_S
        limit_s = HEAL_S + self._world.scenario.serial_s
        while True:
            clock.step()
            if clock.now < look_s:
                continue
            look_s = clock.now + LOOK_S
            left = self._left()
            if not left:
                return self._sum()
            if clock.now > LOAD_S + limit_s:
                raise ViolationError(f"{limit_s:.0f} s after the last fault {left}")

    def _calm(self) -> None:
        self._is_calm, self._keeper.is_disturbed = True, False
        self._world.network.weather = Weather()
        self._world.note("no more faults")

    def _left(self) -> str:
        """What is not as it should be at the end; "" where all is well."""
        engine = self._world.engine
        if engine is None or not self._is_calm:
            return "there is no engine"
        if self._client.open:
            return f"these requests are open: {', '.join(self._client.open)}"
        stats, members = engine.cell.core.stats(), engine.cell.members.stats()
        if members.phase != "whole":
            return f"the cell is {members.phase}: {members.reason}"
        if stats.running or stats.waiting or stats.kv_usage:
            return f"{stats.running} run, {stats.waiting} wait, {stats.kv_usage:.0%} of the pages are held"
        return ""

    def _sum(self) -> Tally:
        engine = self._world.engine
        assert engine is not None
        engine.cell.core.check_integrity()
        self._count_replays()
        return self._world.tally

    def _count_replays(self) -> None:
        if self._world.engine is not None:
            self._world.tally.replays += self._world.engine.cell.core.stats().replayed_total

    # -- lives of the engine ------------------------------------------------------------------------------------------

    def _start_engine(self) -> None:
        cell = self._make(self._world.scenario)
        witness = Witness(self._world, cell, self._epochs, self._world.num_engines + 1)
        engine = VirtualEngine(self._world, cell, self._keeper, witness, self._client.hear)
        self._world.note(f"engine {engine.number} starts")
        engine.start()
        self._world.clock.after(self._world.rng.uniform(0.0, 1.0), self._find, engine)

    def _find(self, engine: VirtualEngine) -> None:
        if engine.is_alive:
            self._client.find(engine.number)

    def _kill_engine(self) -> None:
        if self._world.engine is None:
            return
        self._world.note(f"engine {self._world.engine.number} dies")
        self._world.tally.engine_deaths += 1
        self._count_replays()
        self._world.engine = None
        self._client.lose()
        self._world.clock.after(self._world.rng.uniform(0.2, 3.0), self._start_engine)
