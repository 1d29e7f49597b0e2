"""What an operator may order of a cell: drain it, resume it, drill it. One at a time, each with an id and an end.

No threads, no clock: `begin` takes an order, `observe` is shown the cell's state again and again and says what is to be
done. The same order twice is one operation, so that a client that got no answer may ask again.
"""

import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import msgspec

MAX_OPERATIONS = 100  # that are remembered; the oldest is forgotten first, but never the active one
MAX_ID_CHARS = 64
MAX_TIMEOUT_S = 86_400.0
MAX_SEED = 2**64 - 1
TIMEOUT_S = {"drain": 3600.0, "resume": 60.0, "drill": 600.0}

Kind = Literal["drain", "resume", "drill"]
Role = Literal["", "worker", "router"]
Phase = Literal["pending", "running", "done", "failed"]


class OperationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order, as it comes in. Without an id of the client's own it gets one."""

    kind: Kind
    id: str = ""
    role: Role = ""  # drill: whom to kill; a worker if nothing is said
    seed: int = 0  # drill: which of them
    timeout_s: float = 0.0  # after this long it has failed; 0: as `TIMEOUT_S` says

    def completed(self) -> "OperationRequest":
        """With its defaults put in. Raises ValueError with a sentence about what cannot be meant."""
        if len(self.id) > MAX_ID_CHARS or not (self.id.isascii() and self.id.isprintable()) or "/" in self.id:
            raise ValueError(f"id: up to {MAX_ID_CHARS} printable ASCII characters without a slash")
        if not 0 <= self.timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s: 0 to {MAX_TIMEOUT_S:g}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError("seed: a 64-bit unsigned integer")
        if self.kind != "drill" and (self.role or self.seed):
            raise ValueError(f"{'role' if self.role else 'seed'}: only of a drill")
        role: Role = (self.role or "worker") if self.kind == "drill" else ""
        return msgspec.structs.replace(self, role=role, timeout_s=self.timeout_s or TIMEOUT_S[self.kind])


class Operation(msgspec.Struct, frozen=True):
    """What has become of an order, as `GET /admin/operations` tells it."""

    id: str
    kind: Kind
    phase: Phase
    effective_workers: int  # that serve now
    pending_workers: int  # that are to serve once it is done
    started_unix_s: float
    timeout_s: float
    ended_unix_s: float | None = None
    error: str = ""  # why it failed
    detail: str = ""  # while it runs: what is awaited
    role: Role = ""  # of a drill
    seed: int = 0  # of a drill
    target: str = ""  # of a drill: who was killed

    @property
    def is_active(self) -> bool:
        return self.ended_unix_s is None


class Begun(msgspec.Struct, frozen=True):
    """The answer to an order. In a conflict `operation` is the one that stands in the way."""

    outcome: Literal["new", "same", "conflict"]
    operation: Operation


class Facts(msgspec.Struct, frozen=True):
    """The cell at a moment, as far as operations depend on it."""

    open_requests: int  # running and waiting
    workers: list[str]  # that have a seat
    num_serving: int
    num_seats: int
    router: str  # its address: another router has another
    phase: str  # as in `CellStats`
    reason: str


class Drain(msgspec.Struct, frozen=True):
    """Begin to refuse new requests, or stop that."""

    on: bool


class Strike(msgspec.Struct, frozen=True):
    """Kill this process. `name` is "" where the role has but one."""

    role: Role
    name: str


class Say(msgspec.Struct, frozen=True):
    """A line for the cell's history."""

    text: str


Act = Drain | Strike | Say


