"""What the ingress asks of an engine. The ZeroMQ client of a cell implements it, and so does an in-process engine."""

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from serve_app.engine.core import EngineStats
from serve_app.engine.members import CellStats
from serve_app.engine.request import Emission, Request
from serve_app.errors import OctavoError
from serve_app.runtime.operations import Begun, Operation, OperationRequest
from serve_app.runtime.snapshot import CellView, EventView, PaceView, ProcessView


class EngineUnavailableError(OctavoError):
    """No engine answers: the message says what is awaited. The client gets a 503."""


class EngineStatus(msgspec.Struct, frozen=True):
    """What the health pages and the metrics need to know of the engine."""

    live: bool  # the engine process answers
    ready: bool  # new traffic is welcome
    reason: str = ""  # while not ready: what is awaited
    page_tokens: int = 0  # tokens per KV page
    stats: EngineStats | None = None
    epoch: int = 0
    cell: CellStats | None = None  # None where the engine has no cell


class Engine(Protocol):
    """One serving engine, whatever runs it."""

    def submit(self, request: Request) -> AsyncGenerator[Emission, None]:
        """Run a request; yields its emissions, the last of which carries `finish`.

        Closing the generator (`aclose`) cancels the request in the engine. Raises EngineUnavailableError.
        """
        ...

    async def status(self) -> EngineStatus:
        """How the engine is. Raises EngineUnavailableError; may take as long as the caller's patience."""
        ...

    async def abort(self, name: str, tenant: str | None) -> None:
        """End all requests that their clients call `name` ("": whatever they are called).

        Of one tenant, or of whomever (None). Their streams raise AbortedError. Raises EngineUnavailableError.
        """
        ...

    async def operate(self, asked: OperationRequest) -> Begun:
        """Order an operation of the cell; `asked` is complete. Raises and waits as `placement` does."""
        ...

    async def operations(self) -> list[Operation]:
        """What was ordered of this engine, the newest last. Raises and waits as `placement` does."""
        ...

    async def placement(self) -> CellView:
        """Who holds what. Raises EngineUnavailableError; may take as long as the caller's patience."""
        ...

    async def events(self) -> list[EventView]:
        """What has happened to the cell, the newest last. Raises and waits as `placement` does."""
        ...

    async def pace(self) -> PaceView:
        """What the cell's steps take. Raises and waits as `placement` does."""
        ...

    async def processes(self) -> list[ProcessView]:
        """What the cell is made of. Raises and waits as `placement` does."""
        ...
