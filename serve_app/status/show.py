"""`octavo status`: one look at a cell, as a picture or as JSON, or a look each second until Ctrl-C."""

import sys
import time
from contextlib import suppress
from datetime import datetime

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from serve_app.status.ask import Answer, StatusError, ask, client_of
from serve_app.status.draw import draw

LOOK_S = 1.0  # between two looks


def show(url: str, *, experts: bool) -> None:
    """Draw the cell once. StatusError if there is none to draw."""
    with client_of(url) as client:
        _console().print(_picture(ask(client, url), experts))


def show_json(url: str) -> None:
    """Print what the server says. StatusError if it knows no cell."""
    with client_of(url) as client:
        said = ask(client, url).said
    sys.stdout.buffer.write(said + b"\n")


def watch(url: str, *, experts: bool) -> None:
    """Draw the cell each second until Ctrl-C. When it cannot be asked, that is said over the last picture of it."""
    console = _console()
    if not console.is_terminal:
        raise StatusError("--watch redraws a terminal, and the output is none")
    with suppress(KeyboardInterrupt), client_of(url) as client, Live(console=console, auto_refresh=False) as live:
        picture: RenderableType = ""
        while True:
            now, picture = _look(client, url, picture, experts)
            live.update(Group(now, picture), refresh=True)
            time.sleep(LOOK_S)


def _look(client: httpx.Client, url: str, last: RenderableType, experts: bool) -> tuple[Text, RenderableType]:
    """A line that says when and how it went, and the newest picture there is."""
    now = f"{datetime.now():%H:%M:%S}"
    try:
        answer = ask(client, url)
    except StatusError as error:
        rest = "; below is the last that was known" if last else ""
        return Text(f"{now} {error}{rest}", "bold red"), last
    return Text(f"{now}, each second until Ctrl-C", "dim"), _picture(answer, experts)


def _picture(answer: Answer, experts: bool) -> RenderableType:
    return draw(answer.url, answer.health, answer.view, experts=experts)


def _console() -> Console:
    """Standard output, which may be one that cannot show every character."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    return Console()
