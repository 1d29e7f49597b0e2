"""The worker actor: a process under Ray's eye around `runtime.worker`. Its one call lasts as long as it lives."""

from serve_app.cluster.node import Network, log_to_stderr
from serve_app.config import OctavoConfig
from serve_app.experts.layout import Seat
from serve_app.experts.placement import Pair
from serve_app.runtime.names import ENGINE


class WorkerActor:
    def run(
        self,
        name: str,
        config: OctavoConfig,
        seat: Seat,
        layers: range,
        pairs: list[Pair],
        network: Network,
        engine_address: str,
    ) -> None:
        """Load, say hello to the engine, and serve until stopped. Errors of loading are this call's errors."""
        # torch is for this process alone: the engine, which imports this module too, stays small without it
        from serve_app.fetch.hub import resolve
        from serve_app.fetch.progress import silent
        from serve_app.model.checkpoint import Checkpoint
        from serve_app.runtime.load import load
        from serve_app.runtime.worker import Worker

        log_to_stderr()
        weights = Checkpoint.open(resolve(config.model, silent, fetch=False))
        loaded = load(weights, config, layers, seat.shard, pairs)
        with network.mesh() as mesh:
            mesh.connect(ENGINE, engine_address)
            Worker(name, loaded, mesh).run()
