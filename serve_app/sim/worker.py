"""A virtual worker: what `runtime.worker` does, with tokens in its KV pages instead of numbers.

A step of one stage is one event. What a real one does in the middle of it, by messages between the layers, is looked
at when the step has been computed: a step ends once all shards have come as far, and everyone who hosts an expert that
it needs is in the same epoch and awake. Who waits is woken by the one that it waits for, or by the end of the epoch.
"""

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.engine.members import Beat, Hello, Join, Joined, Leave, Stop, Take
from serve_app.engine.plan import Plan, Slice, StepDone
from serve_app.experts.layout import Seat
from serve_app.experts.placement import Pair
from serve_app.sim.toy import UNWRITTEN, choose, digest, expert_of
from serve_app.sim.world import ViolationError, World

BEAT_S = 0.25


@dataclass(frozen=True)
class Adopt:
    """A new engine calls."""

    engine: int


@dataclass(frozen=True)
class Hidden:
    """From stage to stage: what the one before knows of each slice's sequence."""

    epoch: int
    step: int
    digests: list[int]


@dataclass
class _Running:
    """A step on its way through this stage. Another one of the same number is another object."""

    plan: Plan
    digests: list[int]
    is_computed: bool = False


class VirtualWorker:
    """Alive from its making to `die`; it loads what its seat needs, says Hello, and answers messages."""

    def __init__(self, world: World, name: str, seat: Seat | None, pairs: list[Pair], engine: int) -> None:
        self.name, self.place = name, seat  # what it was started for: a spare's stays None
        self.seat = seat
        self.is_alive, self.is_frozen = True, False
        self.frozen_until_s = 0.0  # when it last was
        self.slowness = 1.0
        self.trap: Callable[[], None] | None = None  # strikes when it is about to tell the outcome of a step
        self.epoch = 0
        self.is_member = False  # of `epoch`; it may have left
        self.hosted: set[Pair] = set()
        self.has_said_hello = False
        self._world, self._engine = world, engine
        self._is_busy = False  # loading: messages wait
        self._inbox: deque[object] = deque()
        self._late: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # what came due while it was frozen
        self._waiting: list[tuple[VirtualWorker, _Running]] = []  # whose steps wait for this worker
        self._num_stale = 0
        self._num_pages = world.rng.randint(*world.scenario.num_pages)
        self._kv = array("q")
        self._load(seat, pairs, world.rng.uniform(0.2, 2.5))

    def die(self) -> None:
        self.is_alive = False
        self._kv = array("q")

    def freeze(self, until_s: float) -> None:
        self.is_frozen, self.frozen_until_s = True, max(until_s, self.frozen_until_s)
        self._world.clock.after(until_s - self._world.clock.now, self._thaw)

    def _thaw(self) -> None:
        """It goes on where it was: first with what it was about to do, then with what it was told meanwhile."""
        if not self.is_frozen or not self.is_alive or self._world.clock.now < self.frozen_until_s:
            return
        self._world.note(f"{self.name} thaws")
        self.is_frozen = False
        late, self._late = self._late, []
        for action, args in late:
            action(*args)
        self._drain()
        self._wake()

    def _after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        """The dead do nothing, the frozen do it later."""

        def due() -> None:
            if self.is_frozen:
                self._late.append((action, args))
            elif self.is_alive:
                action(*args)

        self._world.clock.after(delay_s, due)

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load(self, seat: Seat | None, pairs: list[Pair], load_s: float) -> None:
        self._is_busy = True
        self._after(load_s, self._loaded, seat, pairs)

    def _loaded(self, seat: Seat | None, pairs: list[Pair]) -> None:
        self.seat, self.hosted = seat, set(pairs)
        if seat is not None:
            self._kv = array("q", [UNWRITTEN]) * (self._num_pages * self._world.scenario.engine.page_tokens)
        self._forget()
        self._say_hello()
        if not self.has_said_hello:
            self.has_said_hello = True
            self._after(BEAT_S, self._beat)
        self._is_busy = False
        self._drain()

    def _say_hello(self) -> None:
        """Not lost on its way: a worker says it but once (see `runtime.worker`)."""
        hello = Hello(self.name, self.name, self.seat, self._num_pages if self.seat else 0, 0.0, 0, self.epoch)
        self._world.to_engine(self._engine, hello, is_safe=True)

    def _beat(self) -> None:
        self._world.to_engine(self._engine, Beat(self.name, 0.0, self._num_stale))
        self._after(BEAT_S, self._beat)

    # -- messages -----------------------------------------------------------------------------------------------------

    def take(self, message: object) -> None:
        """One comes in. The frozen and the busy find it later."""
        if self.is_alive:
            self._inbox.append(message)
            self._drain()

    def _drain(self) -> None:
        while self._inbox and self.is_alive and not self.is_frozen and not self._is_busy:
            self._handle(self._inbox.popleft())

    def _handle(self, message: object) -> None:
        match message:
            case Plan() | Hidden() if message.epoch != self.epoch or not self.is_member:
                self._num_stale += 1
            case Plan():
                if message.after >= self._last_step:
                    self._plans[message.after] = message
                self._advance()
            case Hidden():
                if message.step > self._last_step:
                    self._hidden[message.step] = message.digests
                self._advance()
            case Join():
                self._join(message)
            case Leave(epoch):
                if epoch >= self.epoch and self.is_member:
                    self._forget()
            case Adopt(engine):
                self._engine = engine
                self._say_hello()
            case Take(seat, pairs):
                self._take_seat(seat, [(layer, expert) for layer, expert in pairs])
            case Stop():
                self._world.note(f"{self.name} stops")
                self.die()

    def _take_seat(self, seat: Seat, pairs: list[Pair]) -> None:
        if self.seat is None:
            self._load(seat, pairs, self._world.rng.uniform(0.1, 1.0))
        else:
            self._say_hello()

    # -- epochs -------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self.is_member = False
        self._plans: dict[int, Plan] = {}  # by the step that comes before them
        self._hidden: dict[int, list[int]] = {}
        self._last_step = self.num_computed = -1
        self._running: _Running | None = None

    def _join(self, join: Join) -> None:
        if join.epoch < self.epoch or self.seat is None:
            return
        if join.epoch == self.epoch and self.is_member:  # asked again: the answer was lost
            self._world.to_engine(self._engine, Joined(join.epoch, self.name))
            return
        own = next(member for member in join.members if member.name == self.name)
        if Seat(own.stage, own.replica, own.shard) != self.seat:
            raise ViolationError(f"{self.name} sits at {self.seat}, and is called to another seat")
        self._forget()
        self.epoch = join.epoch
        self._settle(join)
        wanted = {pair for pair, names in self._hosts.items() if self.name in names}
        load_s = 0.002 + 0.03 * len(wanted - self.hosted) * self._world.rng.random()
        self._is_busy = True
        self._after(load_s, self._joined, wanted, load_s)

    def _settle(self, join: Join) -> None:
        """Who is who in the epoch."""
        assert self.seat is not None
        workers, num_shards = self._world.workers, self._world.scenario.layout.num_shards
        group = {m.replica * num_shards + m.shard: m.name for m in join.members if m.stage == self.seat.stage}
        layers = self._world.scenario.stages[self.seat.stage]
        self._hosts = {
            (layer, expert): [group.get(rank, "") for rank in ranks]
            for layer, table in zip(layers, join.table, strict=True)
            for expert, ranks in enumerate(table)
        }
        seats = {Seat(m.stage, m.replica, m.shard): workers[m.name] for m in join.members}
        stage, replica, own = self.seat
        self._rank = self._world.scenario.layout.group_rank(self.seat)
        shards = (seats.get(Seat(stage, replica, shard)) for shard in range(num_shards) if shard != own)
        self._peers = [peer for peer in shards if peer is not None]
        self._next = seats.get(Seat(stage + 1, replica, own))

    def _joined(self, hosted: set[Pair], load_s: float) -> None:
        self.hosted, self.is_member = hosted, True
        self._world.to_engine(self._engine, Joined(self.epoch, self.name, load_s))
        self._is_busy = False
        self._drain()
        self._wake()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Begin the next step, once its input is here."""
        plan = self._plans.get(self._last_step)
        if self._running or plan is None or not (self._is_first or plan.step in self._hidden):
            return
        del self._plans[plan.after]
        self._last_step = plan.step
        self._running = _Running(plan, self._hidden.pop(plan.step, []))
        step_s = self._world.scenario.step_s * self.slowness * self._world.rng.uniform(0.5, 1.5)
        self._after(step_s, self._compute, self._running)

    @property
    def _is_first(self) -> bool:
        return self.seat is not None and self.seat.stage == 0

    def _compute(self, running: _Running) -> None:
        if running is not self._running:  # the epoch ended
            return
        digests = [self._run_slice(part) for part in running.plan.slices]
        if not self._is_first and digests != running.digests:
            raise ViolationError(f"{self.name} has other KV than the stage before it, in {_named(running.plan)}")
        running.digests, running.is_computed = digests, True
        self.num_computed = running.plan.step
        self._wake()
        if self._world.rng.random() >= self._world.network.weather.lost:  # else a shard's part or an expert's row was
            self._finish(running)

    def _run_slice(self, part: Slice) -> int:
        """Write the KV of a slice's tokens, and read that of all tokens up to its end."""
        page_tokens, kv = self._world.scenario.engine.page_tokens, self._kv
        for position, token in enumerate(part.tokens, part.start):
            kv[part.pages[position // page_tokens] * page_tokens + position % page_tokens] = token
        context = array("q")
        for page in part.pages:
            context.extend(kv[page * page_tokens : (page + 1) * page_tokens])
        end = part.start + len(part.tokens)
        if len(context) < end or UNWRITTEN in context[:end]:
            raise ViolationError(f"{self.name} reads KV that was never written")
        return digest(context[:end])

    def _finish(self, running: _Running) -> None:
        """Hand the outcome on, unless somebody has to be waited for."""
        if running is not self._running:
            return
        awaited = self._awaited(running.plan)
        if awaited is not None:
            awaited._waiting.append((self, running))
            return
        self._running = None
        if self.trap is not None:
            trap, self.trap = self.trap, None
            trap()
        if self.is_frozen:
            self._late.append((self._hand_on, (running,)))
            return
        self._hand_on(running)
        self._advance()

    def _hand_on(self, running: _Running) -> None:
        plan = running.plan
        if self._next is not None:
            self._world.to_worker(self._next.name, Hidden(plan.epoch, plan.step, running.digests))
        elif self.seat is not None and self.seat.shard == 0:
            tokens = [
                choose(context, part.sample.seed, part.sample.banned)
                for part, context in zip(plan.slices, running.digests, strict=True)
                if part.sample is not None
            ]
            self._world.note(f"{self.name} ends {_named(plan)}: {tokens}")
            done = StepDone(plan.epoch, plan.replica, plan.step, tokens, [0.0] * len(tokens))
            self._world.to_engine(self._engine, done)

    def _awaited(self, plan: Plan) -> "VirtualWorker | None":
        """Somebody without whom a computed step cannot end yet."""
        for peer in self._peers:
            if peer.epoch != self.epoch or peer.num_computed < plan.step:
                return peer
        scenario = self._world.scenario
        assert self.seat is not None
        for layer in scenario.stages[self.seat.stage]:
            experts = {
                expert_of(layer, token, position, scenario.num_experts)
                for part in plan.slices
                for position, token in enumerate(part.tokens, part.start)
            }
            for expert in sorted(experts):
                host = self._host_of((layer, expert))
                if not host.answers(self.epoch, (layer, expert)):
                    return host
        return None

    def _host_of(self, pair: Pair) -> "VirtualWorker":
        names = self._hosts[pair]
        if not names:
            raise ViolationError(f"expert {pair} has no home in epoch {self.epoch}")
        name = self.name if self.name in names else names[self._rank % len(names)]
        if not name:
            raise ViolationError(f"the home of expert {pair} in epoch {self.epoch} is an empty seat")
        return self._world.workers[name]

    def answers(self, epoch: int, pair: Pair) -> bool:
        """Whether rows for an expert come back from here, now."""
        if self.epoch < epoch:
            raise ViolationError(f"{self.name} is called for epoch {epoch} and has not joined it")
        if not self.is_alive or self.is_frozen or self.epoch > epoch or not self.is_member:
            return False
        if pair not in self.hosted:
            raise ViolationError(f"{self.name} is called for expert {pair}, which it does not hold")
        return True

    def _wake(self) -> None:
        """Those who waited look again."""
        waiting, self._waiting = self._waiting, []
        for worker, running in waiting:
            worker._after(0.001, worker._finish, running)


def _named(plan: Plan) -> str:
    return f"step {plan.step} of replica {plan.replica} in epoch {plan.epoch}"
