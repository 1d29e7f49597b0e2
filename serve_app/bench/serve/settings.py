"""What is asked of a load test, checked before anything is sent."""

import math
from pathlib import Path

import msgspec

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import MAX_DURATION_S, Pattern, Range

MAX_RATE_PER_S = 100_000.0


class Rate(msgspec.Struct, frozen=True):
    """Requests per second, or so many times the capacity."""

    text: str  # as it was written
    value: float
    is_multiple: bool


class Settings(msgspec.Struct, frozen=True):
    """One invocation. Times in seconds."""

    url: str
    rates: list[Rate]  # empty: as the trace has it
    pattern: Pattern | None  # None: Poisson, or as the trace has it
    duration_s: float
    trace: Path | None
    record: Path | None
    seed: int
    ttft_s: float  # the objective
    max_requests: int  # of one run
    prompt_tokens: Range
    output_tokens: Range
    vocabulary: Range  # token ids of prompts
    retry: bool
    capacity_per_s: float | None  # None: it is measured, where it is needed
    capacity_streams: int
    capacity_s: float  # that it is measured for, once warm
    hang_up_s: float  # without a first token
    drain_s: float  # for the server to come to rest before a run
    key: str | None

    @property
    def needs_capacity(self) -> bool:
        return any(rate.is_multiple for rate in self.rates)


def parse_rate(text: str) -> Rate:
    """`2.5` or `3x`. BenchError if it is neither, or not above 0."""
    number = text.removesuffix("x")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_RATE_PER_S:
        raise BenchError(f"--rate {text} is no rate: say 2.5 for requests per second, or 3x for thrice the capacity")
    return Rate(text, value, is_multiple=number != text)


def check(settings: Settings) -> None:
    """BenchError in one sentence for what cannot be run."""
    if not 0 < settings.duration_s <= MAX_DURATION_S:
        raise BenchError(f"--duration {settings.duration_s:g} must be above 0, and {MAX_DURATION_S:g} s at most")
    if settings.hang_up_s < settings.ttft_s:
        raise BenchError(
            f"--hang-up-s {settings.hang_up_s:g} is below the objective of {settings.ttft_s:g} s: "
            "it would be missed for who did not wait"
        )
    if settings.record and len(settings.rates) > 1:
        raise BenchError("--record writes the requests of one run: give one --rate with it")
    if settings.record:
        check_writable(settings.record, "--record")


def check_writable(path: Path, option: str) -> None:
    """As far as can be said before minutes of measuring. BenchError if it is a folder, or in none that there is."""
    if path.is_dir() or not path.parent.is_dir():
        raise BenchError(f"{option} cannot be written: {path} is a folder, or in none that there is")
