"""Health that tells the truth: `/livez` the process, `/readyz` whether new traffic is welcome, `/health` why."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from serve_app.ingress.client import Engine, EngineStatus, EngineUnavailableError
from serve_app.ingress.openapi.operators import HEALTH_OPENAPI, LIVEZ_OPENAPI, READYZ_OPENAPI


async def ask(engine: Engine, max_wait_s: float) -> EngineStatus:
    """The engine's status; one that does not answer is not live, with the reason."""
    try:
        return await asyncio.wait_for(engine.status(), max_wait_s)
    except TimeoutError:
        return EngineStatus(live=False, ready=False, reason=f"the engine has not answered within {max_wait_s:g} s")
    except EngineUnavailableError as error:
        return EngineStatus(live=False, ready=False, reason=str(error))


def health_routes(engine: Engine, max_wait_s: float) -> APIRouter:
    """The three routes. Each answer is JSON."""
    router = APIRouter(tags=["health"])

    @router.get("/livez", openapi_extra=LIVEZ_OPENAPI)
    async def livez() -> Response:
        """200 as long as this process serves."""
        return json_response(200, {"status": "live"})

    @router.get("/readyz", openapi_extra=READYZ_OPENAPI)
    async def readyz() -> Response:
        """200 when new traffic is welcome. It may be for a while without an engine: it waits for the next one."""
        status = await ask(engine, max_wait_s)
        if status.ready:
            return json_response(200, {"status": "ready"})
        return json_response(503, {"status": "not ready", "reason": status.reason})

    @router.get("/health", openapi_extra=HEALTH_OPENAPI)
    async def health() -> Response:
        """The engine's own account, and what is missing at once. 503 when it is not there and none is awaited."""
        status = await ask(engine, max_wait_s)
        word = _word(status)
        return json_response(503 if word == "unreachable" else 200, {"status": word, **_detail(status)})

    return router


def _word(status: EngineStatus) -> str:
    if status.ready:
        return "degraded" if status.reason else "ready"
    return "not ready" if status.live else "unreachable"


def _detail(status: EngineStatus) -> dict[str, Any]:
    detail: dict[str, Any] = msgspec.to_builtins(status)
    return detail


def json_response(status: int, content: Any) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
