"""Who is in the cell, and what follows when one of them dies: a pure state machine.

A worker that says Hello is a member of the next epoch; one that is lost is not. An epoch is formed as soon as one
replica is whole: every worker with a seat joins it, those of broken replicas to host experts only. What the lost one
hosted finds a home among the living (`experts.repair`), at the same moment and without asking anybody. Its seat is
given to a spare, or to a new worker; when that one says Hello, the next epoch is formed from the placement at full
strength.

Epochs begin when all members have joined. If one is lost before, another epoch is formed: no number is used twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from serve_app.engine.failover import FailoverTimes
from serve_app.engine.members import (
    Beat,
    CellStats,
    Enroll,
    Formed,
    Hello,
    Join,
    Joined,
    Kill,
    Leave,
    Lost,
    Member,
    Note,
    Parted,
    Spawn,
    StageTable,
    Stop,
    Take,
    Tell,
    Tick,
)
from serve_app.engine.plan import Begin
from serve_app.experts.layout import Layout, Seat
from serve_app.experts.placement import Placement, Slots
from serve_app.experts.repair import repair

MemberEvent = Enroll | Hello | Joined | Beat | Lost | Parted | Tick
MemberCommand = Tell | Spawn | Kill | Formed | Note | Begin

RESPAWN_AFTER_S = 1.0  # of the epoch without it, a new worker is started: its start must not slow the streams' return
EPOCHS_OF_ENGINE = 1_000_000  # each engine has its own numbers: what a dead one has called is called by nobody else
ASK_AGAIN_S = 1.0  # a worker that has not answered for this long is asked again: a message may have been lost
OWN_PAUSE_S = 1.0  # ticks come more often; an engine that was itself paused must not take it for others' silence


class MembershipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """When a worker is given up, and how many wait for that."""

    hung_s: float = 2.0  # without a sign of life
    stuck_s: float = 60.0  # with signs of life, but a loop that does not turn
    num_spares: int = 0


@dataclass
class _Worker:
    """One that has said Hello."""

    hello: Hello
    seat: Seat | None
    heard_s: float
    asked: Tell | None = None  # to take a seat: a spare that loads it
    num_stale: int = 0

    @property
    def is_taking(self) -> bool:
        return self.asked is not None

    @property
    def name(self) -> str:
        return self.hello.name


@dataclass
class _Forming:
    """An epoch whose members are called."""

    epoch: int
    seats: dict[Seat, str]
    awaited: dict[str, Tell]  # those who have yet to join, and how they were called
    called_s: float
    load_s: float = 0.0  # of the slowest


class Membership:
    """`on(event, now)` is all there is to drive."""

    def __init__(
        self,
        layout: Layout,
        stages: list[range],
        slots: Slots,
        config: MembershipConfig,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`clock`: seconds, to measure what this object's own work takes; nothing else depends on it."""
        self._layout, self._stages, self._slots, self._config, self._clock = layout, stages, slots, config, clock
        self._router = ""
        self._target: list[Placement] = []  # at full strength; none before the first Enroll
        self._current: list[Placement] = []  # of the newest epoch formed
        self._workers: dict[str, _Worker] = {}
        self._given_up: dict[str, str] = {}  # name -> address, "" where none is known
        self._starting: set[Seat] = set()
        self._deferred: list[Seat | None] = []  # workers (None: a spare) that are started once the streams run again
        self._num_spares_starting = 0
        self._first: set[Seat] = set(layout.seats())  # seats that the cell's first epoch waits for
        self._forming: _Forming | None = None
        self._serving: dict[Seat, str] = {}  # of the newest epoch that began
        self._vacant: set[Seat] = set()  # whose workers were lost before the first Enroll
        self._in_pause = False  # an epoch was left, and no other can be formed yet
        self._last_epoch = 0
        self._began_s = 0.0  # the newest epoch
        self._times = FailoverTimes()
        self._last_loss = ""
        self._last_tick_s: float | None = None
        self._asked_s = 0.0  # when those who had not answered were last asked again
        self._num_lost = self._num_stale = 0
        self.epoch = 0  # the newest that began

    def on(self, event: MemberEvent, now: float) -> list[MemberCommand]:
        """Take one event; return what follows, in order. `now` is in seconds of any monotonic clock."""
        return list(self._follow(event, now))

    def _follow(self, event: MemberEvent, now: float) -> Iterator[MemberCommand]:
        match event:
            case Enroll():
                yield from self._enroll(event, now)
            case Hello():
                yield from self._hello(event, now)
            case Joined():
                yield from self._joined(event, now)
            case Beat():
                yield from self._beat(event, now)
            case Lost():
                yield from self._lost(event, now)
            case Parted(name):
                if name in self._workers:
                    yield from self._give_up(name, "its connection was closed", now)
            case Tick():
                yield from self._tick(now)

    # -- what others ask ----------------------------------------------------------------------------------------------

    def workers_of(self, replica: int) -> list[str]:
        """Who gets the plans of a replica, in the epoch that began last."""
        return [name for seat, name in self._serving.items() if seat.replica == replica]

    def address_of(self, name: str) -> str:
        return self._workers[name].hello.address

    @property
    def names(self) -> list[str]:
        """Of all living workers that have said Hello."""
        return list(self._workers)

    @property
    def num_seats(self) -> int:
        """Of the layout, filled or not."""
        return self._layout.num_workers

    @property
    def is_ready(self) -> bool:
        """Whether there is a replica to run on. A cell that is between two epochs is as ready as it was."""
        return self.epoch > 0 and not self._in_pause

    @property
    def reason(self) -> str:
        """What is awaited, or missing; "" where the cell is whole."""
        return self._phase()[1]

    def states(self) -> dict[str, tuple[Hello, str]]:
        """Each worker's own account, and its state as in `CellStats`. Another thread may ask."""
        return {worker.name: (worker.hello, self._state(worker)) for worker in list(self._workers.values())}

    def stats(self) -> CellStats:
        """O(workers + experts)."""
        states = Counter(self._state(worker) for worker in self._workers.values())
        states["starting"] += len(self._starting) + self._num_spares_starting + self._deferred.count(None)
        phase, reason = self._phase()
        return CellStats(
            phase=phase,
            reason=reason,
            workers={state: states[state] for state in ("starting", "loaded", "serving", "hosting", "spare")},
            experts_uncovered=self._num_uncovered(),
            stale_total=self._num_stale + sum(worker.num_stale for worker in self._workers.values()),
            lost_total=self._num_lost,
            phase_seconds=self._times.totals(),
        )

    def _state(self, worker: _Worker) -> str:
        if worker.seat is None:
            return "spare"
        if self._serving.get(worker.seat) != worker.name:
            return "loaded"
        return "serving" if worker.seat.replica in self._whole(self._serving) else "hosting"

    def _phase(self) -> tuple[str, str]:
        num_seats = self._layout.num_workers
        seated = self._seated()
        if not self._target or self._first:
            return "starting", f"{len(seated)} of {num_seats} workers have loaded"
        if self._forming is not None and not (self.epoch and not self._in_pause):
            awaited = sorted(self._forming.awaited)
            names = ", ".join(awaited[:3]) + (", ..." if len(awaited) > 3 else "")
            of = f"{len(awaited)} of {len(self._forming.seats)} workers have yet to join epoch {self._forming.epoch}"
            return "forming", f"{of}: {names}"
        missing = [seat for seat in self._layout.seats() if seat not in seated]
        places = ", ".join(f"{seat.stage}.{seat.replica}.{seat.shard}" for seat in missing[:3])
        places += ", ..." if len(missing) > 3 else ""
        if self._in_pause or not self.epoch:
            return "waiting", f"{self._last_loss}; no replica is whole before seat {places} is filled"
        if missing:
            return "degraded", f"{self._last_loss}; seat {places} is being refilled"
        return ("whole", "") if self._forming is None else ("forming", f"epoch {self._forming.epoch} is being formed")

    def _num_uncovered(self) -> int:
        """Pairs of the newest epoch formed whose hosts are all dead."""
        seated = self._seated()
        num = 0
        for stage, placement in enumerate(self._current):
            living = self._living(stage, seated)
            if len(living) < self._layout.group_size:
                num += sum(not living.intersection(ranks) for table in placement.hosts for ranks in table)
        return num

    # -- who comes ----------------------------------------------------------------------------------------------------

    def _enroll(self, event: Enroll, now: float) -> Iterator[MemberCommand]:
        is_first = not self._target
        self._router = event.router
        self._target = [
            Placement(layers, self._layout.group_size, _frozen(table))
            for layers, table in zip(self._stages, event.tables, strict=True)
        ]
        if not is_first:
            return
        self._last_epoch = max(self._last_epoch, event.generation * EPOCHS_OF_ENGINE)
        found = set(event.found) - self._vacant
        if found:  # a new engine goes on with whoever is left
            self._first &= found
        self._starting |= set(event.loading) - self._vacant
        for seat in self._layout.seats():
            if seat not in found | self._starting and seat not in self._seated():
                yield self._spawn(seat)
        num_known = sum(worker.seat is None for worker in self._workers.values())
        self._num_spares_starting += max(0, event.num_spares_found - num_known)
        for _ in range(self._config.num_spares - event.num_spares_found):
            yield self._spawn(None)
        yield from self._form(now)

    def _spawn(self, seat: Seat | None) -> Spawn:
        if seat is None:
            self._num_spares_starting += 1
            return Spawn(None, [])
        self._starting.add(seat)
        return Spawn(seat, self._pairs(seat), self._in_pause)

    def _pairs(self, seat: Seat) -> list[tuple[int, int]]:
        """What the worker of a seat holds at full strength."""
        placement, rank = self._target[seat.stage], self._layout.group_rank(seat)
        return placement.held(rank) + placement.standbys(rank)

    def _hello(self, hello: Hello, now: float) -> Iterator[MemberCommand]:
        if hello.name in self._given_up:
            yield Tell(hello.name, hello.address, Stop())
            return
        seat = hello.seat
        known = self._workers.get(hello.name)
        if known is not None and (not known.is_taking or seat is None):
            known.heard_s = now
            return
        is_late = seat is not None and self._seated().get(seat, hello.name) != hello.name
        self._last_epoch = max(self._last_epoch, hello.epoch)
        self._workers[hello.name] = _Worker(hello, None if is_late else seat, now)
        if is_late:
            yield from self._give_up(hello.name, "its seat is taken", now)
            return
        if seat is None:
            self._num_spares_starting = max(0, self._num_spares_starting - 1)
            return
        self._starting.discard(seat)
        self._first.discard(seat)
        if seat in self._deferred:
            self._deferred.remove(seat)
        yield from self._form(now, is_whole_again=True)

    def _seated(self) -> dict[Seat, str]:
        """Who can be a member: it has a seat, and has loaded it."""
        return {w.seat: w.name for w in self._workers.values() if w.seat is not None and not w.is_taking}

    # -- who goes -----------------------------------------------------------------------------------------------------

    def _beat(self, beat: Beat, now: float) -> Iterator[MemberCommand]:
        worker = self._workers.get(beat.name)
        if worker is None:
            if address := self._given_up.get(beat.name):
                yield Tell(beat.name, address, Stop())
            return
        worker.heard_s = now
        worker.num_stale = beat.num_stale
        if beat.stuck_s > self._config.stuck_s:
            yield from self._give_up(beat.name, f"its loop has been stuck for {beat.stuck_s:.0f} s", now)

    def _tick(self, now: float) -> Iterator[MemberCommand]:
        paused_s = 0.0 if self._last_tick_s is None else now - self._last_tick_s
        self._last_tick_s = now
        if paused_s > OWN_PAUSE_S:
            for worker in self._workers.values():
                worker.heard_s += paused_s
        if self._forming is None and now - self._began_s > RESPAWN_AFTER_S:
            yield from self._spawn_deferred(list(self._deferred))
        for worker in list(self._workers.values()):
            silent_s = now - worker.heard_s
            if silent_s > self._config.hung_s and worker.name in self._workers:
                yield from self._give_up(worker.name, f"it has given no sign of life for {silent_s:.1f} s", now)
        if now - self._asked_s > ASK_AGAIN_S:
            self._asked_s = now
            yield from self._ask_again(now)

    def _ask_again(self, now: float) -> Iterator[MemberCommand]:
        """Those who have not answered; who never does is held for dead."""
        yield from [worker.asked for worker in self._workers.values() if worker.asked is not None]
        forming = self._forming
        if forming is None or now - forming.called_s < ASK_AGAIN_S:
            return
        if now - forming.called_s < self._config.stuck_s:
            yield from list(forming.awaited.values())
            return
        for name in forming.awaited:
            yield from self._give_up(name, f"it has not joined epoch {forming.epoch} in all this time", now)

    def _give_up(self, name: str, why: str, now: float) -> Iterator[MemberCommand]:
        """Hung becomes dead: it is killed, and should it come back before that, it is told to end."""
        yield Kill(name, why)
        yield Tell(name, self.address_of(name), Stop())
        yield from self._lost(Lost(name, why), now)

    def _lost(self, lost: Lost, now: float) -> Iterator[MemberCommand]:
        if lost.name in self._given_up:
            return
        worker = self._workers.pop(lost.name, None)
        self._given_up[lost.name] = worker.hello.address if worker else ""
        self._num_lost += 1
        if worker is not None:
            self._num_stale += worker.num_stale
            seat = worker.seat
        else:
            seat = lost.seat
            self._num_spares_starting -= seat is None and self._num_spares_starting > 0
        self._last_loss = f"worker {lost.name} was lost: {lost.why}"
        yield Note("lost", self.epoch, self._last_loss)
        if seat is None:
            if self._num_spares() < self._config.num_spares:
                yield self._spawn(None)
            return
        if seat in self._seated():  # it lost its seat before its life
            return
        self._first.discard(seat)
        if worker is not None and lost.name in (*self._serving.values(), *self._called()):
            self._times.lost(now, now - worker.heard_s)
        yield from self._fill(seat)
        if seat in {*self._serving, *self._called()} or not self.epoch:  # who dies while it loads disturbs nobody
            yield from self._form(now)
        if not self.is_ready or self._forming is None:  # nobody serves: the streams wait for these very seats
            yield from self._spawn_deferred([seat for seat in self._deferred if seat is not None])

    def _spawn_deferred(self, seats: list[Seat | None]) -> Iterator[MemberCommand]:
        for seat in seats:
            self._deferred.remove(seat)
            yield self._spawn(seat)

    def _num_spares(self) -> int:
        waiting = sum(worker.seat is None for worker in self._workers.values())
        return self._num_spares_starting + waiting + self._deferred.count(None)

    def _called(self) -> dict[Seat, str]:
        return {} if self._forming is None else self._forming.seats

    def _fill(self, seat: Seat) -> Iterator[MemberCommand]:
        """A spare takes the seat, and is replaced; without one a new worker is started for it."""
        if not self._target:
            self._vacant.add(seat)
            return
        spare = next((worker for worker in self._workers.values() if worker.seat is None), None)
        if spare is None:
            self._starting.add(seat)
            self._deferred.append(seat)
            return
        self._starting.discard(seat)
        spare.seat, spare.asked = seat, Tell(spare.name, spare.hello.address, Take(seat, self._pairs(seat)))
        yield spare.asked
        self._deferred.append(None)

    # -- an epoch -----------------------------------------------------------------------------------------------------

    def form_again(self, why: str, now: float) -> list[MemberCommand]:
        """The same members in a new epoch: a message was lost, and a step waits for it in vain."""
        return [Note("formed again", self.epoch, why), *self._form(now)]

    def _form(self, now: float, *, is_whole_again: bool = False) -> Iterator[MemberCommand]:
        """Call everyone who has a seat into the next epoch, if there is a whole replica among them."""
        if not self._target or self._first:
            return
        begun_s = self._clock()
        seats = self._seated()
        if not self._whole(seats):
            yield from self._pause(seats)
            return
        self._current = self._repaired(seats, anew=is_whole_again)
        self._last_epoch += 1
        members = [self._member(seat, name) for seat, name in sorted(seats.items())]
        tables = self._tables()
        calls = {
            name: Tell(name, self.address_of(name), Join(self._last_epoch, members, tables[seat.stage], self._router))
            for seat, name in seats.items()
        }
        self._forming = _Forming(self._last_epoch, seats, calls, now)
        yield from list(calls.values())
        self._times.repaired(self._clock() - begun_s)

    def _pause(self, seats: dict[Seat, str]) -> Iterator[MemberCommand]:
        """No replica is whole: the survivors stop what they do, and wait."""
        self._forming, self._in_pause = None, True
        for name in seats.values():
            yield Tell(name, self.address_of(name), Leave(self._last_epoch))

    def _whole(self, seats: dict[Seat, str]) -> set[int]:
        """Replicas all of whose seats are filled."""
        filled = Counter(seat.replica for seat in seats)
        return {replica for replica, num in filled.items() if num == self._layout.num_stages * self._layout.num_shards}

    def _repaired(self, seats: dict[Seat, str], *, anew: bool) -> list[Placement]:
        """The placement of the living: what moves is as little as can be, or, `anew`, as near to full strength."""
        placements = self._target if anew or not self._current else self._current
        return [
            repair(placement, self._living(stage, seats), self._slots).placement
            for stage, placement in enumerate(placements)
        ]

    def _living(self, stage: int, seats: dict[Seat, str]) -> set[int]:
        """Ranks in a stage's expert group."""
        return {self._layout.group_rank(seat) for seat in seats if seat.stage == stage}

    def _tables(self) -> list[StageTable]:
        return [[[list(ranks) for ranks in table] for table in placement.hosts] for placement in self._current]

    def _member(self, seat: Seat, name: str) -> Member:
        hello = self._workers[name].hello
        return Member(name, hello.address, *seat, hello.store)

    def _joined(self, joined: Joined, now: float) -> Iterator[MemberCommand]:
        forming = self._forming
        if forming is None or joined.epoch != forming.epoch or joined.name not in forming.awaited:
            return
        del forming.awaited[joined.name]
        forming.load_s = max(forming.load_s, joined.load_s)
        if not forming.awaited:
            yield from self._begin(forming, now)

    def _begin(self, forming: _Forming, now: float) -> Iterator[MemberCommand]:
        whole, before = self._whole(forming.seats), self._serving
        kept = sorted(replica for replica in whole if _of(forming.seats, replica) == _of(before, replica))
        resting = sorted(set(range(self._layout.num_replicas)) - whole)
        num_pages = min(
            self._workers[name].hello.num_pages for seat, name in forming.seats.items() if seat.replica in whole
        )
        self._forming, self._serving, self.epoch, self._in_pause = None, forming.seats, forming.epoch, False
        self._began_s = now
        yield Begin(self.epoch, self._layout.num_replicas, num_pages, tuple(resting), tuple(kept))
        yield Formed(self.epoch, [(name, *seat) for seat, name in sorted(forming.seats.items())], self._tables())
        yield Note("epoch", self.epoch, self._account(len(forming.seats), num_pages, resting))
        is_whole = len(forming.seats) == self._layout.num_workers
        seconds = self._times.began(now, forming.called_s, forming.load_s, is_whole=is_whole)
        if seconds:
            yield Note("restored", self.epoch, "every seat is filled", seconds)

    def _account(self, num_workers: int, num_pages: int, resting: list[int]) -> str:
        text = f"epoch {self.epoch} began with {num_workers} workers, {num_pages} KV pages a replica"
        return text + (f"; replicas at rest: {', '.join(map(str, resting))}" if resting else "")

    def tokens_came(self, now: float) -> list[MemberCommand]:
        """A step of the present epoch is done: the end of a failover's gap, if there is one."""
        seconds = self._times.tokens_came(now)
        return [Note("failover", self.epoch, "tokens flow again", seconds)] if seconds else []


def _of(seats: dict[Seat, str], replica: int) -> dict[Seat, str]:
    return {seat: name for seat, name in seats.items() if seat.replica == replica}


def _frozen(table: StageTable) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(tuple(ranks) for ranks in layer) for layer in table)
