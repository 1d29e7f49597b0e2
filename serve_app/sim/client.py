"""A virtual ingress replica: keeps tokens by request, and asks again for what is missing, as `runtime.client` does."""

from dataclasses import dataclass, field

import msgspec

from serve_app.engine.plan import Cancel, Submit
from serve_app.engine.request import Emission, FinishReason
from serve_app.sim.scenario import Asked
from serve_app.sim.toy import undisturbed
from serve_app.sim.world import ViolationError, World

QUIET_S = 4.0  # a request of which nothing came for this long is asked for again
LOOK_S = 0.5


@dataclass
class _Stream:
    asked: Asked
    expected: list[int]
    reason: FinishReason
    tokens: list[int] = field(default_factory=list)
    is_asked: bool = False  # again, and what was asked for has not come yet
    has_left: bool = False  # nobody waits for it any more
    is_finished: bool = False
    news_s: float = 0.0


class Client:
    def __init__(self, world: World) -> None:
        self._world = world
        self._engine = 0  # the one that it speaks to; 0 is none
        self._streams: dict[str, _Stream] = {}
        for asked in world.scenario.asked:
            world.clock.after(asked.at_s, self._open, asked)
        self._num_to_come = len(world.scenario.asked)
        self._look()

    @property
    def open(self) -> list[str]:
        """Requests that somebody waits for, in words, and those to come."""
        rids = [rid for rid, stream in self._streams.items() if not (stream.is_finished or stream.has_left)]
        return rids + ["one to come"] * self._num_to_come

    def find(self, engine: int) -> None:
        """There is a new engine, and all that is open goes on there."""
        self._engine = engine
        for stream in self._streams.values():
            if not stream.is_finished and not stream.has_left:
                self._ask_again(stream)

    def lose(self) -> None:
        self._engine = 0

    def hear(self, emission: Emission) -> None:
        """From an engine, which may have died since."""
        self._world.network.send(self._take, emission)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _open(self, asked: Asked) -> None:
        self._num_to_come -= 1
        self._world.tally.requests += 1
        stream = _Stream(asked, *undisturbed(asked.request, self._world.scenario.engine), news_s=self._world.clock.now)
        self._streams[asked.request.rid] = stream
        if self._engine:
            self._send(Submit(asked.request))
        if asked.cancel_s is not None:
            self._world.clock.after(asked.cancel_s - asked.at_s, self._leave, stream)

    def _leave(self, stream: _Stream) -> None:
        if not stream.is_finished and self._engine:
            self._send(Cancel(stream.asked.request.rid))
        stream.has_left = True

    def _ask_again(self, stream: _Stream) -> None:
        stream.is_asked, stream.news_s = True, self._world.clock.now
        self._send(Submit(msgspec.structs.replace(stream.asked.request, emitted=[*stream.tokens])))

    def _send(self, event: Submit | Cancel) -> None:
        self._world.to_engine(self._engine, event)

    def _look(self) -> None:
        now = self._world.clock.now
        for stream in self._streams.values() if self._engine else ():
            if now - stream.news_s > QUIET_S and not stream.is_finished and not stream.has_left:
                self._ask_again(stream)
        self._world.clock.after(LOOK_S, self._look)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _take(self, emission: Emission) -> None:
        stream = self._streams[emission.rid]
        if stream.is_finished or stream.has_left:
            return
        num_known = len(stream.tokens) - emission.first
        if num_known < 0 or emission.finish == "abort":
            if not stream.is_asked and self._engine:
                self._ask_again(stream)
            return
        stream.is_asked, stream.news_s = False, self._world.clock.now
        tokens = emission.tokens[num_known:]
        stream.tokens += tokens
        self._world.tally.tokens += len(tokens)
        self._compare(stream, emission)

    def _compare(self, stream: _Stream, emission: Emission) -> None:
        """With what an undisturbed cell would say."""
        rid, end = emission.rid, emission.first + len(emission.tokens)
        if emission.tokens != stream.expected[emission.first : end]:
            raise ViolationError(
                f"{rid} gets {emission.tokens} at {emission.first}, and not what an undisturbed run says"
            )
        if emission.finish is None:
            return
        stream.is_finished = True
        if (stream.tokens, emission.finish) != (stream.expected, stream.reason):
            raise ViolationError(f"{rid} ends with {emission.finish} after {len(stream.tokens)} tokens")
