"""The ingress's side of the engine: requests go out and tokens come in over the mesh, a queue per request.

The engine may die and come back elsewhere. Until it is found again requests are held; then each is submitted anew with
the tokens that have come so far, for a request is its tokens. Whoever waits for them notices a pause and nothing else.

No torch here: an ingress replica stays small and starts fast.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

import msgspec

from serve_app.engine.plan import Abort, Cancel, Submit
from serve_app.engine.request import Emission, Refusal, Request
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE
from serve_app.runtime.tallies import IngressBook
from serve_app.runtime.wire import Aborted, Attach, From, Moved, Refused, Status, Tally, Tokens

log = logging.getLogger(__name__)

BEAT_S = 0.5  # between two signs of life to the engine
SILENT_S = 2.5  # an engine not heard for this long is looked for; a beat this late means that we were paused ourselves
ENDPOINT_S = 3.0  # that it may take to say where the engine is
LINK_S = 0.3  # that a connection to it may take before we ask again: an address may be that of a dead engine
ANSWER_S = 1.5  # that a connected engine may take for a status; to one that knows us it is but a matter of its next
PAUSE_S = 0.1  # between two attempts to find the engine
GIVE_UP_S = 60.0  # after this long without an engine its requests fail
QUIET_S = 10.0  # a request of which nothing came for this long is asked for again: a message may have been lost
HELD_LIMIT = 10_000  # requests held while there is no engine (see mesh.SEND_LIMIT); more are refused

_Item = Emission | Exception  # what a request's reader gets
_FromEngine = Tokens | Status | Moved | Refused | Aborted | Tally


class ConnectionLostError(Exception):
    """A request that no engine will answer; the message says why."""


class TakenOverError(Exception):
    """The same request was submitted again: its tokens go to whoever did that."""


class NotLetInError(Exception):
    """The engine does not take the request now."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


class EndedByNameError(Exception):
    """Somebody aborted the request."""


