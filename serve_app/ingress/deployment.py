"""The ingress as a Serve deployment: the FastAPI app over a connection to the cell's engine."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve

from serve_app.cluster.cell import cause_of
from serve_app.cluster.node import log_to_stderr
from serve_app.config import OctavoConfig
from serve_app.engine.request import Emission, Request
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.ingress.api import create_app
from serve_app.ingress.client import EngineStatus, EngineUnavailableError
from serve_app.ingress.door import Limits, ModelInfo
from serve_app.model.spec import ModelSpec
from serve_app.model.tokenizer import Tokenizer
from serve_app.runtime.client import ConnectionLostError, EngineClient
from serve_app.runtime.settings import max_context_tokens
from serve_app.runtime.snapshot import CellView

SILENT_S = 5.0  # an engine not heard for this long is not live
LOST_S = 30.0  # and after this long it may have come back elsewhere


class CellEngine:
    """`Engine` over the mesh; the rare question who holds what goes by `engine`, the Serve handle of its deployment."""

    def __init__(self, client: EngineClient, page_tokens: int, engine: Any) -> None:
        self._client = client
        self._page_tokens = page_tokens
        self._engine = engine

    async def submit(self, request: Request) -> AsyncGenerator[Emission, None]:
        status = await self.status()
        if not status.live or self._client.epoch == 0:  # later than its first epoch, a cell that re-forms goes on
            raise EngineUnavailableError(status.reason)
        try:
            async with aclosing(self._client.submit(request)) as emissions:
                async for emission in emissions:
                    yield emission
        except ConnectionLostError as error:
            raise EngineUnavailableError(str(error)) from None

    async def status(self) -> EngineStatus:
        latest, age_s = self._client.latest()
        if latest is None:
            return EngineStatus(live=False, ready=False, reason="the engine has not been heard yet")
        if age_s > SILENT_S:
            return EngineStatus(live=False, ready=False, reason=f"the engine has been silent for {age_s:.0f} s")
        return EngineStatus(
            live=True, ready=latest.ready, reason=latest.reason, page_tokens=self._page_tokens, stats=latest.stats
        )

    async def placement(self) -> CellView:
        try:
            view: CellView = await self._engine.placement.remote()
        except Exception as error:  # a dead replica, a full queue, what the engine says: there is no answer
            raise EngineUnavailableError(cause_of(error)) from None
        return view


class IngressService:
    """One HTTP replica. Serve calls the constructor inside its event loop, then asks for the application."""

    async def __init__(self, config: OctavoConfig, spec: ModelSpec, created_unix_s: int, engine: Any) -> None:  # type: ignore[misc]
        log_to_stderr()
        address, network = await engine.endpoint.remote()
        name = f"ingress-{uuid.uuid4().hex[:8]}"
        self._client = EngineClient(network.mesh(), address, name)
        tokenizer = Tokenizer.load(resolve(config.model, silent, fetch=False))
        info = ModelInfo(
            name=config.served_name,
            max_context_tokens=max_context_tokens(config, spec),
            vocab_size=spec.vocab_size,
            created=created_unix_s,
        )
        limits = Limits(max_body_bytes=config.limits.max_body_bytes, max_prompts=config.limits.max_prompts)
        self._app = create_app(CellEngine(self._client, config.scheduler.page_tokens, engine), tokenizer, info, limits)

    def check_health(self) -> None:
        """Serve replaces an ingress that has lost its engine; the new one asks where the engine is now."""
        _, age_s = self._client.latest()
        if age_s > LOST_S:
            raise RuntimeError(f"the engine has not been heard for {age_s:.0f} s")

    def __del__(self) -> None:
        self._client.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


# Serve's own queue is out of the way: what is too much is for the door to say.
INGRESS_DEPLOYMENT: Any = serve.deployment(
    name="Ingress", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
)(serve.ingress()(IngressService))
