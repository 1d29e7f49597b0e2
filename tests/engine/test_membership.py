"""Who is in the cell after whatever happened to its workers: the pure machine, the test in the place of the rest."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.engine.members import (
    Beat,
    Enroll,
    Formed,
    Hello,
    Join,
    Joined,
    Kill,
    Leave,
    Lost,
    Note,
    Spawn,
    Stop,
    Take,
    Tell,
    Tick,
)
from serve_app.engine.membership import EPOCHS_OF_ENGINE, RESPAWN_AFTER_S, Membership, MembershipConfig
from serve_app.engine.plan import Begin
from serve_app.experts.layout import Layout, Seat, stage_layers
from serve_app.experts.placement import Slots, place

NUM_EXPERTS = 5
TICK_S = 0.25
HUNG_S = 2.0
EXACTLY = 1e-6


def tables_of(placements):
    return [[[list(ranks) for ranks in table] for table in placement.hosts] for placement in placements]


class Hall:
    """A membership, its workers and its keeper. Every epoch it calls or begins is checked as it is said.

    Nobody does anything by itself: a spawned worker comes up by `come`, a called one joins by `join`. The living give
    signs of life while time passes, but for those that are `silent`.
    """

    def __init__(self, stages=2, replicas=2, shards=1, spares=0, **config):
        self.layout = Layout(stages, replicas, shards)
        self.layers = stage_layers(2 * stages, stages)
        self.slots = Slots(-(-2 * NUM_EXPERTS // self.layout.group_size), 2)
        self.target = self.place()
        self.num_spares = spares
        config = MembershipConfig(hung_s=HUNG_S, num_spares=spares, **config)
        self.members = Membership(self.layout, self.layers, self.slots, config)
        self.now = 50.0
        self.found = None  # seats of workers of an earlier engine that have yet to say Hello; None before the Enroll
        self.vacant = set()  # seats whose workers were lost before that
        self.alive = {}  # name -> the seat it has loaded, of those that said Hello and were not lost
        self.silent = set()
        self.gone = []  # names of those given up
        self.spawns = []  # ordered, and not come up
        self.takes = {}  # name -> Take, not answered
        self.joins = {}  # name -> Join, not answered
        self.called = None  # members of the newest epoch: seat -> name
        self.serving = {}  # those of the newest that began
        self.epochs = []  # of all calls
        self._numbers = itertools.count()

    def place(self, load=None):
        return tables_of([place(ls, NUM_EXPERTS, self.layout.group_size, self.slots, load) for ls in self.layers])

    # -- what happens ------------------------------------------------------------------------------------------------

    def on(self, event):
        commands = self.members.on(event, self.now)
        for epoch, group in itertools.groupby(commands, _epoch_called):
            row = list(group)
            if epoch is not None:
                self._check_call(epoch, {tell.name: tell.message for tell in row})
            for command in row:
                self._obey(command)
        self._check_conservation()
        return commands

    def _obey(self, command):
        match command:
            case Spawn():
                self.spawns.append(command)
            case Tell(name, address, message):
                assert address == f"at {name}"
                self._told(name, message)
            case Begin():
                self._check_begin(command)

    def enroll(self, tables=None, found=(), num_spares_found=0, generation=0):
        self.target = tables or self.target
        if self.found is None:
            self.found = set(found) - set(self.seated()) - self.vacant
        return self.on(Enroll(self.target, "tcp://router", list(found), [], num_spares_found, generation))

    def hello(self, seat, name=None, epoch=0, num_pages=40):
        if name is None:
            name = f"{'spare' if seat is None else '.'.join(map(str, seat))}-{next(self._numbers)}"
        if name not in self.gone and seat not in {s for n, s in self.alive.items() if n != name and s is not None}:
            self.alive[name] = seat
        elif name not in self.gone:
            self.gone.append(name)
        self.found = self.found and self.found - {seat}
        return self.on(Hello(name, f"at {name}", seat, num_pages, 1.0, 0, epoch))

    def come(self, spawn=None):
        """A spawned worker has loaded."""
        spawn = spawn or self.spawns[0]
        self.spawns.remove(spawn)
        return self.hello(spawn.seat)

    def come_all(self):
        while self.spawns:
            self.come()

    def take(self, name):
        """A spare has loaded the seat it was asked to take."""
        return self.hello(self.takes.pop(name).seat, name)

    def join(self, name, load_s=0.0):
        return self.on(Joined(self.joins.pop(name).epoch, name, load_s))

    def join_all(self):
        commands = []
        while self.joins:
            commands += self.join(next(iter(self.joins)))
        return commands

    def start(self):
        self.enroll()
        self.come_all()
        self.join_all()
        return self

    def name(self, *seat):
        return next(name for name, its in self.alive.items() if its == Seat(*seat))

    def lose(self, name, why="the test ended it"):
        seat = self._forget(name)
        if self.found is None:
            self.vacant.add(seat)
        return self.on(Lost(name, why, seat))

    def stillborn(self, spawn):
        """A spawned worker dies before it has said a word."""
        self.spawns.remove(spawn)
        name = f"stillborn-{next(self._numbers)}"
        self.gone.append(name)
        return self.on(Lost(name, "it could not load", spawn.seat))

    def pass_time(self, seconds):
        commands = []
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            for name in [name for name in self.alive if name not in self.silent]:
                commands += self.on(Beat(name, 0.0))
            commands += self.on(Tick())
        return commands

    def settle(self):
        """Everything that is outstanding happens."""
        for _ in range(20):
            self.come_all()
            for name in list(self.takes):
                self.take(name)
            self.join_all()
            self.pass_time(max(HUNG_S, RESPAWN_AFTER_S) + 0.3)
            if not (self.spawns or self.takes or self.joins):
                return
        raise AssertionError(f"it never settles: {self.members.stats()}")

    # -- what must hold ------------------------------------------------------------------------------------------------

    def _told(self, name, message):
        match message:
            case Join():
                self.joins[name] = message
            case Leave():
                self.joins.pop(name, None)
            case Take():
                assert self.alive[name] is None, "it has a seat"
                self.takes[name] = message
            case Stop():
                self._forget(name)

    def _forget(self, name):
        seat = self.alive.pop(name, None)
        for memory in (self.takes, self.joins):
            memory.pop(name, None)
        self.silent.discard(name)
        if name not in self.gone:
            self.gone.append(name)
        return seat

    def seated(self):
        return {seat: name for name, seat in self.alive.items() if seat is not None}

    def whole(self, seats):
        per_replica = self.layout.num_stages * self.layout.num_shards
        replicas = range(self.layout.num_replicas)
        return {r for r in replicas if sum(seat.replica == r for seat in seats) == per_replica}

    def _check_call(self, epoch, joins):
        """One epoch, never seen before, of exactly the living; every pair has a home among them, and nobody else."""
        if epoch in self.epochs:
            assert epoch == self.epochs[-1], "an epoch that was given up is called again"
            assert {name: self.joins[name] for name in joins} == joins, "asked again: who has not answered, the same"
            return
        assert epoch > max(self.epochs, default=0)
        self.epochs.append(epoch)
        self.called = self.seated()
        assert self.whole(self.called), "an epoch is formed of broken replicas"
        self.joins.clear()
        assert sorted(joins) == sorted(self.called.values())
        for seat, name in self.called.items():
            join = joins[name]
            assert {Seat(m.stage, m.replica, m.shard): m.name for m in join.members} == self.called
            assert all(m.address == f"at {m.name}" for m in join.members)
            living = {self.layout.group_rank(other) for other in self.called if other.stage == seat.stage}
            assert [len(layer) for layer in join.table] == [NUM_EXPERTS] * len(self.layers[seat.stage])
            for ranks in itertools.chain(*join.table):
                assert ranks, "an expert has no home"
                assert set(ranks) <= living, "an expert lives on a dead worker"

    def _check_begin(self, begin):
        assert begin.epoch == self.epochs[-1], "an epoch that was given up begins"
        assert not self.joins, "somebody has yet to join"
        whole = self.whole(self.called)
        assert set(begin.resting) == set(range(begin.num_replicas)) - whole
        unchanged = {r for r in whole if self._of(self.called, r) == self._of(self.serving, r)}
        assert set(begin.kept) == unchanged, "kept is who has still what was in it, and nobody else"
        self.serving = self.called

    def _of(self, seats, replica):
        return {seat: name for seat, name in seats.items() if seat.replica == replica}

    def _check_conservation(self):
        """Each seat and each spare's place has a worker, or one under way or put off, and none has two."""
        stats = self.members.stats()
        assert set(stats.workers) == {"starting", "loaded", "serving", "hosting", "spare"}
        if self.found is not None:
            num_known = self.layout.num_workers - len(self.found)
            assert sum(stats.workers.values()) == num_known + self.num_spares, stats
        ordered = [spawn.seat for spawn in self.spawns if spawn.seat] + [take.seat for take in self.takes.values()]
        assert len(set(ordered)) == len(ordered), "two are to take one seat"


