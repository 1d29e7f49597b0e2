"""What an operator asks of a cell: who sits where and holds what, what has happened, which processes there are, and
what its steps take."""

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from serve_app.ingress.client import Engine, EngineUnavailableError
from serve_app.ingress.guard import require_admin
from serve_app.ingress.health import json_response
from serve_app.ingress.openapi.operators import EVENTS_OPENAPI, PACE_OPENAPI, PLACEMENT_OPENAPI, PROCESSES_OPENAPI

_After = Annotated[float, Query(description="Unix seconds: only what happened later")]


def admin_routes(engine: Engine, max_wait_s: float) -> APIRouter:
    """The routes under `/admin`. Each answer is JSON; 503 with `reason` where the cell cannot be asked."""
    router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(require_admin)])

    async def answer(asked: Awaitable[Any], who: str = "the engine has not") -> Response:
        try:
            return json_response(200, await asyncio.wait_for(asked, max_wait_s))
        except TimeoutError:
            return _unavailable(f"{who} answered within {max_wait_s:g} s")
        except EngineUnavailableError as error:
            return _unavailable(str(error))

    @router.get("/placement", openapi_extra=PLACEMENT_OPENAPI)
    async def placement() -> Response:
        """The cell as its router knows it: seats, experts, load, memory. 503 with `reason` when it does not answer."""
        return await answer(engine.placement(), "neither the engine nor its router has")

    @router.get("/events", openapi_extra=EVENTS_OPENAPI)
    async def events(after: _After = 0.0) -> Response:
        """What has happened to the cell, the newest last: losses, epochs, what each failover took."""
        return await answer(_events(engine, after))

    @router.get("/pace", openapi_extra=PACE_OPENAPI)
    async def pace() -> Response:
        """What the cell's steps take: those that the engine remembers, and the four costs that it foresees with."""
        return await answer(engine.pace())

    @router.get("/processes", openapi_extra=PROCESSES_OPENAPI)
    async def processes() -> Response:
        """The processes of the cell: role, name, pid, node, state."""
        return await answer(_processes(engine))

    return router


async def _events(engine: Engine, after: float) -> dict[str, Any]:
    return {"events": [event for event in await engine.events() if event.at_unix_s > after]}


async def _processes(engine: Engine) -> dict[str, Any]:
    return {"processes": await engine.processes()}


def _unavailable(reason: str) -> Response:
    return json_response(503, {"status": "unavailable", "reason": reason})
