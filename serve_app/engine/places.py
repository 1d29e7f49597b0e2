"""Places that were promised to refused requests: when they may come back, and what they need then.

Of those who are told to come back only some do. How many is learned, and only so much is kept from newcomers. A place
counts for the time at which it is due, not before: what is computed until then harms nobody. Tenants that want more
than their part of the time to come wait for their own places, and no longer for those of others (generalized
processor sharing, Parekh and Gallager, doi 10.1109/90.234856).
"""

import hashlib
import math
from collections import OrderedDict, defaultdict

import msgspec

from serve_app.engine.request import Request

MAX_PLACES = 10_000
EARLY_S = 0.2  # a client's clock, and ours
LATE_S = 2.0  # who has not come so long after its time is not expected any more
GRACE_S = 15.0  # a place is known for so long
LEARN_RETURNS = 0.05  # weight of one more client that came back, or did not
MARGIN_S = 0.5  # of a Retry-After
MIN_RETRY_S, MAX_RETRY_S = 1.0, 3600.0


class Place(msgspec.Struct):
    due_s: float
    cost_s: float  # by how much others have to wait longer, for each copy
    made_s: float
    tenant: str
    share: float
    num: int = 1  # copies: a request for several answers is as many of the same
    is_expected: bool = True

    @property
    def second(self) -> int:
        return math.floor(self.due_s)


class Asked(msgspec.Struct, frozen=True):
    """What somebody needs who may have to come back."""

    key: bytes
    tenant: str
    share: float
    cost_s: float


class Places:
    """All times are of the engine's clock."""

    def __init__(self) -> None:
        self._places: OrderedDict[bytes, Place] = OrderedDict()
        # seconds of computation that are promised, by the second when they are due
        self._of_share: defaultdict[float, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._of_tenant: defaultdict[str, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._return_rate = 0.5
        self._next_look_s = -math.inf

    def is_due(self, key: bytes, now: float) -> bool:
        place = self._places.get(key)
        return place is not None and place.due_s - EARLY_S <= now

    def take(self, key: bytes) -> None:
        """Its client came back in its time, and is let in."""
        place = self._places[key]
        self._learn(1.0)
        if place.num > 1:
            self._count(place, -1)
            place.num -= 1
        else:
            self._drop(key)

    def over_s(self, asked: Asked, wait_s: float, room_s: float, num_replicas: int, now: float) -> float:
        """For how many seconds no newcomer should be let in that would wait `wait_s` of at most `room_s`; 0.0: now.

        Who is let in now moves all who come before the queue is empty again. O(seconds that places are kept for).
        """
        over_s = max(0.0, wait_s - room_s)
        shares = [of for share, of in self._of_share.items() if share >= asked.share]
        seconds = {second for of in shares for second in of}
        if not seconds:
            return over_s
        mine: dict[int, float] = self._of_tenant.get(asked.tenant, defaultdict(float))
        num_tenants = len(self._of_tenant) + (asked.tenant not in self._of_tenant)
        all_s, mine_s = 0.0, asked.cost_s
        for second in sorted(seconds):
            all_s += sum(of.get(second, 0.0) for of in shares)
            mine_s += mine.get(second, 0.0)
            booked_s = wait_s + self._return_rate * min(all_s, num_tenants * mine_s) / num_replicas
            if booked_s - max(0.0, second + 0.5 - now) > room_s:
                over_s = booked_s - room_s
        return over_s

    def keep(self, asked: Asked, after_s: float, now: float) -> float:
        """Keep a place that is free after so long; whole seconds to tell the client. Who is too early has its own."""
        place = self._places.get(asked.key)
        if place is not None and place.due_s - EARLY_S > now:
            if place.made_s == now:  # another copy
                place.num += 1
                self._count(place, 1)
            return _whole(place.due_s - now)
        if place is not None:
            self._drop(asked.key)
        retry_s = _whole(after_s + MARGIN_S)
        if len(self._places) < MAX_PLACES:
            place = self._places[asked.key] = Place(now + retry_s, asked.cost_s, now, asked.tenant, asked.share)
            self._count(place, 1)
        return retry_s

    def look(self, now: float) -> None:
        """Give up places whose clients did not come. Once a second, whoever calls how often."""
        if now < self._next_look_s:
            return
        self._next_look_s = now + 1.0
        for key, place in list(self._places.items()):
            if place.is_expected and place.due_s + LATE_S < now:
                self._count(place, -place.num)
                place.is_expected = False
                for _ in range(min(place.num, 8)):
                    self._learn(0.0)
            if place.due_s + GRACE_S < now:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        place = self._places.pop(key)
        self._count(place, -place.num)

    def _count(self, place: Place, num: int) -> None:
        if not place.is_expected:
            return
        for table, name in ((self._of_share, place.share), (self._of_tenant, place.tenant)):
            of = table[name]  # type: ignore[index]
            of[place.second] += num * place.cost_s
            if of[place.second] <= 1e-9:
                del of[place.second]
            if not of:
                del table[name]  # type: ignore[arg-type]

    def _learn(self, came: float) -> None:
        self._return_rate += LEARN_RETURNS * (came - self._return_rate)


def key_of(request: Request) -> bytes:
    """Of what a client sends again: its name may be another one each time, and so the seed that follows from it."""
    sampling = msgspec.structs.replace(request.sampling, seed=0)
    whole = msgspec.msgpack.encode((request.terms.tenant, request.prompt, sampling))
    return hashlib.blake2b(whole, digest_size=16).digest()


def _whole(seconds: float) -> float:
    return float(min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(seconds))))
