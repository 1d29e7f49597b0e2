"""The FastAPI application: `/generate` in two dialects, health, placement, metrics, models."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from serve_app import __version__
from serve_app.errors import OctavoError
from serve_app.ingress import sglang, tgi
from serve_app.ingress.admin import admin_routes
from serve_app.ingress.body import read_body, set_fields
from serve_app.ingress.call import Call, Runner
from serve_app.ingress.client import Engine
from serve_app.ingress.door import Door, Limits, ModelInfo
from serve_app.ingress.faults import BadInputError
from serve_app.ingress.health import ask, health_routes, json_response
from serve_app.ingress.openapi import GENERATE_OPENAPI, OctavoApi
from serve_app.ingress.sse import ClientGoneError, EventStream, Ticket, sse_event, unless_gone
from serve_app.model.tokenizer import Tokenizer
from serve_app.telemetry.metrics import ServingMetrics

T = TypeVar("T")

_PARSE_IN_THREAD_BYTES = (
    1 << 15
)  # a body over this takes milliseconds to read and tokenize: other streams must not wait
_CLIENT_GONE = 499  # nobody reads it


class Dialect(Protocol):
    """A way to speak `POST /generate`. The modules `sglang` and `tgi` are two."""

    def parse(self, body: bytes, door: Door, ticket: Ticket) -> Call: ...

    def fault(self, error: OctavoError) -> tuple[int, bytes]: ...


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    model: ModelInfo,
    limits: Limits | None = None,
    *,
    names_answers: bool = True,
) -> FastAPI:
    """The application. It holds no connection of its own: `engine` is all it talks to.

    `names_answers`: answers of `/generate` carry the request's name as `x-request-id`. Serve adds that header itself.
    """
    limits = limits or Limits()
    metrics = ServingMetrics(model.name, model.max_context_tokens)
    door = Door(tokenizer, model, limits)
    app = OctavoApi(title="Octavo", version=__version__, docs_url=None, redoc_url=None)  # those pages need a CDN
    app.include_router(_generate_route(door, Runner(engine, tokenizer, metrics), names_answers=names_answers))
    app.include_router(health_routes(engine, limits.max_status_wait_s))
    app.include_router(admin_routes(engine, limits.max_placement_wait_s))
    app.include_router(_info_routes(engine, model, metrics, limits.max_status_wait_s))
    app.add_exception_handler(HTTPException, _http_fault)
    app.add_exception_handler(Exception, _internal_fault)
    return app


def _generate_route(door: Door, runner: Runner, *, names_answers: bool) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/generate", openapi_extra=GENERATE_OPENAPI)
    async def generate(request: Request) -> Response:
        """Generate text. `text`, `input_ids` or `messages` speak SGLang's dialect, `inputs` TGI's."""
        dialect: Dialect = sglang
        headers: dict[str, str] = {}
        try:
            body = await read_body(request, door.limits.max_body_bytes)
            dialect = _dialect(await _read(body, set_fields))
            call = await _read(body, dialect.parse, door, _ticket(request))
            headers = _headers(call) if names_answers else {}
            if call.stream:
                return _stream(runner, dialect, call, headers)
            outputs = await unless_gone(request.receive, runner.answer(call))
            return Response(call.answer(outputs), headers=headers, media_type="application/json")
        except OctavoError as error:
            return _refusal(dialect, error, headers)
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=_CLIENT_GONE)

    return router


def _ticket(request: Request) -> Ticket:
    """An empty header is none: that is how a browser says that it has no last event."""
    return Ticket(request.headers.get("x-request-id") or None, request.headers.get("last-event-id") or None)


def _headers(call: Call) -> dict[str, str]:
    """A name that is no header value came with the body: the client has it."""
    return {"x-request-id": call.name} if call.name.isascii() and call.name.isprintable() else {}


async def _read(body: bytes, read: Callable[..., T], *rest: Any) -> T:
    """`read(body, *rest)`, beside the event loop where the body is large."""
    if len(body) > _PARSE_IN_THREAD_BYTES:
        return await asyncio.to_thread(read, body, *rest)
    return read(body, *rest)


def _dialect(fields: set[str]) -> Dialect:
    """The dialect whose prompt is there. Raises BadInputError when it is none or both."""
    if not fields & tgi.PROMPT_FIELDS:
        return sglang
    clash = fields & sglang.PROMPT_FIELDS
    if clash:
        names = " and ".join(sorted(clash | (fields & tgi.PROMPT_FIELDS)))
        raise BadInputError(names, "two dialects in one request; send one of them")
    return tgi


def _stream(runner: Runner, dialect: Dialect, call: Call, headers: dict[str, str]) -> Response:
    return EventStream(
        runner.run(call, call.events),
        call.end,
        headers,
        refuse=lambda error: _refusal(dialect, error, headers),
        report=lambda error: sse_event(dialect.fault(error)[1]),
    )


def _refusal(dialect: Dialect, error: OctavoError, headers: dict[str, str]) -> Response:
    status, body = dialect.fault(error)
    return Response(body, status, headers, media_type="application/json")


def _info_routes(engine: Engine, model: ModelInfo, metrics: ServingMetrics, max_wait_s: float) -> APIRouter:
    router = APIRouter(tags=["info"])
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "octavo",
        "max_model_len": model.max_context_tokens,
    }

    @router.get("/v1/models")
    async def models() -> Response:
        """The one model that this server serves, as OpenAI lists models."""
        return json_response(200, {"object": "list", "data": [card]})

    @router.get("/metrics")
    async def scrape() -> Response:
        """Prometheus text format."""
        status = await ask(engine, max_wait_s)
        return Response(
            metrics.render(status.stats, status.page_tokens, epoch=status.epoch, cell=status.cell),
            media_type=CONTENT_TYPE_LATEST,
        )

    return router


async def _http_fault(request: Request, error: Exception) -> Response:
    """An unknown path or method. (It has the parameter type that Starlette's registry wants.)"""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    response = json_response(error.status_code, {"error": {"message": message, "code": error.status_code}})
    response.headers.update(error.headers or {})
    return response


async def _internal_fault(request: Request, error: Exception) -> Response:
    """A fault of ours. The traceback goes to the log, not to the client."""
    return json_response(500, {"error": {"message": "internal error", "type": "InternalServerError", "code": 500}})
