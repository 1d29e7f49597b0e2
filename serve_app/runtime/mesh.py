"""The ZeroMQ mesh: each process binds one inbox and opens a socket to each peer that it speaks to.

Joining is connecting, and a lost peer is silence: nothing here blocks on a peer. On loopback the sockets are plain;
where they leave the host every socket uses CURVE with the cell's key, and only holders of that key may connect.
"""

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from serve_app.runtime import wire

log = logging.getLogger(__name__)

# Messages queued to one peer before more are refused: a peer that takes none of 10,000 is not coming back, and its
# membership ends by other means (its death, or the next epoch).
SEND_LIMIT = 10_000

Watcher = Callable[[str, bool], None]  # a peer's address, and whether the connection to it has been made or broken
_LINK_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED


class CellKey(NamedTuple):
    """One CURVE key pair, shared by the processes of a cell and by nobody else (Z85 text)."""

    public: bytes
    secret: bytes

    @classmethod
    def make(cls) -> "CellKey":
        return cls(*zmq.curve_keypair())


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1")


def host_of(address: str) -> str:
    """The host in a mesh address."""
    return address.removeprefix("tcp://").rsplit(":", 1)[0]


class Received(NamedTuple):
    message: wire.Message
    frame: memoryview | None


class Traffic(NamedTuple):
    """Bytes given to the sockets, by the message's class name. What ZeroMQ and TCP add is not in them."""

    header_bytes: Counter[str]
    frame_bytes: Counter[str]


class Mesh:
    """One process's inbox and its sockets to others. Any thread may send; one receives."""

    def __init__(self, host: str = "127.0.0.1", key: CellKey | None = None) -> None:
        if key is None and not is_loopback(host):
            raise ValueError(f"the mesh leaves this host by {host}: it needs the cell's key")
        self._context = zmq.Context()
        self._key = key
        self._auth = self._authenticator() if key else None
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set(zmq.MAXMSGSIZE, wire.MAX_PART_BYTES)
        self._inbox.set(zmq.RCVHWM, 0)  # bounded by what the senders may have queued
        if key:
            self._inbox.curve_server = True
            self._inbox.curve_publickey, self._inbox.curve_secretkey = key
        port = self._inbox.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._peers: dict[str, tuple[str, zmq.Socket[bytes]]] = {}
        self._watchers: dict[str, Watcher] = {}
        self._num_watched = itertools.count()
        self._sending = threading.Lock()  # a ZeroMQ socket may change threads, but only across a barrier
        self.num_dropped = 0
        self._sent = Traffic(Counter(), Counter())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def connect(self, name: str, address: str) -> None:
        """Open (or move) the way to a peer. Returns at once, whether or not anybody listens there."""
        with self._sending:
            known = self._peers.get(name)
            if known and known[0] == address:
                return
            if known:
                known[1].close(0)
            self._peers[name] = (address, self._open(address, self._watchers.get(name)))

    def address_of(self, name: str) -> str:
        """Where a peer is; "" of one that is unknown."""
        with self._sending:
            return self._peers[name][0] if name in self._peers else ""

    def watch(self, name: str, watcher: Watcher) -> None:
        """Tell `watcher` whenever a connection to this peer is made or broken: a process that dies is noticed at once.

        It is called in a thread of its own, must not block, and hears of what is connected from now on.
        """
        self._watchers[name] = watcher

    def _open(self, address: str, watcher: Watcher | None) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.PUSH)
        if watcher:
            self._monitor(socket, address, watcher)
        socket.set(zmq.SNDHWM, SEND_LIMIT)
        socket.set(zmq.LINGER, 0)
        if self._key:
            socket.curve_publickey, socket.curve_secretkey = self._key
            socket.curve_serverkey = self._key.public
        socket.connect(address)
        return socket

    def _monitor(self, socket: "zmq.Socket[bytes]", address: str, watcher: Watcher) -> None:
        where = f"inproc://watch-{next(self._num_watched)}"
        socket.monitor(where, _LINK_EVENTS)
        monitor = self._context.socket(zmq.PAIR)
        monitor.connect(where)
        threading.Thread(target=_watch, args=(monitor, address, watcher), name="mesh-watch", daemon=True).start()

    def disconnect(self, name: str) -> None:
        with self._sending:
            known = self._peers.pop(name, None)
            self._watchers.pop(name, None)
            if known:
                known[1].close(0)

    def keep(self, names: set[str]) -> None:
        """Close the ways to all other peers: a socket to the dead would go on trying for ever."""
        for name in [name for name in self._peers if name not in names]:
            self.disconnect(name)

    def send(self, name: str, message: wire.Message, frame: memoryview | None = None) -> bool:
        """Queue a message. To a peer that is unknown or takes no more it is dropped, counted and logged: False."""
        header, kind = wire.encode(message), type(message).__name__
        parts: list[bytes | memoryview] = [header] if frame is None else [header, frame]
        with self._sending:
            if self._try_send(name, parts):
                self._sent.header_bytes[kind] += len(header)
                self._sent.frame_bytes[kind] += 0 if frame is None else frame.nbytes
                return True
            self.num_dropped += 1
        log.warning("message %s to %s dropped: the peer is unknown or takes no more", kind, name)
        return False

    def _try_send(self, name: str, parts: list[bytes | memoryview]) -> bool:
        known = self._peers.get(name)
        if known is None:
            return False
        try:
            known[1].send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def sent(self) -> Traffic:
        """All that was sent so far: with every message that anybody has received, and none that was dropped."""
        with self._sending:
            return Traffic(self._sent.header_bytes.copy(), self._sent.frame_bytes.copy())

    def receive(self, timeout_s: float | None = 0.0) -> Received | None:
        """The next message; None when none comes within `timeout_s` (None: wait for ever)."""
        if not self._inbox.poll(None if timeout_s is None else round(timeout_s * 1000)):
            return None
        header, *frames = self._inbox.recv_multipart(zmq.NOBLOCK, copy=False)
        try:
            message = wire.decode(header.buffer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self.num_dropped += 1
            log.warning("a message that is not ours dropped: %s", error)
            return None
        return Received(message, frames[0].buffer if frames else None)

    def close(self) -> None:
        for _, socket in self._peers.values():
            socket.close(0)
        self._peers.clear()
        self._inbox.close(0)
        if self._auth:
            self._auth.stop()
        self._context.term()

    def _authenticator(self) -> ThreadAuthenticator:
        auth = ThreadAuthenticator(self._context)
        auth.start()
        auth.configure_curve_callback("*", credentials_provider=self)
        return auth

    def callback(self, domain: str, key: bytes) -> bool:
        """ZAP: is this client key the cell's? (The name is pyzmq's.)"""
        return self._key is not None and key == self._key.public


def _watch(monitor: "zmq.Socket[bytes]", address: str, watcher: Watcher) -> None:
    """Pass on what happens to a socket until it is closed."""
    with monitor:
        while True:
            try:
                event = recv_monitor_message(monitor)["event"]
            except zmq.ContextTerminated:
                return
            if event == zmq.EVENT_MONITOR_STOPPED:
                return
            watcher(address, event == zmq.EVENT_HANDSHAKE_SUCCEEDED)
