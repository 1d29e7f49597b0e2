"""What an operator, or a client, orders: `/admin/operations`, and `POST /abort_request` as SGLang has it."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve_app.ingress.body import decode, read_body
from serve_app.ingress.client import Engine, EngineUnavailableError
from serve_app.ingress.faults import BadInputError, BodyTooLargeError
from serve_app.ingress.guard import Caller, require_admin
from serve_app.ingress.health import json_response
from serve_app.ingress.openapi.operators import (
    OPERATE_OPENAPI,
    OPERATION_OPENAPI,
    OPERATIONS_OPENAPI,
    SILENT,
    TOO_LARGE,
)
from serve_app.ingress.openapi.problems import fault_answers
from serve_app.ingress.openapi.schemas import Schema, schema_of
from serve_app.ingress.openapi.words import request_body
from serve_app.runtime.operations import Operation, OperationRequest

T = TypeVar("T")
B = TypeVar("B")

MAX_BODY_BYTES = 1 << 16
_CLIENT_GONE = 499  # nobody reads it


class AbortFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SGLang's body of `/abort_request`. `abort_message` is taken and goes nowhere."""

    rid: str | None = None
    abort_all: bool = False
    abort_message: str | None = None


def operation_routes(engine: Engine, max_wait_s: float) -> APIRouter:
    """Orders to a cell, for admins. Each is an operation with an id; the same order twice is the same operation."""
    router = APIRouter(prefix="/admin/operations", tags=["admin"], dependencies=[Depends(require_admin)])

    @router.post("", status_code=202, openapi_extra=OPERATE_OPENAPI)
    async def operate(request: Request) -> Response:
        """Drain, resume or drill the cell. 202: it has begun; 200: it had; 409: another one stands in the way."""
        try:
            asked = await _read(request, OperationRequest)
            begun = await _answered(engine.operate(_complete(asked)), max_wait_s)
        except _FaultError as fault:
            return fault.response
        if begun.outcome == "conflict":
            return _conflict(begun.operation)
        return json_response(202 if begun.outcome == "new" else 200, begun.operation)

    @router.get("", openapi_extra=OPERATIONS_OPENAPI)
    async def operations() -> Response:
        """The last hundred, the newest last. A new engine has none."""
        try:
            return json_response(200, {"operations": await _answered(engine.operations(), max_wait_s)})
        except _FaultError as fault:
            return fault.response

    @router.get("/{name}", openapi_extra=OPERATION_OPENAPI)
    async def operation(name: str) -> Response:
        """One of them, by its id."""
        try:
            for known in await _answered(engine.operations(), max_wait_s):
                if known.id == name:
                    return json_response(200, known)
        except _FaultError as fault:
            return fault.response
        return _error(404, "no operation of this id is known", "NotFound")

    return router


def abort_routes(engine: Engine, max_wait_s: float) -> APIRouter:
    """Ending requests by the names that clients gave them."""
    router = APIRouter(tags=["generate"])

    @router.post("/abort_request", response_class=Response, openapi_extra=_ABORT_OPENAPI)
    async def abort_request(request: Request) -> Response:
        """End the caller's request of the name `rid`, wherever it runs; 200 also if there is none.

        `abort_all` ends everybody's, and is for admins.
        """
        caller: Caller = request.state.caller
        tenant = None if caller.is_admin else caller.tenant
        try:
            asked = await _read(request, AbortFields)
            if asked.abort_all and not caller.is_admin:
                raise HTTPException(403, "abort_all needs an admin's key")
            if not asked.abort_all and not asked.rid:
                raise _FaultError(_error(400, "rid: a request's name is needed, or abort_all", "BadRequest"))
            await _answered(engine.abort("" if asked.abort_all else asked.rid or "", tenant), max_wait_s)
        except _FaultError as fault:
            return fault.response
        return Response(status_code=200)

    return router


class _FaultError(Exception):
    """Why there is no other answer than this one."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


async def _read(request: Request, into: type[B]) -> B:
    try:
        return decode(await read_body(request, MAX_BODY_BYTES), into)
    except BodyTooLargeError as error:
        raise _FaultError(_error(413, str(error), "PayloadTooLarge")) from None
    except BadInputError as error:
        raise _FaultError(_error(400, str(error), "BadRequest")) from None
    except ClientDisconnect:
        raise _FaultError(Response(status_code=_CLIENT_GONE)) from None


def _complete(asked: OperationRequest) -> OperationRequest:
    try:
        return asked.completed()
    except ValueError as error:
        raise _FaultError(_error(400, str(error), "BadRequest")) from None


async def _answered(asked: Awaitable[T], max_wait_s: float) -> T:
    try:
        return await asyncio.wait_for(asked, max_wait_s)
    except TimeoutError:
        message = f"the engine has not answered within {max_wait_s:g} s"
        raise _FaultError(_error(503, message, "ServiceUnavailable")) from None
    except EngineUnavailableError as error:
        raise _FaultError(_error(503, str(error), "ServiceUnavailable")) from None


def _error(status: int, message: str, kind: str) -> Response:
    return json_response(status, {"error": {"message": message, "type": kind, "code": status}})


def _conflict(operation: Operation) -> Response:
    """Names the operation that stands in the way."""
    state = f"is {operation.phase}" if operation.is_active else f"was another order, and is {operation.phase}"
    error = {"message": f"{operation.kind} {operation.id} {state}", "type": "Conflict", "code": 409}
    return json_response(409, {"error": error, "operation": operation})


_ABORT_OPENAPI: Schema = {
    "requestBody": request_body(schema_of(AbortFields), {"one": {"rid": "my-request"}, "all": {"abort_all": True}}),
    "responses": {
        "200": {"description": "No request of that name runs any more"},
        **fault_answers(
            {400: ("rid: a request's name is needed, or abort_all", "BadRequest")} | TOO_LARGE | SILENT,
            on_400="Neither a name nor abort_all",
        ),
        **fault_answers({403: ("abort_all needs an admin's key", "Forbidden")}, on_403="`abort_all` is for admins"),
    },
}
