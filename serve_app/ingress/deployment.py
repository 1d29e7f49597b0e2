"""The ingress as a Serve deployment: the FastAPI app over a connection to the cell's engine."""

import math
import os
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
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
from serve_app.ingress.faults import AbortedError, RefusedError, TakenOverError
from serve_app.ingress.guard import Protection
from serve_app.ingress.terms import Policy
from serve_app.model.spec import ModelSpec
from serve_app.model.tokenizer import Tokenizer
from serve_app.runtime import client as runtime
from serve_app.runtime.client import EngineClient
from serve_app.runtime.operations import Begun, Operation, OperationRequest
from serve_app.runtime.settings import max_context_tokens
from serve_app.runtime.snapshot import CellView, EventView, PaceView, ProcessView
from serve_app.telemetry.metrics import Objective

HOLD_S = 10.0  # new traffic is welcome for so long without an engine: it waits for the next one


class CellEngine:
    """`Engine` over the mesh; the rare question who holds what goes by `engine`, the Serve handle of its deployment."""

    def __init__(self, client: EngineClient, page_tokens: int, engine: Any) -> None:
        self._client = client
        self._page_tokens = page_tokens
        self._engine = engine

    async def submit(self, request: Request) -> AsyncGenerator[Emission, None]:
        if self._client.epoch == 0:  # later than its first epoch, a cell goes on whatever becomes of its engine
            raise EngineUnavailableError((await self.status()).reason)
        try:
            async with aclosing(self._client.submit(request)) as emissions:
                async for emission in emissions:
                    yield emission
        except runtime.ConnectionLostError as error:
            raise EngineUnavailableError(str(error)) from None
        except runtime.TakenOverError as error:
            raise TakenOverError(str(error)) from None
        except runtime.EndedByNameError as error:
            raise AbortedError(str(error)) from None
        except runtime.NotLetInError as error:
            refusal = error.refusal
            raise RefusedError(refusal.reason, refusal.text, refusal.retry_after_s) from None

    async def abort(self, name: str, tenant: str | None = None) -> None:
        self._client.abort(name, tenant)

    async def status(self) -> EngineStatus:
        latest, _ = self._client.latest()
        if latest is None:
            return EngineStatus(live=False, ready=False, reason="the engine has not been heard yet")
        why, away_s = self._client.absence()
        if why:
            reason = f"the engine is being replaced, for {away_s:.0f} s now: {why}"
            return EngineStatus(live=False, ready=latest.ready and away_s < HOLD_S, reason=reason)
        return EngineStatus(
            live=True,
            ready=latest.ready,
            reason=latest.reason,
            page_tokens=self._page_tokens,
            stats=latest.stats,
            epoch=latest.epoch,
            cell=latest.cell,
        )

    async def operate(self, asked: OperationRequest) -> Begun:
        begun: Begun = await _answer(self._engine.operate, asked)
        return begun

    async def operations(self) -> list[Operation]:
        operations: list[Operation] = await _answer(self._engine.operations)
        return operations

    async def placement(self) -> CellView:
        view: CellView = await _answer(self._engine.placement)
        return view

    async def events(self) -> list[EventView]:
        events: list[EventView] = await _answer(self._engine.events)
        return events

    async def pace(self) -> PaceView:
        view: PaceView = await _answer(self._engine.pace)
        return view

    async def processes(self) -> list[ProcessView]:
        processes: list[ProcessView] = await _answer(self._engine.processes)
        return processes


async def _answer(method: Any, *arguments: Any) -> Any:
    """Of a method of the engine's deployment."""
    try:
        return await method.remote(*arguments)
    except Exception as error:  # a dead replica, a full queue, what the engine says: there is no answer
        raise EngineUnavailableError(cause_of(error)) from None


class IngressService:
    """One HTTP replica. Serve calls the constructor inside its event loop, then asks for the application."""

    async def __init__(self, config: OctavoConfig, spec: ModelSpec, created_unix_s: int, engine: Any) -> None:  # type: ignore[misc]
        log_to_stderr()
        _, network = await engine.endpoint.remote()
        self._engine, self._network = engine, network
        self._is_stranded = False
        name = f"ingress-{uuid.uuid4().hex[:8]}"
        node = ray.get_runtime_context().get_node_id()
        self._client = EngineClient(network.mesh(), self._address, name, os.getpid(), node)
        tokenizer = Tokenizer.load(resolve(config.model, silent, fetch=False))
        info = ModelInfo(
            name=config.served_name,
            max_context_tokens=max_context_tokens(config, spec),
            vocab_size=spec.vocab_size,
            created=created_unix_s,
        )
        limits = Limits(max_body_bytes=config.limits.max_body_bytes, max_prompts=config.limits.max_prompts)
        objective = Objective(config.slo.ttft_s, config.slo.alert_at_s or math.inf)
        cell = CellEngine(self._client, config.scheduler.page_tokens, engine)
        self._app = create_app(
            cell,
            tokenizer,
            info,
            limits,
            names_answers=False,
            book=self._client.book,
            objective=objective,
            protection=Protection.of(config),
            policy=Policy(config.slo),
        )

    def check_health(self) -> None:
        """Serve replaces an ingress that is broken itself. Without an engine it is not: its streams wait for one."""
        if self._is_stranded:
            raise RuntimeError("the cell was begun anew, with another key")
        if not self._client.is_alive:
            raise RuntimeError("the connection to the engine has ended")

    async def _address(self) -> str:
        """Where the engine is now. The key is the cell's: it changes only if nobody of a cell was left."""
        address, network = await self._engine.endpoint.remote()
        self._is_stranded = network != self._network
        return str(address)

    def __del__(self) -> None:
        self._client.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


# Serve's own queue is out of the way: what is too much is for the door to say.
INGRESS_DEPLOYMENT: Any = serve.deployment(
    name="Ingress", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
)(serve.ingress()(IngressService))
