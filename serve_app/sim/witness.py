"""What must hold between the engine and everybody else, looked at with each event and each command."""

from serve_app.engine.cell import CellCommand, CellCore, CellEvent
from serve_app.engine.members import Formed, Join, Kill, Tell, Tick
from serve_app.engine.plan import Emit, Plan, Run, StepDone, Submit
from serve_app.engine.request import Emission
from serve_app.experts.layout import Seat
from serve_app.sim.world import ViolationError, World

GRACE_S = 3.0  # after a worker was frozen it may still be given up for it
LOOK_EVERY = 10  # ticks between two looks at all of the engine's books


class Epochs:
    """Numbers that were given to epochs, by all engines of a cell."""

    def __init__(self) -> None:
        self.called: dict[int, tuple[int, list[str]]] = {}  # epoch -> the engine that called it, and whom
        self.begun: dict[int, int] = {}  # epoch -> the engine that began it


class Witness:
    """Of one life of the engine."""

    def __init__(self, world: World, cell: CellCore, epochs: Epochs, number: int) -> None:
        self._world, self._cell, self._epochs, self._number = world, cell, epochs, number
        self._steps: dict[tuple[int, int], int] = {}  # (epoch, replica) -> the newest
        self._num_out: dict[str, int] = {}  # tokens emitted, by request
        self._again: dict[str, list[int]] = {}  # request -> where it may start over: it was submitted again
        self._ended: set[str] = set()
        self._num_ticks = 0
        self._is_stale = False

    def expect(self, event: CellEvent) -> None:
        """Before the engine takes an event."""
        self._is_stale = isinstance(event, StepDone) and event.epoch != self._cell.core.epoch
        if isinstance(event, Submit):
            rid, num_known = event.request.rid, len(event.request.emitted)
            if rid in self._num_out:
                self._again.setdefault(rid, []).append(num_known)
            self._num_out.setdefault(rid, num_known)
            self._ended.discard(rid)

    def check(self, event: CellEvent, commands: list[CellCommand]) -> None:
        """After it."""
        has_begun = False
        for command in commands:
            match command:
                case Run(plan):
                    self._check_plan(plan)
                case Emit(emission):
                    self._check_emission(emission)
                case Tell(name, _, Join() as join):
                    self._check_join(name, join)
                case Formed():
                    self._check_formed(command)
                    has_begun = True
                case Kill(name, why):
                    self._check_kill(name, why)
        self._num_ticks += isinstance(event, Tick)
        if has_begun or (isinstance(event, Tick) and self._num_ticks % LOOK_EVERY == 0):
            self._cell.core.check_integrity()

    def _check_plan(self, plan: Plan) -> None:
        if plan.epoch != self._cell.core.epoch:
            raise ViolationError(f"a plan of epoch {plan.epoch} is issued in epoch {self._cell.core.epoch}")
        last = self._steps.get((plan.epoch, plan.replica), -1)
        if plan.after != last or plan.step <= last:
            raise ViolationError(f"step {plan.step} is issued after {plan.after}, and the last one was {last}")
        self._steps[plan.epoch, plan.replica] = plan.step

    def _check_emission(self, emission: Emission) -> None:
        rid = emission.rid
        if self._is_stale:
            raise ViolationError(f"tokens of {rid} are committed by a step of another epoch")
        if rid in self._ended:
            raise ViolationError(f"{rid} emits after its end")
        allowed = [self._num_out[rid], *self._again.pop(rid, [])]
        if emission.first not in allowed:
            raise ViolationError(f"{rid} goes on at {emission.first}, and has emitted {allowed[0]}")
        self._num_out[rid] = emission.first + len(emission.tokens)
        if emission.finish is not None:
            self._ended.add(rid)

    def _check_kill(self, name: str, why: str) -> None:
        """Slow is not dead."""
        worker, now = self._world.workers[name], self._world.clock.now
        if worker.is_alive and "no sign of life" in why and worker.frozen_until_s + GRACE_S < now:
            raise ViolationError(f"{name} is given up, and is alive: {why}")

    # -- epochs -------------------------------------------------------------------------------------------------------

    def _check_join(self, name: str, join: Join) -> None:
        names = sorted(member.name for member in join.members)
        called = self._epochs.called.get(join.epoch, (self._number, names))
        if not any(self._world.workers[member].is_alive for member in called[1] if member in names):
            called = self._number, names  # nobody is left who could take one for the other: the cell begins anew
        self._epochs.called[join.epoch] = called
        if called != (self._number, names):
            raise ViolationError(f"epoch {join.epoch} is called twice, with others: {called[1]}, {names}")
        if name not in names:
            raise ViolationError(f"{name} is called into epoch {join.epoch} without being a member")

    def _check_formed(self, formed: Formed) -> None:
        if self._epochs.begun.get(formed.epoch) == self._number:
            raise ViolationError(f"epoch {formed.epoch} begins a second time")
        self._epochs.begun[formed.epoch] = self._number
        self._world.tally.epochs += 1
        members = {Seat(*place): name for name, *place in formed.seats}
        for name in members.values():
            if (worker := self._world.workers[name]).is_alive and worker.epoch < formed.epoch:
                raise ViolationError(f"epoch {formed.epoch} begins, and {name} has not joined it")
        for stage, table in enumerate(formed.tables):
            self._check_homes(formed.epoch, stage, table, members)

    def _check_homes(self, epoch: int, stage: int, table: list[list[list[int]]], members: dict[Seat, str]) -> None:
        """Each expert lives with members, who hold it as long as they live."""
        layout, layers = self._world.scenario.layout, self._world.scenario.stages[stage]
        ranks = {layout.group_rank(seat): name for seat, name in members.items() if seat.stage == stage}
        for layer, hosts in zip(layers, table, strict=True):
            for expert, homes in enumerate(hosts):
                if not homes or any(rank not in ranks for rank in homes):
                    raise ViolationError(f"expert {(layer, expert)} has no home in epoch {epoch}: {homes} of {ranks}")
                for worker in (self._world.workers[ranks[rank]] for rank in homes):
                    if worker.is_alive and worker.epoch == epoch and (layer, expert) not in worker.hosted:
                        raise ViolationError(f"{worker.name} does not hold expert {(layer, expert)} in epoch {epoch}")