def _epoch_called(command):
    is_call = isinstance(command, Tell) and isinstance(command.message, Join)
    return command.message.epoch if is_call else None


def only(commands, kind):
    return [command for command in commands if isinstance(command, kind)]


def told(commands, kind):
    """name -> message, of all messages of a kind."""
    return {tell.name: tell.message for tell in only(commands, Tell) if isinstance(tell.message, kind)}


def notes(commands):
    return {note.kind: note for note in only(commands, Note)}


def begun(commands):
    (begin,) = only(commands, Begin)
    return begin


def word(hall):
    """(phase, reason, whether there is a replica to run on)"""
    stats = hall.members.stats()
    assert hall.members.reason == stats.reason
    return stats.phase, stats.reason, hall.members.is_ready


def states(hall):
    return {state: num for state, num in hall.members.stats().workers.items() if num}


# -- the first epoch -------------------------------------------------------------------------------------------------


def test_the_first_epoch_waits_for_every_seat_and_begins_when_all_have_joined():
    hall = Hall()
    hall.enroll()
    assert [spawn.seat for spawn in hall.spawns] == hall.layout.seats()
    for num in range(3):
        assert told(hall.come(), Join) == {}
        assert word(hall) == ("starting", f"{num + 1} of 4 workers have loaded", False)
    assert len(told(hall.come(), Join)) == 4
    *early, last = list(hall.joins)
    for name in early:
        assert hall.join(name) == []
    phase, reason, is_ready = word(hall)
    assert (phase, is_ready) == ("forming", False)
    assert reason == f"1 of 4 workers have yet to join epoch 1: {last}"
    commands = hall.join(last)
    assert begun(commands) == Begin(1, 2, 40, resting=(), kept=())
    assert only(commands, Formed) == [Formed(1, sorted((n, *s) for s, n in hall.seated().items()), hall.target)]
    assert word(hall) == ("whole", "", True)
    assert states(hall) == {"serving": 4}


