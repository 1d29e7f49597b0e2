"""The virtual cell's keeper: starts workers and watches them, as `cluster.cell` does with Ray's help."""

from serve_app.engine.members import Enroll, Lost
from serve_app.experts.layout import Seat
from serve_app.experts.placement import Pair
from serve_app.sim.worker import Adopt, VirtualWorker
from serve_app.sim.world import World

ASK_S = 2.0  # that workers may take to answer a new keeper
START_UP_DEATHS = 0.1  # of the workers that are started under faults


class Keeper:
    def __init__(self, world: World) -> None:
        self._world = world
        self._num_started = 0
        self._watched: dict[str, int] = {}  # worker -> the engine that will hear of its death
        self.is_disturbed = True  # faults strike

    # -- the beginning of an engine -----------------------------------------------------------------------------------

    def begin(self, engine: int) -> None:
        """Adopt those who are there; who does not answer in time is killed."""
        self._watched.clear()
        asked = self._world.living
        for worker in asked:
            self._world.clock.after(self._world.rng.uniform(0.0, 0.01), worker.take, Adopt(engine))  # by Ray's own way
        wait_s = ASK_S if any(worker.is_frozen for worker in asked) else self._world.rng.uniform(0.0, 0.2)
        self._world.clock.after(wait_s, self._enroll, engine, asked)

    def _enroll(self, engine: int, asked: list[VirtualWorker]) -> None:
        found = []
        for worker in asked:
            if worker.is_frozen:
                self.kill(worker.name, "it does not answer")
            elif worker.is_alive:
                found.append(worker)
                self._watched[worker.name] = engine
        seats = [worker.place for worker in found if worker.place is not None]
        num_spares = sum(worker.place is None for worker in found)
        self._world.note(f"engine {engine} finds {len(seats)} workers and {num_spares} spares")
        enroll = Enroll(self._world.scenario.tables, "router", seats, [], num_spares, engine)
        self._world.to_engine(engine, enroll, is_safe=True)

    # -- workers ------------------------------------------------------------------------------------------------------

    def spawn(self, engine: int, seat: Seat | None, pairs: list[Pair]) -> None:
        self._num_started += 1
        at = "spare" if seat is None else f"w{seat.stage}.{seat.replica}.{seat.shard}"
        name = f"{at}#{self._num_started}"
        self._world.note(f"{name} starts")
        self._world.workers[name] = VirtualWorker(self._world, name, seat, pairs, engine)
        self._watched[name] = engine
        if self.is_disturbed and self._world.rng.random() < START_UP_DEATHS:
            self._world.clock.after(self._world.rng.uniform(0.0, 3.0), self.strike, name)

    def kill(self, name: str, why: str) -> None:
        """Soon, as a rule; a node out of reach keeps it alive for long."""
        self._world.note(f"{name} is to be killed: {why}")
        is_quick = self._world.rng.random() < 0.6
        delay_s = self._world.rng.uniform(0.01, 0.3) if is_quick else self._world.rng.uniform(1.0, 20.0)
        self._world.clock.after(delay_s, self.strike, name)

    def strike(self, name: str) -> None:
        """A worker dies; its engine hears of it."""
        worker = self._world.workers[name]
        if not worker.is_alive:
            return
        self._world.note(f"{name} dies")
        self._world.tally.deaths += 1
        worker.die()
        self.bury(worker)

    def bury(self, worker: VirtualWorker) -> None:
        engine = self._watched.pop(worker.name, None)
        if engine is not None:
            self._world.to_engine(engine, Lost(worker.name, "its process ended", worker.place), is_safe=True)
