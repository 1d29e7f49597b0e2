"""Operations between threads: others order and ask, the engine's loop carries out."""

import threading
import time
import uuid

from serve_app.engine.cell import CellCore
from serve_app.runtime.operations import Act, Begun, Facts, Operation, OperationRequest, Operations

_SEATED = frozenset({"serving", "hosting"})


class Operator:
    """`Operations` behind a lock. None of its calls waits for anything else."""

    def __init__(self) -> None:
        self._operations = Operations()
        self._lock = threading.Lock()

    def begin(self, asked: OperationRequest) -> Begun:
        """Raises ValueError when the order cannot be meant."""
        with self._lock:
            return self._operations.begin(asked, uuid.uuid4().hex[:12], time.time())

    def all(self) -> list[Operation]:
        with self._lock:
            return self._operations.all()

    def look(self, cell: CellCore, router: str) -> list[Act]:
        """What is to be done now. Called by the engine's loop, ten times a second; cheap where nothing was ordered."""
        with self._lock:
            if self._operations.active is None:
                return []
            return self._operations.observe(facts_of(cell, router), time.time())


def facts_of(cell: CellCore, router: str) -> Facts:
    """`router`: its address. O(workers + experts)."""
    work, members = cell.core.stats(), cell.members.stats()
    states = cell.members.states()
    return Facts(
        open_requests=work.running + work.waiting,
        workers=[name for name, (_, state) in states.items() if state in _SEATED],
        num_serving=members.workers["serving"],
        num_seats=cell.members.num_seats,
        router=router,
        phase=members.phase,
        reason=members.reason,
    )