class EngineClient:
    """One ingress replica's connection to its engine, wherever that is.

    Make it inside a running event loop and `close` it in there. `endpoint` says where the engine is now; it may raise
    or hang. `pid` and `node` (Ray's id) are told to the engine.
    """

    def __init__(
        self, mesh: Mesh, endpoint: Callable[[], Awaitable[str]], name: str, pid: int = 0, node: str = ""
    ) -> None:
        self._mesh = mesh
        self._endpoint = endpoint
        self._name = name
        self._attach = Attach(name, mesh.address, pid, node)
        self.book = IngressBook(name, lambda tally: mesh.send(ENGINE, tally))
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, _Stream] = {}  # in order of arrival
        self._status: Status | None = None
        self._status_s = self._heard_s = self._lost_s = self._loop.time()
        self._epoch = 0
        self._address = ""
        self._is_linked = asyncio.Event()  # there is a connection to `_address`
        self._has_answered = asyncio.Event()  # a status came
        self._is_lost = asyncio.Event()
        self._why = "the engine has not been heard yet"  # there is none; "" while there is
        self._closed = threading.Event()
        mesh.watch(ENGINE, self._see_link)
        self._reader = threading.Thread(target=self._read, name="engine-client", daemon=True)
        self._reader.start()
        self._keeper = self._loop.create_task(self._keep())

    async def submit(self, request: Request) -> AsyncGenerator[Emission, None]:
        """Emissions of a request until it finishes, each token once and in order. Closing this early cancels it.

        While there is no engine the request is held. Raises ConnectionLostError when there has been none for
        GIVE_UP_S, TakenOverError when a request of the same rid is submitted here: that one gets all that comes then;
        NotLetInError, EndedByNameError. What came while the reader was busy comes in one piece.
        """
        self._check_room()
        stream = self._open(request)
        try:
            if not self._why and not self._send(Submit(stream.as_it_stands(self._loop.time()))):
                raise ConnectionLostError("the engine takes no more requests")
            while True:
                item = await stream.next()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            self._leave(stream)

    def abort(self, name: str, tenant: str | None) -> None:
        """End all requests that clients call `name` ("": all there are), of one tenant or of whomever (None)."""
        self._send(Abort(name, tenant))

    @property
    def epoch(self) -> int:
        """The newest epoch that is known to have begun; 0 before the first."""
        return self._epoch

    @property
    def is_alive(self) -> bool:
        """Whether what this consists of still runs; says nothing about the engine."""
        return self._reader.is_alive() and not self._keeper.done()

    def latest(self) -> tuple[Status | None, float]:
        """The engine's last word about itself, and how many seconds ago it came."""
        return self._status, self._loop.time() - self._status_s

    def absence(self) -> tuple[str, float]:
        """Why there is no engine, and for how many seconds there has been none; ("", 0.0) while there is one."""
        return self._why, self._loop.time() - self._lost_s if self._why else 0.0

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._keeper.cancel()
            self._reader.join()
            self._mesh.close()

    # -- requests ---------------------------------------------------------------------------------------------------

    def _check_room(self) -> None:
        why, away_s = self.absence()
        if away_s > GIVE_UP_S:
            raise ConnectionLostError(_gave_up(why, away_s))
        if why and len(self._streams) >= HELD_LIMIT:
            raise ConnectionLostError(f"{why}, and {len(self._streams)} requests wait for it already")

    def _open(self, request: Request) -> "_Stream":
        self._hand_over(request.rid)
        stream = self._streams[request.rid] = _Stream(request, self._loop.time())
        return stream

    def _hand_over(self, rid: str) -> None:
        """To a newer connection, here or at another ingress replica."""
        older = self._streams.pop(rid, None)
        if older is not None:
            older.items.put_nowait(TakenOverError("taken over by a newer connection"))

    def _end(self, rid: str, why: Exception) -> None:
        stream = self._streams.get(rid)
        if stream is not None and not stream.is_finished:
            stream.is_finished = True
            stream.items.put_nowait(why)

    def _leave(self, stream: "_Stream") -> None:
        """The reader has gone. What an engine that is away had of the request died with it."""
        rid = stream.request.rid
        if self._streams.get(rid) is not stream:
            return  # another reads it now
        del self._streams[rid]
        if not stream.is_finished and not self._why:
            self._send(Cancel(rid))

    def _send(self, event: Submit | Cancel | Abort) -> bool:
        return self._mesh.send(ENGINE, From(self._name, event))

    def _ask_again(self, stream: "_Stream") -> None:
        """Submit what is known already: the engine sends all that comes behind it."""
        stream.is_asked, stream.news_s = True, self._loop.time()
        self._send(Submit(stream.as_it_stands(self._loop.time())))

    # -- what comes -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        while not self._closed.is_set():
            received = self._mesh.receive(BEAT_S)
            if received is not None and isinstance(received.message, _FromEngine):
                self._loop.call_soon_threadsafe(self._deliver, received.message)

    def _deliver(self, message: _FromEngine) -> None:
        self._heard_s = self._loop.time()
        if isinstance(message, Tally):
            self.book.on(message)
            return
        if isinstance(message, Moved):
            self._hand_over(message.rid)
            return
        if isinstance(message, Refused):
            self._end(message.refusal.rid, NotLetInError(message.refusal))
            return
        if isinstance(message, Aborted):
            self._end(message.rid, EndedByNameError("the request was aborted by its name"))
            return
        if isinstance(message, Status):
            self._status, self._status_s = message, self._heard_s
            self._epoch = max(self._epoch, message.epoch)
            self._has_answered.set()
            return
        for emission in message.emissions:
            stream = self._streams.get(emission.rid)  # None: its reader has gone, and the cancellation is on its way
            if stream is not None and not stream.take(emission, self._heard_s) and not stream.is_asked:
                self._ask_again(stream)

    def _see_link(self, address: str, is_up: bool) -> None:
        self._loop.call_soon_threadsafe(self._linked, address, is_up)

    def _linked(self, address: str, is_up: bool) -> None:
        if address != self._address:
            return  # an engine that we have left
        if is_up:
            self._is_linked.set()
        else:
            self._is_linked.clear()
            self._lose("the engine's connection was closed")

    # -- the engine comes and goes ----------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await self._find()
            await self._stay()

    async def _find(self) -> None:
        """Ask where the engine is until one answers from there, and give it all requests."""
        while not await self._answers(await self._ask()):
            why, away_s = self.absence()
            if away_s > GIVE_UP_S:
                self._give_up(_gave_up(why, away_s))
            await asyncio.sleep(PAUSE_S)
        _, away_s = self.absence()
        self._why = ""
        self._is_lost.clear()
        self.book.greet()
        streams = [stream for stream in self._streams.values() if not stream.is_finished]
        log.info("the engine is at %s after %.1f s: %d requests go on", self._address, away_s, len(streams))
        for stream in streams:
            self._ask_again(stream)

    async def _ask(self) -> str | None:
        """Where the engine is; None when nobody says."""
        try:
            async with asyncio.timeout(ENDPOINT_S):
                return await self._endpoint()
        except Exception as error:  # whatever is asked may be dead, full or late: it is asked again
            log.debug("where the engine is could not be learned: %s", error)
            return None

    async def _answers(self, address: str | None) -> bool:
        """Whether an engine at this address takes us. That of a dead one may be given for a while."""
        if address is None:
            return False
        if address != self._address:
            self._address = address
            self._is_linked.clear()
            self._mesh.connect(ENGINE, address)
        with suppress(TimeoutError):
            async with asyncio.timeout(LINK_S):
                await self._is_linked.wait()
            self._has_answered.clear()
            self._mesh.send(ENGINE, self._attach)
            async with asyncio.timeout(ANSWER_S):
                await self._has_answered.wait()
            return self._is_linked.is_set()
        return False

    async def _stay(self) -> None:
        """Beat until the engine is lost."""
        while not self._why:
            now = self._loop.time()
            self._mesh.send(ENGINE, self._attach)
            self.book.beat()
            for stream in self._streams.values():
                if now - stream.news_s > QUIET_S and not stream.is_finished:
                    self._ask_again(stream)
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._is_lost.wait()
            self._judge(self._loop.time() - now - BEAT_S)

    def _judge(self, late_s: float) -> None:
        """`late_s`: how much too late we look."""
        silent_s = self._loop.time() - self._heard_s
        if late_s > SILENT_S:  # the engine may have cancelled all that was ours
            self._lose(f"this ingress was paused for {late_s:.0f} s")
        elif silent_s > SILENT_S:
            self._lose(f"the engine has been silent for {silent_s:.0f} s")

    def _lose(self, why: str) -> None:
        if not self._why:
            self._why, self._lost_s = why, self._loop.time()
            self._is_lost.set()
            self.book.lose()
            log.warning("%s: %d requests are held until it is found", why, len(self._streams))

    def _give_up(self, why: str) -> None:
        for stream in self._streams.values():
            stream.items.put_nowait(ConnectionLostError(why))


