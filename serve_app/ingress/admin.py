"""What an operator asks of a cell: `GET /admin/placement` says who sits where, who holds what, and how busy each is."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from serve_app.ingress.client import Engine, EngineUnavailableError
from serve_app.ingress.health import json_response
from serve_app.ingress.openapi import PLACEMENT_OPENAPI


def admin_routes(engine: Engine, max_wait_s: float) -> APIRouter:
    """The routes under `/admin`. Each answer is JSON."""
    router = APIRouter(prefix="/admin", tags=["admin"])

    @router.get("/placement", openapi_extra=PLACEMENT_OPENAPI)
    async def placement() -> Response:
        """The cell as its router knows it: seats, experts, load, memory. 503 with `reason` when it does not answer."""
        try:
            view = await asyncio.wait_for(engine.placement(), max_wait_s)
        except TimeoutError:
            return _unavailable(f"neither the engine nor its router has answered within {max_wait_s:g} s")
        except EngineUnavailableError as error:
            return _unavailable(str(error))
        return json_response(200, view)

    return router


def _unavailable(reason: str) -> Response:
    return json_response(503, {"status": "unavailable", "reason": reason})
