"""The router actor: `runtime.router.Registry` behind calls for the cell, and an inbox for the workers' reports."""

import threading
import time

from serve_app.cluster.node import Network
from serve_app.experts.layout import Layout, Seat
from serve_app.experts.placement import Pair, Slots
from serve_app.runtime.router import Registry
from serve_app.runtime.snapshot import CellView
from serve_app.runtime.wire import Form, Report, StageTable


class RouterActor:
    def __init__(
        self, layout: Layout, stages: list[range], num_experts: int, slots: Slots | None, network: Network
    ) -> None:
        self._registry = Registry(layout, stages, num_experts, slots)
        self._mesh = network.mesh()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="router-inbox", daemon=True).start()

    def address(self) -> str:
        return self._mesh.address

    def settle(self, nodes: dict[Seat, str]) -> tuple[list[StageTable], dict[Seat, list[Pair]]]:
        """The tables of the next epoch, one per stage, and what the worker of each seat is to hold."""
        with self._lock:
            self._registry.settle(nodes)
            return self._registry.tables(), self._registry.pairs()

    def record(self, form: Form) -> None:
        with self._lock:
            self._registry.record(form)

    def snapshot(self) -> CellView:
        with self._lock:
            return self._registry.snapshot(time.monotonic())

    def _listen(self) -> None:
        while True:
            received = self._mesh.receive(None)
            if received is not None and isinstance(received.message, Report):
                with self._lock:
                    self._registry.add(received.message, time.monotonic())
