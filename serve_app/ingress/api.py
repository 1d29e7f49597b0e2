"""The FastAPI application: `/generate` in two dialects, health, placement, metrics, models."""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from serve_app import __version__
from serve_app.ingress import sglang, tgi
from serve_app.ingress.admin import admin_routes
from serve_app.ingress.body import set_fields
from serve_app.ingress.call import Runner
from serve_app.ingress.client import Engine
from serve_app.ingress.docs_page import docs_routes
from serve_app.ingress.door import Door, Limits, ModelInfo
from serve_app.ingress.faults import BadInputError
from serve_app.ingress.guard import Protection, fault, protect
from serve_app.ingress.health import ask, health_routes
from serve_app.ingress.openai.routes import openai_routes
from serve_app.ingress.openapi.document import OctavoApi
from serve_app.ingress.openapi.generate import GENERATE_OPENAPI
from serve_app.ingress.openapi.operators import METRICS_OPENAPI
from serve_app.ingress.operations import abort_routes, operation_routes
from serve_app.ingress.serving import Dialect, Service
from serve_app.ingress.terms import Policy
from serve_app.model.tokenizer import Tokenizer
from serve_app.telemetry.ledger import Book
from serve_app.telemetry.metrics import Objective, ServingMetrics
from serve_app.telemetry.traces import trace_requests


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    model: ModelInfo,
    limits: Limits | None = None,
    *,
    names_answers: bool = True,
    book: Book | None = None,
    objective: Objective | None = None,
    protection: Protection | None = None,
    policy: Policy | None = None,
) -> FastAPI:
    """The application. It holds no connection of its own: `engine` is all it talks to.

    `names_answers`: answers of `/generate` carry the request's name as `x-request-id`. Serve adds that header itself.
    `book`: this replica's share in the metrics' ledger. `objective`: what is promised, for the metrics to judge by.
    `policy`: what requests may ask for in their headers, and how they are refused.
    `protection`: keys, and limits of what one connection may do. Raises ConfigError where its keys cannot be read.
    """
    limits = limits or Limits()
    metrics = ServingMetrics(model.name, model.max_context_tokens, book=book, objective=objective)
    door = Door(tokenizer, model, limits)
    policy = policy or Policy()
    app = OctavoApi(model, policy.slo, title="Octavo", version=__version__, docs_url=None, redoc_url=None)
    service = Service(door, Runner(engine, tokenizer, metrics), names_answers, policy)
    app.include_router(_generate_route(service))
    app.include_router(openai_routes(service))
    app.include_router(health_routes(engine, limits.max_status_wait_s))
    app.include_router(admin_routes(engine, limits.max_placement_wait_s))
    app.include_router(operation_routes(engine, limits.max_placement_wait_s))
    app.include_router(abort_routes(engine, limits.max_status_wait_s))
    app.include_router(_info_routes(engine, metrics, limits.max_status_wait_s))
    app.include_router(docs_routes())
    app.add_exception_handler(HTTPException, _http_fault)
    app.add_exception_handler(RequestValidationError, _parameter_fault)
    app.add_exception_handler(Exception, _internal_fault)
    protect(app, protection or Protection())
    trace_requests(app, model.name)
    return app


def _generate_route(service: Service) -> APIRouter:
    router = APIRouter(tags=["generate"])

    @router.post("/generate", openapi_extra=GENERATE_OPENAPI)
    async def generate(request: Request) -> Response:
        """Generate text. `text`, `input_ids` or `messages` speak SGLang's dialect, `inputs` TGI's."""
        return await service.generate(request, sglang, _dialect)

    return router


def _dialect(body: bytes) -> Dialect:
    """The dialect whose prompt is there. Raises BadInputError when it is none or both."""
    fields = set_fields(body)
    if not fields & tgi.PROMPT_FIELDS:
        return sglang
    clash = fields & sglang.PROMPT_FIELDS
    if clash:
        names = " and ".join(sorted(clash | (fields & tgi.PROMPT_FIELDS)))
        raise BadInputError(names, "two dialects in one request; send one of them")
    return tgi


def _info_routes(engine: Engine, metrics: ServingMetrics, max_wait_s: float) -> APIRouter:
    router = APIRouter(tags=["info"])

    @router.get("/metrics", response_class=PlainTextResponse, openapi_extra=METRICS_OPENAPI)
    async def scrape() -> Response:
        """Prometheus text format."""
        status, _ = await asyncio.gather(ask(engine, max_wait_s), metrics.refresh())
        return Response(
            metrics.render(status.stats, status.page_tokens, epoch=status.epoch, cell=status.cell),
            media_type=CONTENT_TYPE_LATEST,
        )

    return router


async def _http_fault(request: Request, error: Exception) -> Response:
    """An unknown path or method. (It has the parameter type that Starlette's registry wants.)"""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return _fault(request, error.status_code, message, error.headers)


async def _parameter_fault(request: Request, error: Exception) -> Response:
    """A parameter in the address that cannot be read."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _fault(request, 422, f"{'.'.join(map(str, first['loc']))}: {first['msg'][:1].lower()}{first['msg'][1:]}")


async def _internal_fault(request: Request, error: Exception) -> Response:
    """A fault of ours. The traceback goes to the log, not to the client."""
    return _fault(request, 500, "internal error")


def _fault(request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """In the words of the dialect that the path belongs to."""
    kind = HTTPStatus(status).phrase.title().replace(" ", "")
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    return Response(fault(path, status, message, kind), status, headers, media_type="application/json")
