"""Actors of a cell that outlived its engine: found by their names, which Ray keeps."""

import logging
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import ray

from serve_app.cluster.node import Network
from serve_app.config import OctavoConfig
from serve_app.experts.layout import Seat

log = logging.getLogger(__name__)

ASK_S = 5.0  # that actors may take to answer: one that is frozen never does
ROUTER_NAME = "router"


@dataclass(frozen=True)
class Kin:
    """A worker of an earlier engine."""

    name: str
    seat: Seat | None
    place: Seat  # where it lives: its seat's, or a spare's
    actor: Any
    is_loaded: bool = True


class Names:
    """Of the actors of one cell. A worker's says its seat and its place, so that nobody needs to be asked for them.

    They begin alike for one config of an application: those of another config are strangers.
    """

    def __init__(self, app: str, config: OctavoConfig) -> None:
        self.family = f"octavo/{app}/"
        self.prefix = f"{self.family}{blake2b(config.model_dump_json().encode(), digest_size=4).hexdigest()}/"

    def new_worker(self, seat: Seat | None, place: Seat) -> str:
        """w1.0.0#3fa2, or, for one that lives elsewhere than its seat, w1.0.0@-2.0.0#3fa2; a spare is w@-2.0.0#3fa2."""
        at = "" if seat == place else f"@{_dotted(place)}"
        return f"w{'' if seat is None else _dotted(seat)}{at}#{secrets.token_hex(3)}"

    def actor(self, name: str) -> str:
        return self.prefix + name

    def living_workers(self) -> list[Kin]:
        found = []
        for full in ray.util.list_named_actors():
            name = full.removeprefix(self.prefix)
            if name == full or not name.startswith("w"):
                continue
            actor = _get(full)
            if actor is not None:
                found.append(Kin(name, *_parsed(name), actor))
        return found

    def strangers(self) -> list[Any]:
        """Handles of the actors that another config of this application has left."""
        names = [name for name in ray.util.list_named_actors() if name.startswith(self.family)]
        actors = [_get(name) for name in names if not name.startswith(self.prefix)]
        return [actor for actor in actors if actor is not None]

    def router(self) -> Any:
        """The handle of the router; None where there is none."""
        return _get(self.actor(ROUTER_NAME))

    def network(self) -> Network | None:
        """The network of the cell that is there already: the workers' sockets have its key. None: there is no cell.

        If nobody answers, nobody can be adopted: they are ended.
        """
        actors = [kin.actor for kin in self.living_workers()] + ([self.router()] if self.router() is not None else [])
        asked = [actor.network.remote() for actor in actors]
        while asked:
            answered, asked = ray.wait(asked, num_returns=1, timeout=ASK_S)
            if not answered:
                for actor in actors:
                    ray.kill(actor)
                return None
            try:
                network: Network = ray.get(answered[0])
            except (ray.exceptions.RayError, AttributeError):  # dead, or not begun to work
                continue
            return network
        return None


def _dotted(seat: Seat) -> str:
    return ".".join(map(str, seat))


def _parsed(name: str) -> tuple[Seat | None, Seat]:
    words, _, _ = name.removeprefix("w").partition("#")
    seat, _, place = words.partition("@")
    parsed = [Seat(*map(int, word.split("."))) if word else None for word in (seat, place)]
    at = parsed[1] or parsed[0]
    assert at is not None
    return parsed[0], at


def _get(full: str) -> Any:
    try:
        return ray.get_actor(full)
    except ValueError:  # it died since it was listed
        return None