def test_a_worker_is_spawned_with_what_it_holds_at_full_strength():
    hall = Hall()
    hall.enroll()
    for spawn in hall.spawns:
        rank, layers = hall.layout.group_rank(spawn.seat), hall.layers[spawn.seat.stage]
        table = zip(layers, hall.target[spawn.seat.stage], strict=True)
        held = {(layer, e) for layer, hosts in table for e, ranks in enumerate(hosts) if rank in ranks}
        assert sorted(spawn.pairs) == sorted(held)


def test_the_smallest_share_of_memory_counts():
    hall = Hall()
    hall.enroll()
    hall.spawns.clear()
    for seat in hall.layout.seats():
        hall.hello(seat, num_pages=30 + seat.stage + 2 * seat.replica)
    assert begun(hall.join_all()).num_pages == 30


def test_a_death_during_start_up_does_not_block_another_replica():
    hall = Hall()
    hall.enroll()
    victim = next(spawn for spawn in hall.spawns if spawn.seat == Seat(1, 1, 0))
    commands = hall.stillborn(victim)
    assert only(commands, Spawn) == [victim], "nobody serves: there is nothing to wait for"
    again = hall.spawns.pop()
    hall.come_all()
    assert begun(hall.join_all()).resting == (1,)
    assert states(hall) == {"starting": 1, "serving": 2, "hosting": 1}
    hall.come(again) if again in hall.spawns else hall.hello(again.seat)
    assert begun(hall.join_all()) == Begin(2, 2, 40, resting=(), kept=(0,))


def test_a_death_during_start_up_without_a_sibling_is_waited_for():
    hall = Hall(replicas=1)
    hall.enroll()
    hall.stillborn(hall.spawns[1])
    hall.come()
    assert word(hall)[0] == "waiting"
    hall.come()
    assert begun(hall.join_all()).epoch == 1


def test_a_worker_that_dies_before_the_first_enroll_is_not_waited_for():
    hall = Hall()
    for seat in hall.layout.seats():
        hall.hello(seat, epoch=3)
    hall.lose(hall.name(0, 1, 0))
    hall.enroll(found=hall.layout.seats())
    assert begun(hall.join_all()).resting == (1,)
    assert [spawn.seat for spawn in hall.spawns] == [Seat(0, 1, 0)]


