"""What a cell's steps cost, before anybody has asked for anything: a rehearsal at the first start, remembered on disk.

It runs requests of its own, first long prompts, then many short ones that decode together, on every replica at once,
and leaves the engine as if nothing had been. The next start of the same model, layout and machine reads the result.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from serve_app.config import OctavoConfig
from serve_app.engine.core import EngineCore
from serve_app.engine.pace import MIN_OBSERVED, Observed
from serve_app.engine.plan import Cancel, Submit
from serve_app.engine.request import Emission, Request, SamplingParams, Terms
from serve_app.fetch.cache import cache_root
from serve_app.model.spec import ModelSpec

log = logging.getLogger(__name__)

PREFIX = "calibration-"  # of the requests' names: no client's begins so, they are digests
LIMIT_S = 20.0
LONG_TOKENS, SHORT_TOKENS = 384, 8
NUM_LONG, NUM_SHORT = 2, 8  # per replica
NUM_NEW_TOKENS = 6

Send = Callable[[Submit | Cancel], None]


class Calibration:
    """Of one engine. `num_replicas`: of a whole cell. `path`: where results are kept; None keeps none."""

    def __init__(self, core: EngineCore, vocab_size: int, num_replicas: int, path: Path | None = None) -> None:
        self._core = core
        self._vocab_size = vocab_size
        self._path = path
        self._pending: set[str] = set()
        self._rounds: list[list[Request]] = []
        self._num_replicas = num_replicas
        self._has_begun = False
        self._until_s = 0.0
        self.is_over = core.config.slo.ttft_s is None

    @property
    def is_running(self) -> bool:
        return bool(self._pending)

    def look(self, send: Send, now: float) -> None:
        """Begin when the cell is whole and idle, and see that it ends."""
        if self.is_over:
            return
        if not self._has_begun:
            self._begin(now)
        elif self._pending and now > self._until_s:
            log.warning("the calibration took longer than %.0f s: it ends with what is known", LIMIT_S)
            self._rounds.clear()
            for rid in list(self._pending):
                send(Cancel(rid))
        if not self._pending and not self.is_over:
            self._next(send)

    def take(self, emission: Emission) -> None:
        if emission.finish is not None:
            self._pending.discard(emission.rid)

    def _begin(self, now: float) -> None:
        self._has_begun = True
        known = self._read()
        if known:
            self._core.paces.seed(self._num_replicas, known)
        # a cell that is at work learns from that, and one that is not whole has nothing to tell about the whole
        if known or not self._core.is_idle or self._core.num_replicas != self._num_replicas:
            self.is_over = True
            return
        self._until_s = now + LIMIT_S
        self._rounds = [
            self._requests(NUM_LONG * self._num_replicas, LONG_TOKENS, "long"),
            self._requests(NUM_SHORT * self._num_replicas, SHORT_TOKENS, "short"),
        ]

    def _next(self, send: Send) -> None:
        if not self._rounds:
            self.is_over = True
            num_replicas = self._core.num_replicas
            observed = self._core.paces.of(num_replicas).observed
            if self._core.is_idle:  # somebody may have come meanwhile, or a cancelled step may still be under way
                self._core.reset_totals()
            self._core.paces.seed(num_replicas, observed)
            if num_replicas == self._num_replicas:  # else a worker was lost in the midst: that is no whole cell's pace
                self._write(observed)
            log.info("calibrated by %d steps: %s", len(observed), self._core.paces.of(num_replicas).costs)
            return
        requests = self._rounds.pop(0)
        self._pending = {request.rid for request in requests}
        for request in requests:
            send(Submit(request))

    def _requests(self, num: int, num_tokens: int, name: str) -> list[Request]:
        """Prompts that have nothing in common, so that no cache helps."""
        context = self._core.config.max_context_tokens
        num_tokens = max(1, min(num_tokens, context // 2))
        num_new = max(1, min(NUM_NEW_TOKENS, context - num_tokens))
        sampling = SamplingParams(max_new_tokens=num_new, temperature=0.0, ignore_eos=True)
        return [
            Request(
                f"{PREFIX}{name}-{i}",
                [(7919 * (i + 1) + 31 * j * (i + 3)) % self._vocab_size for j in range(num_tokens)],
                sampling,
                terms=Terms(is_accepted=True),
            )
            for i in range(num)
        ]

    def _read(self) -> list[Observed]:
        if self._path is None:
            return []
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Observed])
        except (OSError, ValueError):
            return []

    def _write(self, observed: list[Observed]) -> None:
        if self._path is None or len(observed) < MIN_OBSERVED:
            return
        with suppress(OSError):  # the next start calibrates again
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(f".{os.getpid()}")
            part.write_bytes(msgspec.json.encode(observed))
            part.replace(self._path)


def calibration_path(config: OctavoConfig, spec: ModelSpec) -> Path:
    """Of this model in this layout on this machine."""
    what = (repr(spec), config.layout.model_dump(), config.worker.model_dump(), config.scheduler.model_dump())
    where = (config.dtype, config.device, platform.machine(), _cpu_name(), os.cpu_count())
    digest = hashlib.blake2b(repr((what, where)).encode(), digest_size=12).hexdigest()
    return cache_root() / "calibration" / f"{digest}.json"


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
