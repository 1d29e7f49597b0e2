"""What failovers take, phase by phase: from the loss of a member until every seat is filled again.

Notice: since the last sign of life of who was lost. Repair: making new tables. Fence: until all survivors have left
the old epoch. Load: that the slowest needed for the experts it took over. First token: from the new epoch's beginning
to its first step's end. Restored: from the notice until the cell is at full strength.
"""

from dataclasses import dataclass, field


@dataclass
class _Failover:
    """Several losses in a row are one."""

    noticed_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    began_s: float | None = None  # the epoch without the lost


class FailoverTimes:
    """Of the failover that is under way, if there is one, and sums over all of them. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._present: _Failover | None = None
        self._totals: dict[str, tuple[int, float]] = {}

    def totals(self) -> dict[str, tuple[int, float]]:
        """Phase -> (how many, seconds together)."""
        return dict(self._totals)

    def lost(self, now: float, silent_s: float) -> None:
        """A member is missed, and has been silent for so long."""
        if self._present is None or self._present.began_s is not None:
            self._present = _Failover(now, {"notice": silent_s})

    def repaired(self, repair_s: float) -> None:
        if self._present is not None and self._present.began_s is None:
            self._present.seconds["repair"] = repair_s

    def began(self, now: float, called_s: float, load_s: float, *, is_whole: bool) -> dict[str, float]:
        """An epoch, called at `called_s`. The phases so far if it ends a failover, else nothing."""
        failover = self._present
        if failover is None:
            return {}
        if failover.began_s is None:
            failover.began_s = now
            failover.seconds["fence"] = max(0.0, now - called_s - load_s)
            failover.seconds["load"] = load_s
            for phase in ("notice", "repair", "fence", "load"):
                self._count(phase, failover.seconds.get(phase, 0.0))
        if not is_whole:
            return {}
        self._present = None
        failover.seconds["restored"] = now - failover.noticed_s
        self._count("restored", failover.seconds["restored"])
        return failover.seconds

    def tokens_came(self, now: float) -> dict[str, float]:
        """A step of the present epoch has ended. The phases so far if that ends a failover's gap, else nothing."""
        failover = self._present
        if failover is None or failover.began_s is None or "first token" in failover.seconds:
            return {}
        failover.seconds["first token"] = now - failover.began_s
        self._count("first token", failover.seconds["first token"])
        return dict(failover.seconds)

    def _count(self, phase: str, seconds: float) -> None:
        num, total = self._totals.get(phase, (0, 0.0))
        self._totals[phase] = num + 1, total + seconds
