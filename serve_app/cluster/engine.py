"""The engine as a Serve deployment: one per cell. Two threads: its loop over the mesh, and the keeper of its cell."""

import asyncio
import os
import threading
from contextlib import suppress
from typing import Any

import ray
from ray import serve

from serve_app.cluster.cell import Cell, cause_of
from serve_app.cluster.kin import Names
from serve_app.cluster.node import Network, choose_network, log_to_stderr
from serve_app.config import OctavoConfig
from serve_app.engine.members import Stop
from serve_app.errors import OctavoError
from serve_app.model.spec import ModelSpec
from serve_app.runtime.calibration import Calibration, calibration_path
from serve_app.runtime.engine_loop import EngineLoop, cell_core
from serve_app.runtime.names import ENGINE
from serve_app.runtime.operations import Begun, Operation, OperationRequest
from serve_app.runtime.paces import pace_of
from serve_app.runtime.snapshot import CellView, EventView, PaceView, ProcessView

PLACEMENT_S = 5.0  # that the router may take to say what it knows
HEALTH_S = 1.0  # between two of Serve's looks: a dead engine is noticed by them
HANG_S = 5.0  # that it may take to answer one; after three in a row that it does not, a frozen one is replaced


class EngineService:
    def __init__(self, config: OctavoConfig, spec: ModelSpec) -> None:
        log_to_stderr()
        app = serve.get_replica_context().app_name
        found = Names(app, config).network()
        self._network = found or choose_network(config.network)
        self._mesh = self._network.mesh()
        self._cell = Cell(app, config, spec, self._network, self._mesh.address)
        self._config = config
        core = cell_core(config, spec)
        calibration = Calibration(core.core, spec.vocab_size, config.layout.dp, calibration_path(config, spec))
        self._core = EngineLoop(core, self._mesh, self._cell.order, config.resilience.resume_s, calibration)
        if found is not None:
            self._core.note("adopted", "a new engine goes on with the workers that are there")
        self._loop = threading.Thread(target=self._core.run, name="engine-loop", daemon=True)
        self._keeper = threading.Thread(target=self._cell.run, args=(self._core,), name="cell-keeper", daemon=True)
        self._loop.start()
        self._keeper.start()

    def endpoint(self) -> tuple[str, Network]:
        """Where an ingress replica finds this engine, and the key to speak to it."""
        return self._mesh.address, self._network

    async def placement(self) -> CellView:
        """What the router knows of the cell. OctavoError when there is none yet, or it does not answer."""
        router = self._cell.router
        if router is None:
            raise OctavoError("the cell has no router yet")
        try:
            view: CellView = await asyncio.wait_for(router.snapshot.remote(), PLACEMENT_S)
        except TimeoutError:
            raise OctavoError(f"the router has not answered within {PLACEMENT_S:g} s") from None
        except ray.exceptions.RayError as error:
            raise OctavoError(f"the router cannot be asked: {cause_of(error)}") from None
        return view

    def events(self) -> list[EventView]:
        """The cell's history since this engine began, oldest first."""
        return list(self._core.history)

    def pace(self) -> PaceView:
        """What steps have taken."""
        return pace_of(self._config, self._core.paces())

    def operate(self, asked: OperationRequest) -> Begun:
        """Take an order. It was checked at the door."""
        return self._core.operator.begin(asked)

    def operations(self) -> list[Operation]:
        """What was ordered of this engine, the newest last."""
        return self._core.operator.all()

    async def processes(self) -> list[ProcessView]:
        """Every process of the cell that is known to live."""
        node = ray.get_runtime_context().get_node_id()
        views = [ProcessView("engine", "engine", os.getpid(), node, "live"), *self._core.processes()]
        router = self._cell.router
        if router is not None:
            with suppress(TimeoutError, ray.exceptions.RayError):  # it is being replaced
                views.append(await asyncio.wait_for(router.process.remote(), PLACEMENT_S))
        return views

    def check_health(self) -> None:
        """Serve replaces an engine whose threads have ended."""
        if not (self._loop.is_alive() and self._keeper.is_alive()):
            raise RuntimeError("a thread of the engine has ended")

    def __del__(self) -> None:
        """Serve ends this engine. One that broke leaves its workers to the next."""
        if self._loop.is_alive() and self._keeper.is_alive():
            self._mesh.send(ENGINE, Stop())
            self._cell.stop()


ENGINE_DEPLOYMENT: Any = serve.deployment(
    name="Engine",
    num_replicas=1,
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=HEALTH_S,
    health_check_timeout_s=HANG_S,
)(EngineService)