def test_a_worker_that_a_new_engine_found_may_die_before_it_says_hello():
    hall = Hall()
    *others, last = hall.layout.seats()
    hall.enroll(found=hall.layout.seats())
    for seat in others:
        hall.hello(seat, epoch=3)
    hall.found.discard(last)
    hall.on(Lost("found", "its process ended", last))
    assert begun(hall.join_all()).resting == (1,)
    hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S)
    assert [spawn.seat for spawn in hall.spawns] == [last]


# -- a loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "replicas", "shards"), [(2, 2, 1), (2, 2, 2), (1, 3, 1), (4, 4, 2)])
def test_a_loss_with_a_living_sibling_calls_the_survivors_at_once(stages, replicas, shards):
    hall = Hall(stages, replicas, shards).start()
    lost = Seat(stages - 1, 1, shards - 1)
    before = dict(hall.seated())
    commands = hall.lose(before.pop(lost))
    joins = told(commands, Join)
    assert sorted(joins) == sorted(before.values())
    assert {join.epoch for join in joins.values()} == {2}
    assert not told(commands, Leave)
    assert not only(commands, Spawn), "its start must not slow the streams' return"
    assert hall.members.is_ready
    others = tuple(replica for replica in range(replicas) if replica != 1)
    commands = hall.join_all()
    assert begun(commands) == Begin(2, replicas, 40, resting=(1,), kept=others)
    (formed,) = only(commands, Formed)
    assert sorted(name for name, *_ in formed.seats) == sorted(before.values())
    assert hall.members.workers_of(0) == [name for seat, name in sorted(before.items()) if seat.replica == 0]


def test_what_the_lost_one_did_not_host_stays_where_it_is():
    hall = Hall(replicas=4).start()
    joins = told(hall.lose(hall.name(0, 2, 0)), Join)
    for stage in (0, 1):
        table = joins[hall.name(stage, 0, 0)].table
        for before, after in zip(itertools.chain(*hall.target[stage]), itertools.chain(*table), strict=True):
            left = [rank for rank in before if rank != 2 or stage == 1]
            assert after[0] == left[0] if left else after[0] != 2
            assert set(after[1:]) <= set(left)


def test_a_loss_without_a_sibling_is_waited_for():
    hall = Hall(replicas=1).start()
    survivor = hall.name(0, 0, 0)
    commands = hall.lose(hall.name(1, 0, 0))
    assert told(commands, Leave) == {survivor: Leave(1)}
    assert [spawn.seat for spawn in only(commands, Spawn)] == [Seat(1, 0, 0)], "nothing runs: it is spawned at once"
    assert not told(commands, Join)
    phase, reason, is_ready = word(hall)
    assert (phase, is_ready) == ("waiting", False)
    assert reason.endswith("the test ended it; no replica is whole before seat 1.0.0 is filled")
    assert hall.members.stats().experts_uncovered > 0
    assert len(told(hall.come(), Join)) == 2
    assert begun(hall.join_all()) == Begin(2, 1, 40, resting=(), kept=())
    assert word(hall) == ("whole", "", True)
    assert hall.members.stats().experts_uncovered == 0


def test_with_both_replicas_broken_the_cell_waits_for_the_first_that_is_whole():
    hall = Hall().start()
    hall.lose(hall.name(0, 0, 0))
    commands = hall.lose(hall.name(1, 1, 0))
    assert len(told(commands, Leave)) == 2
    assert sorted(spawn.seat for spawn in hall.spawns) == [Seat(0, 0, 0), Seat(1, 1, 0)]
    hall.come(next(spawn for spawn in hall.spawns if spawn.seat.replica == 1))
    assert begun(hall.join_all()).resting == (0,)


def test_two_deaths_in_a_row_use_no_number_twice():
    hall = Hall(replicas=3).start()
    hall.lose(hall.name(0, 1, 0))
    late = dict(hall.joins)
    for name in list(late)[:2]:
        hall.join(name)
    second = hall.name(1, 2, 0)
    assert {join.epoch for join in told(hall.lose(second), Join).values()} == {3}
    for name, join in late.items():
        assert hall.on(Joined(join.epoch, name)) == [], "that epoch was given up"
    assert hall.members.epoch == 1
    assert begun(hall.join_all()) == Begin(3, 3, 40, resting=(1, 2), kept=(0,))


