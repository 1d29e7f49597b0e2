"""Places that were promised to refused requests: when they may come back, and what they need then.

Of those who are told to come back only some do. How many is learned, and only so much is kept from newcomers.
"""

import hashlib
import math
from collections import OrderedDict

import msgspec

from serve_app.engine.request import Request

MAX_PLACES = 10_000
EARLY_S = 1.0  # a client's clock, and ours
GRACE_S = 15.0  # a place is kept for so long
LEARN_RETURNS = 0.05  # weight of one more client that came back, or did not
MARGIN_S = 0.5  # of a Retry-After
MIN_RETRY_S, MAX_RETRY_S = 1.0, 3600.0


class Place(msgspec.Struct, frozen=True):
    due_s: float
    own_s: float  # seconds of computation


class Places:
    """All times are of the engine's clock."""

    def __init__(self) -> None:
        self._places: OrderedDict[bytes, Place] = OrderedDict()
        self._sum_s = 0.0
        self._return_rate = 0.5
        self._next_look_s = 0.0

    @property
    def expected_s(self) -> float:
        """Seconds of computation that are promised to those who are likely to come back."""
        return self._return_rate * self._sum_s

    def is_due(self, key: bytes, now: float) -> bool:
        place = self._places.get(key)
        return place is not None and place.due_s - EARLY_S <= now

    def take(self, key: bytes) -> None:
        """Its client came back in its time."""
        self._drop(key)
        self._learn(1.0)

    def keep(self, key: bytes, after_s: float, own_s: float, now: float) -> float:
        """Keep a place that is free after so long; whole seconds to tell the client. Who is too early has its own."""
        place = self._places.get(key)
        if place is not None and place.due_s - EARLY_S > now:
            return _whole(place.due_s - now)
        if place is not None:
            self._drop(key)
        retry_s = _whole(after_s + MARGIN_S)
        if len(self._places) < MAX_PLACES:
            self._places[key] = Place(now + retry_s, own_s)
            self._sum_s += own_s
        return retry_s

    def look(self, now: float) -> None:
        """Give up places whose clients did not come. Once a second, whoever calls how often."""
        if now < self._next_look_s:
            return
        self._next_look_s = now + 1.0
        for key in [key for key, place in self._places.items() if place.due_s + GRACE_S < now]:
            self._drop(key)
            self._learn(0.0)

    def _drop(self, key: bytes) -> None:
        place = self._places.pop(key)
        self._sum_s = self._sum_s - place.own_s if self._places else 0.0

    def _learn(self, came: float) -> None:
        self._return_rate += LEARN_RETURNS * (came - self._return_rate)


def key_of(request: Request) -> bytes:
    """Of what a client sends again: its name may be another one each time, and so the seed that follows from it."""
    sampling = msgspec.structs.replace(request.sampling, seed=0)
    whole = msgspec.msgpack.encode((request.terms.tenant, request.prompt, sampling))
    return hashlib.blake2b(whole, digest_size=16).digest()


def _whole(seconds: float) -> float:
    return float(min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(seconds))))
