"""One line in the log for each request: who, what, how long, how many tokens. Nothing of what was said, by default."""

import logging
import time
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

MAX_CHARS = 200  # of a client's own words in a line
MAX_PROMPT_BYTES = 4096  # of a body that is logged


@dataclass
class Account:
    """What is known of the request that is being served, filled in by whoever learns it."""

    rid: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


_ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)


def account() -> Account:
    """Of the present request; outside of one, an account that nobody reads."""
    return _ACCOUNT.get() or Account()


class AccessLog:
    """Writes the line when the answer has ended, or the client has gone. Status 0: nothing was answered."""

    def __init__(self, app: ASGIApp, quiet_paths: Collection[str], log_prompts: bool) -> None:
        """`quiet_paths`: probes, which are logged at DEBUG only."""
        self._app = app
        self._quiet_paths = quiet_paths
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line = _Line(scope, receive, send, Account(), self._log_prompts)
        token = _ACCOUNT.set(line.account)
        try:
            await self._app(scope, line.take if self._log_prompts else receive, line.give)
        except Exception:
            line.status = line.status or 500  # that is what the outermost handler answers
            raise
        finally:
            _ACCOUNT.reset(token)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            line.write(logging.DEBUG if path in self._quiet_paths else logging.INFO)


class _Line:
    def __init__(self, scope: Scope, receive: Receive, send: Send, account: Account, log_prompts: bool) -> None:
        self.account = account
        self.status = 0
        self._scope, self._receive, self._send = scope, receive, send
        self._log_prompts = log_prompts
        self._body = b""
        self._began_s = time.perf_counter()

    async def take(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._body += message.get("body", b"")[: MAX_PROMPT_BYTES - len(self._body)]
        return message

    async def give(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    def write(self, level: int) -> None:
        if not log.isEnabledFor(level):
            return
        account, scope = self.account, self._scope
        rid = account.rid or Headers(scope=scope).get("x-request-id", "")
        log.log(
            level,
            "rid=%s tenant=%s %s %s status=%d ms=%.1f prompt_tokens=%d answer_tokens=%d%s",
            printable(rid) or "-",
            scope.get("state", {}).get("tenant") or "-",
            scope["method"],
            printable(scope["path"]),
            self.status,
            1000 * (time.perf_counter() - self._began_s),
            account.prompt_tokens,
            account.answer_tokens,
            f" body={self._body!r}" if self._log_prompts else "",
        )


def printable(text: str) -> str:
    """A client's words on one line: no line end, no space, no control character of theirs can forge another field."""
    return text[:MAX_CHARS].encode("unicode_escape").decode().replace(" ", "\\x20")
