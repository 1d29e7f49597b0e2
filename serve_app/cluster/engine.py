"""The engine as a Serve deployment: one per cell. Two threads: its loop over the mesh, and the keeper of its cell."""

import asyncio
import threading
from typing import Any

import ray
from ray import serve

from serve_app.cluster.cell import Cell, cause_of
from serve_app.cluster.node import Network, choose_network, log_to_stderr
from serve_app.config import OctavoConfig
from serve_app.engine.core import EngineCore
from serve_app.errors import OctavoError
from serve_app.model.spec import ModelSpec
from serve_app.runtime.engine_loop import EngineLoop
from serve_app.runtime.names import ENGINE
from serve_app.runtime.settings import engine_config
from serve_app.runtime.snapshot import CellView
from serve_app.runtime.wire import Stop

PLACEMENT_S = 5.0  # that the router may take to say what it knows


class EngineService:
    def __init__(self, config: OctavoConfig, spec: ModelSpec) -> None:
        log_to_stderr()
        self._network = choose_network(config.network)
        self._mesh = self._network.mesh()
        self._mesh.connect(ENGINE, self._mesh.address)  # to stop its own loop
        core = EngineCore(engine_config(config, spec, config.layout.pp))
        loop = EngineLoop(core, self._mesh)
        self._loop = threading.Thread(target=loop.run, name="engine-loop", daemon=True)
        self._cell = Cell(config, spec, self._network, self._mesh.address, loop)
        self._keeper = threading.Thread(target=self._cell.run, name="cell-keeper", daemon=True)
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

    def check_health(self) -> None:
        """Serve replaces an engine whose threads have ended."""
        if not (self._loop.is_alive() and self._keeper.is_alive()):
            raise RuntimeError("a thread of the engine has ended")

    def __del__(self) -> None:
        self._mesh.send(ENGINE, Stop())
        self._cell.stop()


ENGINE_DEPLOYMENT: Any = serve.deployment(
    name="Engine", num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0}
)(EngineService)