class _Stream:
    """A request that somebody waits for, and what has come of it."""

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.items: asyncio.Queue[_Item] = asyncio.Queue()  # bounded by max_new_tokens
        self.is_asked = False  # again, and what was asked for has not come yet
        self.is_finished = False
        self.news_s = now  # when something last came, or was asked for
        self._came_s = now
        self._was_sent = False
        self._tokens = [*request.emitted]

    def as_it_stands(self, now: float) -> Request:
        """What has to be known to go on with it. An engine that has it, or had, has let it in."""
        terms = msgspec.structs.replace(
            self.request.terms,
            waited_s=now - self._came_s,
            is_accepted=self._was_sent or self.request.terms.is_accepted,
        )
        self._was_sent = True
        return msgspec.structs.replace(self.request, emitted=self._tokens, terms=terms)

    async def next(self) -> _Item:
        """The next item, with all the emissions that wait behind it in one."""
        item = await self.items.get()
        while isinstance(item, Emission) and item.finish is None and not self.items.empty():
            more = self.items.get_nowait()
            if isinstance(more, Exception):
                self.items.put_nowait(more)  # nothing comes behind it
                break
            item = joined(item, more)
        return item

    def take(self, emission: Emission, now: float) -> bool:
        """Pass on what is new. False: tokens before it are missing, or the engine means a request of the past."""
        num_known = len(self._tokens) - emission.first
        if self.is_finished:
            return True
        if num_known < 0 or emission.finish == "abort":  # nobody here has cancelled a request that is still waited for
            return False
        self.is_asked, self.news_s = False, now
        tokens, logprobs, tops = emission.tokens[num_known:], emission.logprobs[num_known:], emission.tops[num_known:]
        if tokens or emission.finish is not None:
            self.items.put_nowait(
                msgspec.structs.replace(emission, first=len(self._tokens), tokens=tokens, logprobs=logprobs, tops=tops)
            )
        self._tokens += tokens
        self.is_finished = emission.finish is not None
        return True


def joined(early: Emission, late: Emission) -> Emission:
    """Two emissions of a request, one behind the other, as one."""
    return msgspec.structs.replace(
        early,
        tokens=early.tokens + late.tokens,
        logprobs=early.logprobs + late.logprobs,
        tops=early.tops + late.tops,
        finish=late.finish,
    )


def _gave_up(why: str, away_s: float) -> str:
    return f"there has been no engine for {away_s:.0f} s: {why}"
