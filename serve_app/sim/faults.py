"""What strikes a virtual cell, and when."""

from collections.abc import Callable

from serve_app.sim.keeper import Keeper
from serve_app.sim.scenario import LOAD_S
from serve_app.sim.worker import VirtualWorker
from serve_app.sim.world import World

KINDS = {"death": 6, "two deaths": 2, "stage": 1, "freeze": 4, "late answer": 3, "slow": 2, "engine": 3, "pause": 1}


class Faults:
    """Strikes at random moments of [0, LOAD_S), and is quiet then."""

    def __init__(self, world: World, keeper: Keeper, kill_engine: Callable[[], None]) -> None:
        self._world, self._keeper, self._kill_engine = world, keeper, kill_engine
        for _ in range(world.rng.randint(1, 8)):
            kind = world.rng.choices(list(KINDS), list(KINDS.values()))[0]
            world.clock.after(world.rng.uniform(0.0, LOAD_S), self._strike, kind)

    def _strike(self, kind: str) -> None:
        rng, living = self._world.rng, self._world.living
        match kind:
            case "death" | "two deaths":
                for worker in rng.sample(living, min(len(living), 1 + (kind == "two deaths"))):
                    self._keeper.strike(worker.name)
                if rng.random() < 0.5:  # and something else while the cell recovers
                    second = rng.choice(("death", "freeze", "engine"))
                    self._world.clock.after(rng.choice((0.03, 1.0)) * rng.random(), self._strike, second)
            case "stage":
                stage = rng.randrange(self._world.scenario.layout.num_stages)
                for worker in living:
                    if worker.seat is not None and worker.seat.stage == stage:
                        self._keeper.strike(worker.name)
            case "freeze" if living:
                self._freeze(rng.choice(living))
            case "late answer" if living:
                self._delay_answer(rng.choice(living))
            case "slow" if living:
                self._slow_down(rng.choice(living))
            case "engine":
                self._kill_engine()
            case "pause" if self._world.engine is not None:
                self._world.engine.pause(rng.uniform(0.3, 4.0))

    def _freeze(self, worker: VirtualWorker) -> None:
        self._world.tally.freezes += 1
        freeze_s = self._world.rng.choice((0.5, 1.5, 3.0, 6.0, 15.0)) * self._world.rng.uniform(0.8, 1.0)
        self._world.note(f"{worker.name} freezes for {freeze_s:.1f} s")
        worker.freeze(self._world.clock.now + freeze_s)

    def _delay_answer(self, worker: VirtualWorker) -> None:
        """It halts when it is about to tell the outcome of a step; somebody dies, and the epoch ends meanwhile."""

        def strike() -> None:
            freeze_s = self._world.rng.uniform(0.05, 1.0)
            self._world.note(f"{worker.name} halts for {freeze_s:.2f} s before its answer")
            worker.freeze(self._world.clock.now + freeze_s)
            others = [other for other in self._world.living if other is not worker]
            if others and self._keeper.is_disturbed:
                self._keeper.strike(self._world.rng.choice(others).name)

        worker.trap = strike

    def _slow_down(self, worker: VirtualWorker) -> None:
        self._world.note(f"{worker.name} becomes slow")
        worker.slowness = self._world.rng.choice((3.0, 10.0))
        self._world.clock.after(self._world.rng.uniform(1.0, 5.0), setattr, worker, "slowness", 1.0)