def test_what_the_first_of_two_losses_spared_is_not_kept_if_the_second_hits_it():
    hall = Hall(replicas=3).start()
    hall.lose(hall.name(0, 1, 0))
    hall.lose(hall.name(0, 0, 0))
    assert begun(hall.join_all()).kept == (2,)


def test_two_workers_of_one_stage_lost_together_are_survived():
    hall = Hall(stages=1, replicas=4).start()
    hall.lose(hall.name(0, 0, 0))
    hall.lose(hall.name(0, 3, 0))
    assert begun(hall.join_all()).kept == (1, 2)
    assert states(hall) == {"starting": 2, "serving": 2}


# -- the return --------------------------------------------------------------------------------------------------------


def test_a_respawn_waits_until_the_streams_run_again():
    hall = Hall().start()
    hall.lose(hall.name(1, 0, 0))
    assert not only(hall.pass_time(RESPAWN_AFTER_S + 1), Spawn), "the epoch has not begun"
    hall.join_all()
    assert not only(hall.pass_time(RESPAWN_AFTER_S - TICK_S), Spawn)
    assert [spawn.seat for spawn in only(hall.pass_time(3 * TICK_S), Spawn)] == [Seat(1, 0, 0)]
    assert not only(hall.pass_time(RESPAWN_AFTER_S * 3), Spawn), "it is spawned once"


def test_at_its_return_the_placement_is_that_of_full_strength_again():
    hall = Hall().start()
    hall.lose(hall.name(1, 0, 0))
    hall.join_all()
    assert word(hall)[0] == "degraded"
    assert word(hall)[1].endswith("seat 1.0.0 is being refilled")
    hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S)
    hall.come()
    assert word(hall) == ("forming", "epoch 3 is being formed", True)
    assert states(hall) == {"loaded": 1, "serving": 2, "hosting": 1}
    commands = hall.join_all()
    assert begun(commands) == Begin(3, 2, 40, resting=(), kept=(1,))
    (formed,) = only(commands, Formed)
    assert formed.tables == hall.target
    assert word(hall) == ("whole", "", True)


def test_a_later_enroll_counts_from_the_next_epoch_at_full_strength():
    hall = Hall().start()
    moved = hall.place({(layer, 0): 1000.0 for layer in range(4)})
    assert moved != hall.target
    assert hall.enroll(moved) == [], "an epoch costs a pause: a better placement alone is not worth one"
    hall.lose(hall.name(1, 0, 0))
    hall.join_all()
    (spawn,) = only(hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S), Spawn)
    assert sorted(spawn.pairs) == [(2 + i, e) for i in (0, 1) for e in range(NUM_EXPERTS) if 0 in moved[1][i][e]]
    hall.come()
    assert only(hall.join_all(), Formed)[0].tables == moved


def test_a_worker_that_dies_while_it_loads_disturbs_nobody():
    hall = Hall().start()
    hall.lose(hall.name(1, 0, 0))
    hall.join_all()
    hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S)
    commands = hall.stillborn(hall.spawns[0])
    assert not told(commands, Join), "the epoch goes on without a pause"
    assert [spawn.seat for spawn in commands + hall.pass_time(RESPAWN_AFTER_S + 1) if isinstance(spawn, Spawn)]


# -- spares ------------------------------------------------------------------------------------------------------------


def test_a_spare_takes_the_seat_and_is_replaced():
    hall = Hall(replicas=1, spares=1).start()
    assert states(hall) == {"serving": 2, "spare": 1}
    spare = next(name for name, seat in hall.alive.items() if seat is None)
    lost = Seat(0, 0, 0)
    commands = hall.lose(hall.name(*lost))
    pairs = told(commands, Take)[spare].pairs
    assert told(commands, Take) == {spare: Take(lost, pairs)}
    assert {e for layer, e in pairs if layer == 0} == set(range(NUM_EXPERTS))
    hall.take(spare)
    assert begun(hall.join_all()) == Begin(2, 1, 40)
    assert set(hall.members.workers_of(0)) == {spare, hall.name(1, 0, 0)}
    hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S)
    assert [spawn.seat for spawn in hall.spawns] == [None]
    hall.come()
    assert states(hall) == {"serving": 2, "spare": 1}


