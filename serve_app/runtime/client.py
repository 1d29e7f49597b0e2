"""The ingress's side of the engine: requests go out and tokens come in over the mesh, a queue per request.

No torch here: an ingress replica stays small and starts fast.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator

from serve_app.engine.plan import Cancel, Submit
from serve_app.engine.request import Emission, Request
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE
from serve_app.runtime.wire import Attach, From, Status, Tokens

BEAT_S = 1.0  # between two signs of life to the engine
SILENT_S = 15.0  # an engine not heard for this long has lost our requests
PAUSED_S = 8.0  # a beat this late: the engine may have cancelled our requests (see engine_loop.INGRESS_SILENT_S)


class ConnectionLostError(Exception):
    """The engine does not know this ingress's requests any more; the message says why."""


class EngineClient:
    """One ingress replica's connection to its engine. Make it inside a running event loop; `close` it at the end."""

    def __init__(self, mesh: Mesh, engine_address: str, name: str) -> None:
        self._mesh = mesh
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, asyncio.Queue[Emission | ConnectionLostError]] = {}
        self._status: Status | None = None
        self._status_s = 0.0
        self._closed = threading.Event()
        mesh.connect(ENGINE, engine_address)
        self._reader = threading.Thread(target=self._read, name="engine-client", daemon=True)
        self._reader.start()

    async def submit(self, request: Request) -> AsyncGenerator[Emission, None]:
        """Emissions of a request until it finishes. Closing the iterator early cancels it in the engine.

        Raises ConnectionLostError when the engine is gone, or has given this ingress up.
        """
        queue: asyncio.Queue[Emission | ConnectionLostError] = asyncio.Queue()  # bounded by max_new_tokens
        self._queues[request.rid] = queue
        finished = False
        try:
            if not self._mesh.send(ENGINE, From(self._name, Submit(request))):
                raise ConnectionLostError("the engine takes no more requests")
            while not finished:
                emission = await queue.get()
                if isinstance(emission, ConnectionLostError):
                    raise emission
                finished = emission.finish is not None
                yield emission
        finally:
            del self._queues[request.rid]
            if not finished:
                self._mesh.send(ENGINE, From(self._name, Cancel(request.rid)))

    @property
    def epoch(self) -> int:
        """The newest epoch that began; 0 before the first."""
        return self._status.epoch if self._status else 0

    def latest(self) -> tuple[Status | None, float]:
        """The engine's last word about itself, and how many seconds ago it came."""
        return self._status, self._loop.time() - self._status_s

    def close(self) -> None:
        self._closed.set()
        self._reader.join()
        self._mesh.close()

    def _read(self) -> None:
        beat = Attach(self._name, self._mesh.address)
        due_s = self._status_s = self._loop.time()
        while not self._closed.is_set():
            late_s, silent_s = self._loop.time() - due_s, self._loop.time() - self._status_s
            if late_s > PAUSED_S:
                self._loop.call_soon_threadsafe(self._give_up, f"this ingress was paused for {late_s:.0f} s")
            elif silent_s > SILENT_S:
                self._loop.call_soon_threadsafe(self._give_up, f"the engine has been silent for {silent_s:.0f} s")
            self._mesh.send(ENGINE, beat)
            due_s = self._loop.time() + BEAT_S
            while (left_s := due_s - self._loop.time()) > 0 and not self._closed.is_set():
                received = self._mesh.receive(min(left_s, BEAT_S))
                if received is not None and isinstance(received.message, Tokens | Status):
                    self._loop.call_soon_threadsafe(self._deliver, received.message)

    def _give_up(self, why: str) -> None:
        for queue in self._queues.values():
            queue.put_nowait(ConnectionLostError(why))

    def _deliver(self, message: Tokens | Status) -> None:
        if isinstance(message, Status):
            self._status, self._status_s = message, self._loop.time()
            return
        for emission in message.emissions:
            queue = self._queues.get(emission.rid)
            if queue is not None:  # else its reader has gone, and the cancellation is on its way
                queue.put_nowait(emission)
