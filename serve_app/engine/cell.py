"""The engine and the membership of one cell, driven as one object by the cluster's engine loop and by the simulator."""

from serve_app.engine.core import EngineCore
from serve_app.engine.members import Beat, Enroll, Hello, Joined, Lost, Parted, Tick
from serve_app.engine.membership import MemberCommand, Membership
from serve_app.engine.plan import Abort, Arrivals, Begin, Cancel, Command, Emit, Run, StepDone, Submit

CellEvent = StepDone | Submit | Arrivals | Cancel | Abort | Enroll | Hello | Joined | Beat | Lost | Parted | Tick
CellCommand = Command | MemberCommand


class CellCore:
    """`on(event, now)` takes everything that happens to a cell, and returns everything that is to be done."""

    def __init__(self, core: EngineCore, members: Membership, step_limit_s: float = 120.0) -> None:
        """`step_limit_s`: a step that takes longer waits for a message that was lost."""
        self.core, self.members = core, members
        self._step_limit_s = step_limit_s
        self._sent_s: dict[tuple[int, int], float] = {}  # (replica, step) in flight -> when it was sent

    def on(self, event: CellEvent, now: float) -> list[CellCommand]:
        """Take one event; return what follows, in order. `now` is in seconds of any monotonic clock."""
        match event:
            case StepDone():
                return [*self._run(event, now), *self._tokens_came(event, now)]
            case Submit() | Arrivals() | Cancel() | Abort():
                return self._run(event, now)
            case Tick():
                return [*self._obey(self.members.on(event, now), now), *self._look_at_steps(now)]
            case _:
                return self._obey(self.members.on(event, now), now)

    def _run(self, event: StepDone | Submit | Arrivals | Cancel | Abort | Begin, now: float) -> list[CellCommand]:
        commands: list[CellCommand] = []
        for command in self.core.on(event, now):
            commands.append(command)
            if isinstance(command, Run):
                self._sent_s[command.plan.replica, command.plan.step] = now
        return commands

    def _obey(self, commands: list[MemberCommand], now: float) -> list[CellCommand]:
        done: list[CellCommand] = []
        for command in commands:
            if isinstance(command, Begin):
                self._sent_s.clear()
                done += self._run(command, now)
            else:
                done.append(command)
        return done

    def _tokens_came(self, done: StepDone, now: float) -> list[CellCommand]:
        if done.epoch != self.core.epoch:
            return []
        self._sent_s.pop((done.replica, done.step), None)
        return [*self.members.tokens_came(now)]

    def _look_at_steps(self, now: float) -> list[CellCommand]:
        oldest_s = min(self._sent_s.values(), default=now)
        if now - oldest_s <= self._step_limit_s or not self.members.is_ready:
            return []
        self._sent_s.clear()
        why = f"a step has been under way for {now - oldest_s:.0f} s, and everyone is alive: a message was lost"
        return self._obey(self.members.form_again(why, now), now)


__all__ = ["CellCommand", "CellCore", "CellEvent", "Emit"]