def test_with_a_sibling_too_the_spare_takes_the_seat_while_the_sibling_serves():
    hall = Hall(spares=1).start()
    commands = hall.lose(hall.name(0, 1, 0))
    (spare,) = told(commands, Take)
    assert begun(hall.join_all()).resting == (1,)
    hall.take(spare)
    assert begun(hall.join_all()) == Begin(3, 2, 40, resting=(), kept=(0,))


def test_a_lost_spare_is_replaced_and_nobody_else_hears_of_it():
    hall = Hall(spares=2).start()
    spare = next(name for name, seat in hall.alive.items() if seat is None)
    commands = hall.lose(spare)
    assert not only(commands, Tell)
    hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S)
    assert [spawn.seat for spawn in hall.spawns] == [None]


def test_a_spare_that_dies_while_it_takes_a_seat_leaves_it_to_the_next():
    hall = Hall(replicas=1, spares=2).start()
    (first,) = told(hall.lose(hall.name(1, 0, 0)), Take)
    (second,) = told(hall.lose(first), Take)
    assert first != second
    hall.take(second)
    assert begun(hall.join_all()).epoch == 2


def test_the_late_hello_of_a_spare_that_was_asked_to_take_a_seat_gives_nothing_away():
    hall = Hall(replicas=1, spares=1).start()
    (spare,) = told(hall.lose(hall.name(1, 0, 0)), Take)
    assert hall.on(Hello(spare, f"at {spare}", None, 0, 0.0, 0)) == []
    hall.take(spare)
    assert begun(hall.join_all()).epoch == 2


def test_a_spare_that_does_not_answer_is_asked_again():
    hall = Hall(replicas=1, spares=1).start()
    (spare,) = told(hall.lose(hall.name(1, 0, 0)), Take)
    assert set(told(hall.pass_time(1.5), Take)) == {spare}


# -- silence -----------------------------------------------------------------------------------------------------------


def test_a_silent_worker_is_killed_and_then_lost_like_any_other():
    hall = Hall().start()
    frozen = hall.name(0, 1, 0)
    hall.silent.add(frozen)
    assert hall.pass_time(HUNG_S - TICK_S) == []
    commands = hall.pass_time(3 * TICK_S)
    assert [kill.name for kill in only(commands, Kill)] == [frozen]
    assert only(commands, Kill)[0].why.startswith("it has given no sign of life for 2.")
    assert set(told(commands, Stop)) == {frozen}
    assert len(told(commands, Join)) == 3
    assert begun(hall.join_all()).resting == (1,)
    assert hall.members.stats().lost_total == 1
    assert hall.on(Lost(frozen, "its process ended", Seat(0, 1, 0))) == [], "it is known to be dead"
    assert hall.members.stats().lost_total == 1


def test_whoever_was_given_up_is_told_to_stop_when_it_comes_back():
    hall = Hall().start()
    frozen = hall.name(0, 1, 0)
    hall.silent.add(frozen)
    hall.pass_time(HUNG_S + 2 * TICK_S)
    hall.join_all()
    for word_of_it in (Beat(frozen, 0.0), Hello(frozen, f"at {frozen}", Seat(0, 1, 0), 40, 0.0, 0)):
        (tell,) = hall.on(word_of_it)
        assert tell == Tell(frozen, f"at {frozen}", Stop())
    assert hall.on(Joined(2, frozen)) == []


def test_the_engine_s_own_pause_is_not_the_silence_of_others():
    hall = Hall().start()
    hall.pass_time(1.0)
    hall.now += 3 * HUNG_S
    assert hall.on(Tick()) == [], "their signs of life are in the inbox, behind this tick"
    assert hall.pass_time(HUNG_S) == []
    frozen = hall.name(0, 0, 0)
    hall.silent.add(frozen)
    assert [kill.name for kill in only(hall.pass_time(HUNG_S + 2 * TICK_S), Kill)] == [frozen]


def test_a_long_step_is_not_a_death_but_a_loop_that_never_turns_is():
    hall = Hall(stuck_s=60.0).start()
    busy = hall.name(1, 1, 0)
    assert hall.on(Beat(busy, 59.0)) == []
    commands = hall.on(Beat(busy, 61.0))
    assert [(kill.name, kill.why) for kill in only(commands, Kill)] == [(busy, "its loop has been stuck for 61 s")]
    assert len(told(commands, Join)) == 3


