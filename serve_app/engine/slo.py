"""Who is let in: a request whose first token is predicted to come in time, and does not make another's come too late.

Who is refused is told when to come back, and has a place then: what it needs is kept from newcomers, as far as the
refused are known to come back at all (airlines sell seats the same way). Within the budget each tenant may hold so many
times what is still free (Choudhury and Hahne, doi 10.1109/90.664262), so that a flood of one leaves room for the next;
and each priority its share of the wait that the objective allows.
"""

import math
from dataclasses import dataclass

import msgspec

from serve_app.engine.places import Asked, Places, key_of
from serve_app.engine.request import Refusal, Request

FAIR_FACTOR = 8.0  # times the free budget that one tenant may hold: alone it has 8/9 of all
OUTAGE_S = 3.0  # that a cell without a replica is taken to need
DUE_SLACK = 0.1  # of the objective, and of all shares: who comes back in its time finds so much more room
LEARN_FROM = 0.05  # of the objective: what is shorter says little of the rest
MIN_BIASES, BIASES = 8, 64  # first tokens whose lateness is remembered


class SloConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is promised. Seconds."""

    ttft_s: float | None = None  # None: whoever the limits allow is let in
    target_s: float = math.inf  # predicted at most, for a request with this objective
    itl_s: float | None = None  # between two tokens of a running stream, as far as smaller chunks can help
    max_queued: int = 1 << 30
    max_queued_tokens: int = 1 << 40
    queued_tokens_by_replicas: dict[int, int] = {}  # the same while only so many replicas serve, not all of them
    num_replicas: int = 1  # all

    def queued_tokens(self, num_replicas: int) -> int:
        """Prompt tokens that may wait while so many replicas serve: those of the greatest known number not above it.

        Below the least that is known it is as there.
        """
        known = self.queued_tokens_by_replicas
        if num_replicas >= self.num_replicas or not known:
            return self.max_queued_tokens
        return known[max((num for num in known if num <= num_replicas), default=min(known))]


class Forecast(msgspec.Struct, frozen=True):
    """What a request would meet on one replica."""

    replica: int
    wait_s: float  # until its own computation begins
    own_s: float  # what that takes
    cost_s: float  # by how much all who come after it have to wait longer
    harms: bool  # somebody who was let in would be late
    load_tokens: int  # outstanding there

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.own_s


@dataclass
class Queue:
    """What waits in the whole cell."""

    num_queued: int
    num_tokens: int  # prompt tokens to be computed
    tenant_part: float  # of them the asking tenant's, 0..1
    total_s: float  # seconds that they take one replica


class Admission:
    """Judges newcomers. All times are of the engine's clock."""

    def __init__(self, config: SloConfig) -> None:
        self._config = config
        self._places = Places()
        self._biases: list[float] = []
        self.bias = 1.0  # what a forecast is multiplied with to judge: three of four were not higher
        self.middle = 1.0  # the same to tell what is most likely
        self.refused: dict[str, int] = {}
        self.draining = False

    def objective_s(self, request: Request) -> float:
        """Seconds from its arrival to its first token that are promised to it; inf without admission."""
        if self._config.ttft_s is None:
            return math.inf
        return request.terms.ttft_s or self._config.ttft_s

    def learn(self, foreseen_s: float, actual_s: float) -> None:
        """Of a first token: forecasts that are always too low, or too high, are set right.

        `foreseen_s` is without the bias, or what was learned late would be learned twice.
        """
        if foreseen_s < LEARN_FROM * (self._config.ttft_s or math.inf):
            return
        self._biases = [*self._biases[1 - BIASES :], actual_s / foreseen_s]
        if len(self._biases) >= MIN_BIASES:
            biases = sorted(self._biases)
            self.bias = min(2.0, max(0.8, biases[len(biases) * 3 // 4]))
            self.middle = min(2.0, max(0.5, biases[len(biases) // 2]))

    def judge(
        self,
        request: Request,
        forecast: Forecast | None,
        queue: Queue,
        num_replicas: int,
        now: float,
        outage_s: float | None = None,
    ) -> Refusal | None:
        """None: let it in. `forecast` is of the best replica; None while no pace is known.

        `outage_s`: for how long no replica has been serving; None while one does, or none has yet.
        """
        self._places.look(now)
        refusal = self._limits(request, queue, num_replicas)
        if refusal is None and self._config.ttft_s is not None:
            if outage_s is not None:
                refusal = self._no_capacity(request, queue, outage_s)
            elif forecast is not None:
                refusal = self._slo(request, forecast, queue, max(1, num_replicas), now)
        return self._counted(refusal)

    def _no_capacity(self, request: Request, queue: Queue, outage_s: float) -> Refusal | None:
        """Whether an outage that has lasted so long leaves time for it."""
        wait_s = max(OUTAGE_S, outage_s) + queue.total_s
        if wait_s + request.terms.waited_s <= self._target_s(request):
            return None
        return Refusal(request.rid, "no-capacity", "no replica serves at the moment", math.ceil(wait_s))

    def late(self, request: Request) -> Refusal:
        """Of one that wanted to be dropped rather than served late."""
        refusal = Refusal(request.rid, "late", "its first token would have come after its objective", 1.0)
        self._counted(refusal)
        return refusal

    def budget_s(self, wait_s: float) -> float:
        """Seconds of prompt computation that a replica with this wait could still take on, at the server's target."""
        return max(0.0, self._config.target_s - wait_s * self.bias)

    def _counted(self, refusal: Refusal | None) -> Refusal | None:
        if refusal is not None:
            self.refused[refusal.reason] = self.refused.get(refusal.reason, 0) + 1
        return refusal

    def _limits(self, request: Request, queue: Queue, num_replicas: int) -> Refusal | None:
        if self.draining:
            return Refusal(request.rid, "draining", "the server is being drained: it takes no new requests", 5.0)
        retry_s = max(1.0, queue.total_s / 2)
        if queue.num_queued >= self._config.max_queued:
            return Refusal(request.rid, "queue-full", f"{queue.num_queued} requests wait already", retry_s)
        if queue.num_tokens + len(request.prompt) > self._config.queued_tokens(num_replicas):
            return Refusal(request.rid, "queue-full", f"{queue.num_tokens} prompt tokens wait already", retry_s)
        return None

    def _target_s(self, request: Request) -> float:
        """What may be predicted for it at most."""
        assert self._config.ttft_s is not None
        return self.objective_s(request) * self._config.target_s / self._config.ttft_s

    def _slo(self, request: Request, forecast: Forecast, queue: Queue, num_replicas: int, now: float) -> Refusal | None:
        own_s = forecast.own_s * self.bias
        wait_s = forecast.wait_s * self.bias
        room_s = self._target_s(request) - request.terms.waited_s - own_s  # for waiting
        if room_s + request.terms.waited_s <= 0:
            text = f"its prompt alone takes {own_s:.1f} s: ask for a higher objective by x-slo-ttft-ms"
            return Refusal(request.rid, "ttft-unreachable", text, 0.0)
        share = request.terms.share
        asked = Asked(key_of(request), request.terms.tenant, share, forecast.cost_s * self.bias)
        is_due = self._places.is_due(asked.key, now)
        if is_due:
            room_s = room_s * min(1.0, share + DUE_SLACK) + DUE_SLACK * self.objective_s(request)
        else:
            room_s *= share
        fair_s = (FAIR_FACTOR * room_s + (1.0 - queue.tenant_part) * wait_s) / (1.0 + FAIR_FACTOR)
        reason = "fair-share" if fair_s < wait_s <= room_s else "ttft"
        over_s = max(0.0, wait_s - fair_s)
        if not is_due:
            over_s = self._places.over_s(asked, wait_s, fair_s, num_replicas, now)
        if forecast.harms:
            over_s = max(over_s, own_s)
        if over_s > 0:
            text = "its first token could not come in time: the server is at its limit"
            return Refusal(request.rid, reason, text, self._places.keep(asked, over_s, now))
        if is_due:
            self._places.take(asked.key)
        return None
