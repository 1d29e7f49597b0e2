"""The router actor: `runtime.router.Registry` behind calls for the cell, and an inbox for the workers' load reports."""

import threading

from serve_app.cluster.node import Network
from serve_app.experts.layout import Layout, Seat
from serve_app.runtime.router import Pair, Registry
from serve_app.runtime.wire import ExpertLoad, Form


class RouterActor:
    def __init__(self, layout: Layout, stages: list[range], num_experts: int, network: Network) -> None:
        self._registry = Registry(layout, stages, num_experts)
        self._mesh = network.mesh()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="router-inbox", daemon=True).start()

    def address(self) -> str:
        return self._mesh.address

    def tables(self) -> list[list[list[int]]]:
        with self._lock:
            return self._registry.tables()

    def pairs(self) -> dict[Seat, list[Pair]]:
        with self._lock:
            return self._registry.pairs()

    def record(self, form: Form) -> None:
        with self._lock:
            self._registry.record(form)

    def snapshot(self) -> dict[str, object]:
        with self._lock:
            return self._registry.snapshot()

    def _listen(self) -> None:
        while True:
            received = self._mesh.receive(None)
            if received is not None and isinstance(received.message, ExpertLoad):
                with self._lock:
                    self._registry.add(received.message)