def test_a_worker_that_does_not_join_is_called_again_and_the_others_are_left_alone():
    hall = Hall().start()
    hall.lose(hall.name(1, 0, 0))
    slow, *others = list(hall.joins)
    for name in others:
        hall.join(name)
    call = hall.joins[slow]
    assert told(hall.pass_time(1.5), Join) == {slow: call}
    assert begun(hall.join(slow)).epoch == 2


def test_a_step_that_waits_for_a_lost_message_is_begun_again_by_the_same_members():
    hall = Hall().start()
    before = dict(hall.seated())
    commands = hall.members.form_again("a message was lost", hall.now)
    joins = told(commands, Join)
    hall._check_call(2, joins)
    hall.joins = joins
    assert hall.called == before
    assert notes(commands)["formed again"].text == "a message was lost"
    assert begun(hall.join_all()) == Begin(2, 2, 40, resting=(), kept=(0, 1))


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_the_second_worker_for_a_seat_is_sent_away():
    hall = Hall().start()
    commands = hall.hello(Seat(0, 0, 0), "twin")
    assert commands[:2] == [Kill("twin", "its seat is taken"), Tell("twin", "at twin", Stop())]
    assert [type(command) for command in commands[2:]] == [Note]
    assert hall.on(Lost("twin", "its process ended", Seat(0, 0, 0))) == []
    assert states(hall) == {"serving": 4}


def test_the_death_of_one_whose_seat_another_has_taken_is_no_loss_of_the_seat():
    hall = Hall().start()
    hall.lose(hall.name(0, 0, 0))
    hall.join_all()
    hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S)
    (spawn,) = hall.spawns
    hall.hello(spawn.seat, "quicker")
    hall.join_all()
    assert list(notes(hall.stillborn(spawn))) == ["lost"]
    assert states(hall) == {"serving": 4}
    hall.settle()
    assert hall.name(0, 0, 0) == "quicker"


def test_a_repeated_hello_or_joined_changes_nothing():
    hall = Hall().start()
    name = hall.name(0, 0, 0)
    assert hall.on(Hello(name, f"at {name}", Seat(0, 0, 0), 40, 0.0, 0)) == []
    assert hall.on(Joined(1, name)) == []
    assert hall.on(Beat("nobody", 0.0)) == []
    assert word(hall) == ("whole", "", True)


def test_a_new_engine_goes_on_with_those_who_are_left_and_far_behind_their_epoch():
    hall = Hall()
    *found, lost = hall.layout.seats()
    commands = hall.enroll(found=found, generation=2)
    assert [spawn.seat for spawn in only(commands, Spawn)] == [lost]
    for seat in found:
        hall.hello(seat, epoch=7 - seat.stage)
    begin = begun(hall.join_all())
    assert begin.epoch == 2 * EPOCHS_OF_ENGINE + 1, "the old engine may have called epochs that nobody has joined yet"
    assert (begin.resting, begin.kept) == ((1,), ()), "what is in their KV is not known to this engine"
    hall.come()
    assert begun(hall.join_all()).epoch == begin.epoch + 1


def test_a_new_engine_spawns_only_the_spares_that_are_missing():
    hall = Hall(spares=3)
    for seat in [*hall.layout.seats(), None, None]:
        hall.hello(seat, epoch=2)
    commands = hall.enroll(found=hall.layout.seats(), num_spares_found=2)
    assert [spawn.seat for spawn in only(commands, Spawn)] == [None]
    hall.come()
    assert states(hall) == {"loaded": 4, "spare": 3}


# -- what it tells -----------------------------------------------------------------------------------------------------


def test_the_phases_of_a_failover_are_told():
    hall = Hall().start()
    hall.pass_time(1.0)
    hall.now += 0.125
    commands = hall.lose(hall.name(1, 1, 0))
    lost = notes(commands)["lost"]
    assert (lost.epoch, lost.text.endswith("was lost: the test ended it")) == (1, True)
    hall.now += 0.5
    slow, *others = list(hall.joins)
    for name in others:
        hall.join(name)
    assert notes(hall.join(slow, load_s=0.25))["epoch"].text.endswith("replicas at rest: 1")
    hall.now += 0.0625
    (failover,) = hall.members.tokens_came(hall.now)
    assert (failover.kind, failover.epoch) == ("failover", 2)
    assert failover.seconds == pytest.approx(
        {"notice": 0.125, "repair": 0.0, "fence": 0.25, "load": 0.25, "first token": 0.0625}, abs=EXACTLY
    )
    assert hall.members.tokens_came(hall.now) == [], "it is told once"
    began = hall.now
    hall.pass_time(RESPAWN_AFTER_S + 2 * TICK_S)
    hall.come()
    restored = notes(hall.join_all())["restored"]
    assert restored.seconds["restored"] == pytest.approx(hall.now - began + 0.5625, abs=EXACTLY)
    counted = hall.members.stats().phase_seconds
    assert set(counted) == {"notice", "repair", "fence", "load", "first token", "restored"}
    assert {num for num, _ in counted.values()} == {1}


