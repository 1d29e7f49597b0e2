"""Workers that die in virtual time, and how long what follows takes."""

import math

import msgspec


class Phases(msgspec.Struct, frozen=True):
    """Seconds. The cell stands still from the death until notice, form and load are over.

    The defaults are guesses of the order that the CPU cell shows; a plan has its own.
    """

    notice_s: float = 0.1  # until the death is known
    form_s: float = 0.3  # fence and repair: until a new epoch begins, with or without somebody
    load_s: float = 0.0  # until the survivors have the experts of the dead
    refill_s: float = 14.0  # from the notice until a new worker has loaded and can join

    @property
    def pause_s(self) -> float:
        """After a death; a later return costs the form alone."""
        return self.notice_s + self.form_s + self.load_s


class Loss(msgspec.Struct, frozen=True):
    """A worker dies. `worker`: its number in the cell, by stage, then replica, then shard."""

    at_s: float
    cell: int
    worker: int
    phases: Phases = Phases()


class Outage(msgspec.Struct):
    """What a loss did. Seconds of the run; nan where it did not come to that."""

    cell: int
    worker: int
    replica: int
    died_s: float
    began_s: float = math.nan  # the epoch without it: others go on
    token_s: float = math.nan  # the first step's end after that
    whole_s: float = math.nan  # the epoch in which its seat is filled again
