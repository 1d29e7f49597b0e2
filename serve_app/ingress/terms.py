"""On which terms a request asks to be let in: its headers, within what the server allows; and how a refusal is told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.config import SloConfig
from serve_app.engine.request import Terms
from serve_app.ingress.door import in_range, require
from serve_app.ingress.faults import RefusedError

TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
PRIORITY_HEADER = "x-octavo-priority"
LATE_HEADER = "x-octavo-late"
TIMEOUT_HEADER = "x-request-timeout-ms"
REASON_HEADER = "x-llm-d-request-dropped-reason"
MAX_TIMEOUT_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class Policy:
    """What `slo` in the config says of requests."""

    slo: SloConfig = field(default_factory=lambda: SloConfig(ttft_s=None))

    def terms(self, headers: Mapping[str, str], tenant: str = "") -> Terms:
        """Raises BadInputError, which names the header."""
        name = headers.get(PRIORITY_HEADER) or self.slo.default_priority
        known = ", ".join(sorted(self.slo.priorities))
        require(name in self.slo.priorities, PRIORITY_HEADER, f"must be one of {known}, not {name[:32]!r}")
        late = headers.get(LATE_HEADER) or "serve"
        require(late in {"serve", "drop"}, LATE_HEADER, f"must be `serve` or `drop`, not {late[:32]!r}")
        return Terms(tenant, self.slo.priorities[name], self._objective_s(headers), drops_late=late == "drop")

    def timeout_s(self, headers: Mapping[str, str]) -> float | None:
        """After so many seconds the client does not want the answer any more."""
        given = headers.get(TIMEOUT_HEADER)
        if not given:
            return None
        value = number(given, TIMEOUT_HEADER)
        in_range(value, 1, MAX_TIMEOUT_MS, TIMEOUT_HEADER)
        return value / 1e3

    def _objective_s(self, headers: Mapping[str, str]) -> float:
        for name in TTFT_HEADERS:
            if headers.get(name):
                value = number(headers[name], name)
                in_range(value, self.slo.min_ttft_s * 1e3, self.slo.max_ttft_s * 1e3, name)
                return value / 1e3
        return 0.0

    def refuse(self, error: RefusedError) -> dict[str, str]:
        """The headers of a refusal; its status becomes the one that is configured, but where there is no capacity."""
        if error.status == 429:
            error.status = self.slo.refusal_status
        headers = {REASON_HEADER: error.reason}
        if error.retry_after_s > 0:
            headers["retry-after"] = str(math.ceil(error.retry_after_s))
            headers["retry-after-ms"] = str(math.ceil(error.retry_after_s) * 1000)
        return headers


def number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    require(math.isfinite(value), name, f"must be a number, not {text[:32]!r}")
    return value