def test_two_losses_in_a_row_are_one_failover():
    hall = Hall(replicas=3).start()
    hall.lose(hall.name(0, 1, 0))
    hall.now += 0.25
    hall.lose(hall.name(0, 2, 0))
    hall.join_all()
    hall.settle()
    assert hall.members.stats().phase_seconds["restored"][0] == 1
    assert hall.members.stats().lost_total == 2


def test_messages_of_old_epochs_are_counted_also_of_those_who_died():
    hall = Hall().start()
    hall.on(Beat(hall.name(0, 0, 0), 0.0, num_stale=3))
    hall.on(Beat(hall.name(1, 0, 0), 0.0, num_stale=4))
    hall.on(Beat(hall.name(1, 0, 0), 0.0, num_stale=5))
    assert hall.members.stats().stale_total == 8
    hall.lose(hall.name(1, 0, 0))
    assert hall.members.stats().stale_total == 8


# -- anything, in any order --------------------------------------------------------------------------------------------

indices = st.integers(0, 99)
ops = st.one_of(
    st.tuples(st.just("come"), indices),
    st.tuples(st.just("stillborn"), indices),
    st.tuples(st.just("take"), indices),
    st.tuples(st.just("join"), indices),
    st.tuples(st.just("join all"), indices),
    st.tuples(st.just("lose"), indices),
    st.tuples(st.just("freeze"), indices),
    st.tuples(st.just("wake"), indices),
    st.tuples(st.just("twin"), indices),
    st.tuples(st.just("repeat"), indices),
    st.tuples(st.just("enroll"), indices),
    st.tuples(st.just("time"), st.integers(1, 30)),
)


def pick(things, index):
    things = list(things)
    return things[index % len(things)]


def apply(hall, op, value):
    if op == "come" and hall.spawns:
        hall.come(pick(hall.spawns, value))
    elif op == "stillborn" and hall.spawns:
        hall.stillborn(pick(hall.spawns, value))
    elif op == "take" and hall.takes:
        hall.take(pick(hall.takes, value))
    elif op == "join" and hall.joins:
        hall.join(pick(hall.joins, value))
    elif op == "join all":
        hall.join_all()
    elif op == "lose" and hall.alive:
        hall.lose(pick(hall.alive, value))
    elif op == "freeze" and hall.alive:
        hall.silent.add(pick(hall.alive, value))
    elif op == "wake" and hall.gone:
        name = pick(hall.gone, value)
        assert not told(hall.on(Beat(name, 0.0)), Join)
        assert not told(hall.on(Hello(name, f"at {name}", pick(hall.layout.seats(), value), 40, 0.0, 0)), Join)
    elif op == "twin" and hall.seated():
        hall.hello(pick(hall.seated(), value))
    elif op == "repeat" and hall.alive:
        name = pick(hall.alive, value)
        hall.on(Hello(name, f"at {name}", hall.alive[name], 40, 0.0, 0))
        hall.on(Joined(pick(hall.epochs or [0], -1) - 1, name))
    elif op == "enroll":
        hall.enroll(hall.place({(layer, value % NUM_EXPERTS): 9.0 for layer in range(9)}))
    elif op == "time":
        hall.pass_time(value * TICK_S)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(
    st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 3, 1), (2, 2, 2)]),
    st.integers(0, 2),
    st.booleans(),
    st.lists(ops, min_size=5, max_size=60),
)
def test_whatever_happens_the_cell_is_whole_again_in_the_end(layout, spares, is_up, events):
    hall = Hall(*layout, spares=spares)
    hall.start() if is_up else hall.enroll()
    for op, value in events:
        apply(hall, op, value)
    hall.settle()
    assert word(hall) == ("whole", "", True)
    assert states(hall) == {"serving": hall.layout.num_workers} | ({"spare": spares} if spares else {})
    assert hall.serving == hall.seated()
    assert len(hall.serving) == hall.layout.num_workers
    assert hall.members.stats().experts_uncovered == 0
