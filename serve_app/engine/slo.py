"""Who is let in: a request whose first token is predicted to come in time, and does not make another's come too late.

Who is refused is told when to come back, and has a place then: what it needs is kept from newcomers, as far as the
refused are known to come back at all (airlines sell seats the same way). Within the budget each tenant may hold so many
times what is still free (Choudhury and Hahne, doi 10.1109/90.664262), so that a flood of one leaves room for the next;
and each priority its share of the wait that the objective allows.
"""

import math
from dataclasses import dataclass

import msgspec

from serve_app.engine.places import Places, key_of
from serve_app.engine.request import Refusal, Request

FAIR_FACTOR = 8.0  # times the free budget that one tenant may hold: alone it has 8/9 of all
OUTAGE_S = 3.0  # that a cell without a replica is taken to need
BIASES = 64  # first tokens whose lateness is remembered


class SloConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is promised. Seconds."""

    ttft_s: float | None = None  # None: whoever the limits allow is let in
    target_s: float = math.inf  # predicted at most, for a request with this objective
    itl_s: float | None = None  # between two tokens of a running stream, as far as smaller chunks can help
    max_queued: int = 1 << 30
    max_queued_tokens: int = 1 << 40


class Forecast(msgspec.Struct, frozen=True):
    """What a request would meet on one replica."""

    replica: int
    wait_s: float  # until its own computation begins
    own_s: float  # what that takes
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
    tenant_s: float  # seconds of the asking tenant's own
    total_s: float  # seconds of all tenants', over all replicas


class Admission:
    """Judges newcomers. All times are of the engine's clock."""

    def __init__(self, config: SloConfig) -> None:
        self._config = config
        self._places = Places()
        self._biases: list[float] = []
        self.bias = 1.0
        self.refused: dict[str, int] = {}
        self.draining = False

    def objective_s(self, request: Request) -> float:
        """Seconds from its arrival to its first token that are promised to it; inf without admission."""
        if self._config.ttft_s is None:
            return math.inf
        return request.terms.ttft_s or self._config.ttft_s

    def learn(self, predicted_s: float, actual_s: float) -> None:
        """Of a first token: predictions that are always too low, or too high, are set right."""
        if predicted_s < 0.5:
            return
        self._biases = [*self._biases[1 - BIASES :], actual_s / predicted_s * self.bias]
        middle = sorted(self._biases)[len(self._biases) // 2] if len(self._biases) >= 8 else 1.0
        self.bias = min(2.0, max(0.7, middle))

    def judge(
        self, request: Request, forecast: Forecast | None, queue: Queue, num_replicas: int, now: float
    ) -> Refusal | None:
        """None: let it in. `forecast` is of the best replica; None while no pace is known."""
        self._places.look(now)
        refusal = self._limits(request, queue)
        if refusal is None and forecast is not None and self._config.ttft_s is not None:
            refusal = self._slo(request, forecast, queue, max(1, num_replicas), now)
        return self._counted(refusal)

    def no_capacity(self, request: Request, backlog_s: float, outage_s: float) -> Refusal | None:
        """The same while no replica serves: `backlog_s` is what waits, `outage_s` how long there has been none."""
        if self._config.ttft_s is None:
            return None
        wait_s = max(OUTAGE_S, outage_s) + backlog_s
        if wait_s <= self._target_s(request):
            return None
        return self._counted(Refusal(request.rid, "no-capacity", "no replica serves at the moment", max(1.0, wait_s)))

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

    def _limits(self, request: Request, queue: Queue) -> Refusal | None:
        if self.draining:
            return Refusal(request.rid, "draining", "the server is being drained: it takes no new requests", 5.0)
        retry_s = max(1.0, queue.total_s / 2)
        if queue.num_queued >= self._config.max_queued:
            return Refusal(request.rid, "queue-full", f"{queue.num_queued} requests wait already", retry_s)
        if queue.num_tokens + len(request.prompt) > self._config.max_queued_tokens:
            return Refusal(request.rid, "queue-full", f"{queue.num_tokens} prompt tokens wait already", retry_s)
        return None

    def _target_s(self, request: Request) -> float:
        """What may be predicted for it at most."""
        assert self._config.ttft_s is not None
        return self.objective_s(request) * self._config.target_s / self._config.ttft_s

    def _slo(self, request: Request, forecast: Forecast, queue: Queue, num_replicas: int, now: float) -> Refusal | None:
        own_s = forecast.own_s * self.bias
        wait_s = forecast.wait_s * self.bias + request.terms.waited_s
        room_s = self._target_s(request) - own_s  # for waiting
        if room_s <= 0:
            text = f"its prompt alone takes {own_s:.1f} s: ask for a higher objective by x-slo-ttft-ms"
            return Refusal(request.rid, "ttft-unreachable", text, 0.0)
        key = key_of(request)
        if self._places.is_due(key, now):
            reason, over_s = "ttft", wait_s - room_s
        else:
            room_s *= request.terms.share
            reason, over_s = self._over(forecast, queue, num_replicas, wait_s, room_s)
        if over_s > 0:
            text = "its first token could not come in time: the server is at its limit"
            return Refusal(request.rid, reason, text, self._places.keep(key, over_s, own_s, now))
        if self._places.is_due(key, now):
            self._places.take(key)
        return None

    def _over(
        self, forecast: Forecast, queue: Queue, num_replicas: int, wait_s: float, room_s: float
    ) -> tuple[str, float]:
        """Why a newcomer is too much, and by how many seconds; at most 0 if it is not."""
        over_s = wait_s + self._places.expected_s / num_replicas - room_s
        if over_s > 0 or forecast.harms:
            return "ttft", max(over_s, forecast.own_s)
        free_s = max(0.0, room_s - queue.total_s * self.bias / num_replicas)
        return "fair-share", queue.tenant_s * self.bias / num_replicas - FAIR_FACTOR * free_s
