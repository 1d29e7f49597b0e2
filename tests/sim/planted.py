"""Engines with one fault each, for the simulator to find."""

from dataclasses import replace

import msgspec

from serve_app.engine.cell import CellCore
from serve_app.engine.core import EngineCore
from serve_app.engine.membership import Membership
from serve_app.engine.plan import Begin
from serve_app.sim.scenario import STEP_LIMIT_S


def cell_of(scenario, core=EngineCore, members=Membership):
    layout, stages, slots = scenario.layout, scenario.stages, scenario.slots
    return CellCore(core(scenario.engine), members(layout, stages, slots, scenario.members), STEP_LIMIT_S)


class OldEpochAccepted(EngineCore):
    def _step_done(self, done):
        return super()._step_done(msgspec.structs.replace(done, epoch=self.epoch))


class RerunCountedTwice(EngineCore):
    """A step that was in flight when its epoch ended is booked when it is done, and again when it is told of again."""

    def __init__(self, config):
        super().__init__(config)
        self.parts = {}  # (replica, step) -> of steps that were run again

    def _begin(self, begin):
        reruns, emissions = super()._begin(begin)
        for plan in reruns:
            self.parts[plan.replica, plan.step] = self._schedulers[plan.replica]._flights[plan.step].parts
        return reruns, emissions

    def _step_done(self, done):
        parts = self.parts.get((done.replica, done.step))
        scheduler = self._schedulers.get(done.replica)
        before = scheduler and scheduler._flights.get(done.step)
        emissions = super()._step_done(done)
        if parts and before and done.epoch == self.epoch and done.step not in scheduler._flights:
            again = [part for part in parts if part.samples and part.seq.finish is None]
            emissions += [part.seq.accept(token, 0.0, []) for part, token in zip(again, done.tokens, strict=False)]
        return emissions


class PageLeaked(EngineCore):
    """Who is added again on a replica that was kept leaves a page behind."""

    def _replay(self, seq):
        emissions = super()._replay(seq)
        scheduler = self._schedulers.get(seq.replica)
        if scheduler and scheduler.pool.can_allocate(1):
            scheduler.pool.allocate(1)
        return emissions

    def check_integrity(self):
        """Blind: the leak is to be seen from what is left in the end."""


class CancelledPagesKept(EngineCore):
    """A sequence that is cancelled while its step is in flight never gives its pages back after a new epoch."""

    def _begin(self, begin):
        result = super()._begin(begin)
        for scheduler in self._schedulers.values():
            for flight in scheduler._flights.values():
                for part in flight.parts:
                    if part.seq.finish is not None:
                        part.seq.pages = []
        return result


class WronglyKept(Membership):
    """A replica is held for the old one although one of its workers is another."""

    def _begin(self, forming, now):
        before = self._serving
        for command in super()._begin(forming, now):
            if isinstance(command, Begin):
                whole = self._whole(before) & self._whole(forming.seats)
                yield msgspec.structs.replace(command, kept=tuple(sorted(whole)))
            else:
                yield command


class LostExpertHomeless(Membership):
    """What a lost worker alone hosted finds no home."""

    def _repaired(self, seats, *, anew):
        placements = self._target if anew or not self._current else self._current
        return [
            replace(
                placement,
                hosts=tuple(
                    tuple(tuple(rank for rank in ranks if rank in self._living(stage, seats)) for ranks in table)
                    for table in placement.hosts
                ),
            )
            for stage, placement in enumerate(placements)
        ]


class NobodyAskedAgain(Membership):
    """A Join, or its answer, that was lost is waited for as long as the cell lives."""

    def _ask_again(self, now):
        return iter(())


CORES = [OldEpochAccepted, RerunCountedTwice, PageLeaked, CancelledPagesKept]
MEMBERSHIPS = [WronglyKept, LostExpertHomeless, NobodyAskedAgain]
