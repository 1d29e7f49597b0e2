"""The router actor: `runtime.router.Registry` behind calls for the cell, and an inbox for the workers' reports.

It is detached, as the workers are: a router that dies stops nothing, and one whose engine died waits for another.
"""

import asyncio
import os
import threading
import time

import ray

from serve_app.cluster.node import Network
from serve_app.engine.members import Formed, StageTable
from serve_app.experts.layout import Layout, Seat
from serve_app.experts.placement import Slots
from serve_app.runtime.router import Registry
from serve_app.runtime.snapshot import CellView, ProcessView
from serve_app.runtime.wire import Ping, Report

LOOK_S = 1.0


class RouterActor:
    def __init__(
        self,
        layout: Layout,
        stages: list[range],
        num_experts: int,
        slots: Slots | None,
        network: Network,
        orphan_s: float,
        seed: tuple[list[StageTable], Formed | None] | None = None,
    ) -> None:
        """`seed`: the placement and the membership that a router before this one knew."""
        self._registry = Registry(layout, stages, num_experts, slots)
        if seed is not None:
            self._registry.seed(seed[0])
            if seed[1] is not None:
                self._registry.record(seed[1])
        self._network = network
        self._mesh = network.mesh()
        self._orphan_s = orphan_s
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="router-inbox", daemon=True).start()

    async def wait(self) -> None:
        """Never returns: who waits for it learns of the router's death."""
        await asyncio.Event().wait()

    async def address(self) -> str:
        return self._mesh.address

    async def network(self) -> Network:
        return self._network

    async def settle(self, nodes: dict[Seat, str]) -> list[StageTable]:
        """The placement at full strength, a table for each stage: decided anew from the present load."""
        with self._lock:
            self._registry.settle(nodes)
            return self._registry.tables()

    async def record(self, form: Formed) -> None:
        with self._lock:
            self._registry.record(form)

    async def snapshot(self) -> CellView:
        with self._lock:
            return self._registry.snapshot(time.monotonic())

    async def process(self) -> ProcessView:
        return ProcessView("router", "router", os.getpid(), ray.get_runtime_context().get_node_id(), "live")

    def _listen(self) -> None:
        heard_s = time.monotonic()
        while time.monotonic() - heard_s < self._orphan_s:
            received = self._mesh.receive(LOOK_S)
            if received is None:
                continue
            if isinstance(received.message, Ping):
                heard_s = time.monotonic()
            if isinstance(received.message, Report):
                with self._lock:
                    self._registry.add(received.message, time.monotonic())
        os._exit(0)  # no engine is left: nobody asks any more
