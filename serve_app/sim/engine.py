"""The real engine, driven as `runtime.engine_loop` does it."""

from collections import deque
from collections.abc import Callable

from serve_app.engine.cell import CellCommand, CellCore, CellEvent
from serve_app.engine.core import EngineCore
from serve_app.engine.members import Formed, Kill, Note, Spawn, Tell, Tick
from serve_app.engine.membership import Membership
from serve_app.engine.plan import Emit, Run
from serve_app.engine.request import Emission
from serve_app.sim.keeper import Keeper
from serve_app.sim.scenario import STEP_LIMIT_S, Scenario
from serve_app.sim.witness import Witness
from serve_app.sim.world import World

TICK_S = 0.1

MakeCell = Callable[[Scenario], CellCore]


def make_cell(scenario: Scenario) -> CellCore:
    """The engine that serves. Tests make others, with a fault planted."""
    members = Membership(scenario.layout, scenario.stages, scenario.slots, scenario.members)
    return CellCore(EngineCore(scenario.engine), members, STEP_LIMIT_S)


class VirtualEngine:
    """One life of the engine, from `start` until the world has another one or none."""

    def __init__(
        self, world: World, cell: CellCore, keeper: Keeper, witness: Witness, emit: Callable[[Emission], None]
    ) -> None:
        world.num_engines += 1
        self.number = world.num_engines
        self.cell = cell
        self._world, self._keeper, self._witness, self._emit = world, keeper, witness, emit
        self._inbox: deque[CellEvent] = deque()
        self._is_paused = False

    def start(self) -> None:
        self._world.engine = self
        self._keeper.begin(self.number)
        self._tick()

    def pause(self, pause_s: float) -> None:
        """Its process gets no time for a while. What comes meanwhile waits."""
        self._world.note(f"the engine pauses for {pause_s:.2f} s")
        self._is_paused = True
        self._world.clock.after(pause_s, self._go_on)

    def _go_on(self) -> None:
        self._is_paused = False
        while self._inbox:
            self._handle(self._inbox.popleft())

    @property
    def is_alive(self) -> bool:
        return self._world.engine is self

    def take(self, event: CellEvent) -> None:
        if self._is_paused:
            self._inbox.append(event)
        else:
            self._handle(event)

    def _tick(self) -> None:
        if self.is_alive:
            if not self._is_paused:
                self._handle(Tick())
            self._world.clock.after(TICK_S, self._tick)

    def _handle(self, event: CellEvent) -> None:
        if not self.is_alive:
            return
        self._witness.expect(event)
        commands = self.cell.on(event, self._world.clock.now)
        self._witness.check(event, commands)
        for command in commands:
            self._obey(command)

    def _obey(self, command: CellCommand) -> None:
        match command:
            case Run(plan):
                for name in self.cell.members.workers_of(plan.replica):
                    self._world.to_worker(name, plan)
            case Emit(emission):
                self._emit(emission)
            case Tell(name, _, message):
                self._world.to_worker(name, message)
            case Spawn(seat, pairs):
                self._keeper.spawn(self.number, seat, pairs)
            case Kill(name, why):
                self._keeper.kill(name, why)
            case Formed(epoch):
                self._world.note(f"epoch {epoch} is formed")
            case Note(_, _, text):
                self._world.note(text)
