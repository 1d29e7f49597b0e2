"""The worker actor: a process under Ray's eye around `runtime.worker`.

It is detached: it outlives the engine that started it, and ends when it is told to, when it is killed, or when no
engine has been heard for long. A later engine finds it by its name, and adopts it.
"""

import asyncio
import logging
import os
from typing import TYPE_CHECKING, NamedTuple

import ray

from serve_app.cluster.groups import remove_group
from serve_app.cluster.node import Network, log_to_stderr
from serve_app.config import OctavoConfig
from serve_app.errors import OctavoError
from serve_app.experts.layout import Seat
from serve_app.experts.placement import Pair
from serve_app.model.spec import ModelSpec
from serve_app.runtime.names import ENGINE
from serve_app.runtime.wire import Adopt

if TYPE_CHECKING:
    from serve_app.runtime.worker import Worker

log = logging.getLogger("serve_app.worker")

LINGER_S = 5.0  # before the process ends: for Ray to carry the last words to whoever waits for them


class Adopted(NamedTuple):
    """What a worker tells a new engine's keeper. `generation`: engines that it knows of before this one, or more."""

    seat: Seat | None
    generation: int
    is_loaded: bool


class WorkerActor:
    async def run(
        self,
        name: str,
        config: OctavoConfig,
        seat: Seat | None,
        stages: list[range],
        pairs: list[Pair],
        in_haste: bool,
        network: Network,
        engine_address: str,
        group: str,
        spec: ModelSpec,
        peers: list[str],
        generation: int,
    ) -> None:
        """Load, say hello to the engine, and serve until stopped. Errors of loading are this call's errors.

        `in_haste`: streams wait for it, so that its experts are packed later. A spare's are, always.
        `group`: the name of the placement group that it lives in, which it gives back should it end as an orphan.
        `peers`: inboxes of living workers, whose memory serves where the checkpoint `spec` is of is gone from the disk.
        """
        log_to_stderr()
        self._ended = asyncio.Event()
        self._name, self._config, self._network = name, config, network
        self._seat, self._generation, self._engine_address = seat, generation, engine_address
        self._worker: Worker | None = None
        self._mesh = network.mesh()
        self._mesh.connect(ENGINE, engine_address)
        self._own = network.mesh()  # to speak to its own inbox
        self._own.connect(name, self._mesh.address)
        try:
            await asyncio.to_thread(self._work, seat, stages, pairs, in_haste or seat is None, spec, peers)
            if self._is_orphan():
                remove_group(group)  # nobody else is left to do it
        finally:
            self._ended.set()
            asyncio.get_running_loop().call_later(LINGER_S, os._exit, 0)

    def _is_orphan(self) -> bool:
        return self._worker is not None and self._worker.is_orphan

    def _work(
        self,
        seat: Seat | None,
        stages: list[range],
        pairs: list[Pair],
        in_haste: bool,
        spec: ModelSpec,
        peers: list[str],
    ) -> None:
        # torch is for this process alone: the engine, which imports this module too, stays small without it
        from serve_app.fetch.hub import resolve
        from serve_app.fetch.progress import silent
        from serve_app.model.checkpoint import Checkpoint
        from serve_app.model.moe import Weights
        from serve_app.runtime.load import Loaded, load
        from serve_app.runtime.peer_weights import PeerWeights
        from serve_app.runtime.worker import Worker

        config = self._config
        weights: Weights
        try:
            weights = Checkpoint.open(resolve(config.model, silent, fetch=False))
        except OctavoError as error:
            if not peers:
                raise
            log.warning("%s takes its weights from %d peers: %s", self._name, len(peers), error)
            weights = PeerWeights(spec, self._network.mesh(), peers)

        def load_seat(seat: Seat, pairs: list[Pair]) -> Loaded:
            return load(weights, config, stages[seat.stage], seat.shard, pairs, pack=not in_haste)

        node = ray.get_runtime_context().get_node_id()
        with self._mesh as mesh:
            orphan_s = config.resilience.orphan_s
            self._worker = Worker(self._name, load_seat, mesh, seat, pairs, node=node, orphan_s=orphan_s)
            self._worker.run()

    async def wait(self) -> None:
        """Return when the worker has ended: for an engine that did not start it."""
        await self._ended.wait()

    async def network(self) -> Network:
        return self._network

    async def is_of(self, engine_address: str) -> bool:
        """Whether this engine's word is the last that counts here."""
        return self._engine_address == engine_address

    async def adopt(self, engine_address: str, config: OctavoConfig) -> Adopted | None:
        """Say Hello to a new engine. None: it wants other workers than this one."""
        if config != self._config:
            return None
        self._generation += 1
        self._engine_address = engine_address
        self._own.send(self._name, Adopt(engine_address))
        worker = self._worker
        return Adopted(self._seat if worker is None else worker.seat, self._generation, worker is not None)