class Operations:
    """All that were ordered of one engine. `is_draining` stays set when a drain is done, until a resume."""

    def __init__(self) -> None:
        self.is_draining = False
        self._all: OrderedDict[str, Operation] = OrderedDict()
        self._active = ""  # id

    @property
    def active(self) -> Operation | None:
        return self._all.get(self._active)

    def get(self, name: str) -> Operation | None:
        return self._all.get(name)

    def all(self) -> list[Operation]:
        """The newest last."""
        return [*self._all.values()]

    def begin(self, asked: OperationRequest, new_id: str, now_unix_s: float) -> Begun:
        """Take an order, or find the operation that it already is. `new_id`: for an order that has none.

        Raises ValueError when it cannot be meant. A resume ends a drain that still waits: otherwise one that waits for
        a long answer could not be undone.
        """
        asked = asked.completed()
        known = self._all.get(asked.id) if asked.id else self.active
        if known is not None and _is_same(known, asked):
            return Begun("same", known)
        if asked.id and known is not None:
            return Begun("conflict", known)
        active = self.active
        if active is not None:
            if (active.kind, asked.kind) != ("drain", "resume"):
                return Begun("conflict", active)
            self._end(active, now_unix_s, "a resume was ordered before it was done")
        return Begun("new", self._add(asked, new_id, now_unix_s))

    def observe(self, facts: Facts, now_unix_s: float) -> list[Act]:
        """Look at the cell, and say what is to be done. Call it a few times a second."""
        operation = self.active
        if operation is None:
            return []
        if operation.phase == "pending":
            return list(self._start(operation, facts, now_unix_s))
        self._judge(operation, facts, now_unix_s)
        ended = self._all[operation.id]
        return [] if ended.is_active else [Say(_epitaph(ended))]

    # -- from order to end ----------------------------------------------------------------------------------------

    def _add(self, asked: OperationRequest, new_id: str, now_unix_s: float) -> Operation:
        operation = Operation(
            id=asked.id or new_id,
            kind=asked.kind,
            phase="pending",
            effective_workers=0,
            pending_workers=0,
            started_unix_s=now_unix_s,
            timeout_s=asked.timeout_s,
            role=asked.role,
            seed=asked.seed,
        )
        if len(self._all) == MAX_OPERATIONS:
            self._all.popitem(last=False)  # ended: only the newest can be active, and none is
        self._all[operation.id] = operation
        self._active = operation.id
        return operation

    def _start(self, operation: Operation, facts: Facts, now_unix_s: float) -> Iterator[Act]:
        target = ""
        if operation.kind == "drill":
            target = _victim(operation, facts)
            if facts.phase != "whole" or not target:
                why = f"the cell is not whole: {facts.reason or facts.phase}" if target else "there is nobody to kill"
                self._update(operation, facts)
                self._end(self._all[operation.id], now_unix_s, why)
                yield Say(_epitaph(self._all[operation.id]))
                return
            yield Strike(operation.role, target if operation.role == "worker" else "")
        else:
            self.is_draining = operation.kind == "drain"
            yield Drain(self.is_draining)
        running = msgspec.structs.replace(operation, phase="running", target=target)
        self._update(running, facts)
        yield Say(f"{_title(running)} has begun")

    def _judge(self, operation: Operation, facts: Facts, now_unix_s: float) -> None:
        self._update(operation, facts)
        operation = self._all[operation.id]
        if _is_done(operation, facts):
            self._end(operation, now_unix_s)
        elif now_unix_s - operation.started_unix_s > operation.timeout_s:
            self._end(operation, now_unix_s, f"not done within {operation.timeout_s:g} s: {operation.detail}")

    def _update(self, operation: Operation, facts: Facts) -> None:
        is_empty = self.is_draining and facts.open_requests == 0
        self._all[operation.id] = msgspec.structs.replace(
            operation,
            effective_workers=0 if is_empty else facts.num_serving,
            pending_workers=0 if operation.kind == "drain" else facts.num_seats,
            detail=_awaited(operation, facts),
        )

    def _end(self, operation: Operation, now_unix_s: float, error: str = "") -> None:
        self._all[operation.id] = msgspec.structs.replace(
            operation, phase="failed" if error else "done", ended_unix_s=now_unix_s, error=error, detail=""
        )
        self._active = ""


def _is_same(known: Operation, asked: OperationRequest) -> bool:
    mine = (known.kind, known.role, known.seed, known.timeout_s)
    return mine == (asked.kind, asked.role, asked.seed, asked.timeout_s)


def _victim(operation: Operation, facts: Facts) -> str:
    """Drawn from the seed; "" if there is none."""
    if operation.role == "router":
        return facts.router
    workers = sorted(facts.workers)
    return random.Random(f"drill {operation.seed}").choice(workers) if workers else ""


def _is_done(operation: Operation, facts: Facts) -> bool:
    match operation.kind:
        case "drain":
            return facts.open_requests == 0
        case "resume":
            return True
        case "drill":
            return _is_gone(operation, facts) and facts.phase == "whole"


def _is_gone(operation: Operation, facts: Facts) -> bool:
    """Whether the victim is dead and, if it is the router, has a successor."""
    if operation.role == "router":
        return facts.router not in {"", operation.target}
    return operation.target not in facts.workers


def _awaited(operation: Operation, facts: Facts) -> str:
    if operation.kind == "drain":
        return f"{facts.open_requests} requests are running or waiting"
    if operation.kind == "drill" and not _is_gone(operation, facts):
        return f"the end of {operation.target}" if operation.target else ""
    return facts.reason


def _title(operation: Operation) -> str:
    of = f" of {operation.target}" if operation.target else ""
    return f"{operation.kind} {operation.id}{of}"


def _epitaph(operation: Operation) -> str:
    return f"{_title(operation)} has failed: {operation.error}" if operation.error else f"{_title(operation)} is done"
