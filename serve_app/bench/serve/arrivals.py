"""When requests arrive and how long they are, drawn beforehand from a seed: a server that is slow changes neither."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from serve_app.bench.measure import BenchError

BURST_CYCLE_S = 10.0  # about: a whole number of cycles fills a run
BURST_SHARE = 0.2  # of a cycle, at its begin, in which all its requests arrive
MAX_DURATION_S = 86_400.0
MAX_TRACE_BYTES = 64 * 2**20

Lengths = Iterator[tuple[int, int]]  # prompt and output tokens, request after request, for ever


class Pattern(StrEnum):
    """How arrivals are spread over a run. The mean rate is the same in all."""

    POISSON = "poisson"
    UNIFORM = "uniform"  # evenly
    BURST = "burst"  # on and off
    RAMP = "ramp"  # from nothing to twice the mean


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request: `at_s` seconds after the run began. A line of a trace file."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


class Range(msgspec.Struct, frozen=True):
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int


def parse_range(text: str, option: str) -> Range:
    """`16:2000`, or one number. BenchError if it is neither, or not above 0."""
    low, _, high = text.partition(":")
    try:
        parsed = Range(int(low), int(high or low))
    except ValueError:
        raise BenchError(f"{option} {text} is no range such as 16:2000") from None
    if not 1 <= parsed.low <= parsed.high:
        raise BenchError(f"{option} {text} is no range: it begins below 1, or ends before it begins")
    return parsed


def draw_lengths(prompt: Range, output: Range, seed: int) -> Lengths:
    """Log-uniform: as many prompts of 16 to 32 tokens as of 1,000 to 2,000. The same for a seed, whatever the rate."""
    draw = random.Random(f"lengths {seed}")
    while True:
        yield _log_uniform(draw, prompt), _log_uniform(draw, output)


def _log_uniform(draw: random.Random, span: Range) -> int:
    factor = math.log((span.high + 1) / span.low)
    return min(span.high, int(span.low * math.exp(draw.random() * factor)))


def lengths_of(trace: Sequence[Arrival]) -> Lengths:
    """Those of a trace, in its order, over and over."""
    return itertools.cycle([(arrival.prompt_tokens, arrival.output_tokens) for arrival in trace])


def draw_arrivals(
    pattern: Pattern, rate_per_s: float, duration_s: float, lengths: Lengths, seed: int, max_requests: int
) -> list[Arrival]:
    """Those of one run, in order, in [0, duration_s). The same for the same arguments; `max_requests` at most.

    Each pattern is a process of rate 1, regular or Poisson, whose axis is bent so that `rate_per_s` is its mean.
    """
    moment = _bend(pattern, rate_per_s, duration_s)
    expected = rate_per_s * duration_s
    marks = itertools.takewhile(lambda mark: mark < expected, _marks(pattern, seed))
    return [
        Arrival(moment(mark), prompt, output)
        for mark, (prompt, output) in zip(itertools.islice(marks, max_requests), lengths, strict=False)
    ]


def _marks(pattern: Pattern, seed: int) -> Iterator[float]:
    """A process of rate 1 on [0, infinity)."""
    if pattern is Pattern.UNIFORM:
        return itertools.count(0.0)
    draw = random.Random(f"arrivals {seed}")
    return itertools.accumulate(draw.expovariate(1.0) for _ in itertools.count())


def _bend(pattern: Pattern, rate_per_s: float, duration_s: float) -> Callable[[float], float]:
    """From the number of requests expected so far to the moment, in seconds: the inverse of the rate's integral."""
    match pattern:
        case Pattern.RAMP:
            return lambda mark: math.sqrt(mark * duration_s / rate_per_s)
        case Pattern.BURST:
            cycle_s = duration_s / max(1, round(duration_s / BURST_CYCLE_S))
            return lambda mark: _in_burst(mark / rate_per_s, cycle_s)
    return lambda mark: mark / rate_per_s


def _in_burst(even_s: float, cycle_s: float) -> float:
    """Where a moment of an even process comes to lie when each cycle is pressed into its first part."""
    cycles, rest_s = divmod(even_s, cycle_s)
    return cycles * cycle_s + rest_s * BURST_SHARE


def stretch(trace: Sequence[Arrival], rate_per_s: float) -> list[Arrival]:
    """The same requests, sooner or later one after another, so that `rate_per_s` is their mean."""
    factor = mean_rate(trace) / rate_per_s
    return [msgspec.structs.replace(arrival, at_s=arrival.at_s * factor) for arrival in trace]


def mean_rate(trace: Sequence[Arrival]) -> float:
    """Requests per second from the begin to the last of them."""
    return len(trace) / (trace[-1].at_s or 1.0)


def read_arrivals(path: Path) -> list[Arrival]:
    """A trace file: a JSON object on each line, in any order. BenchError names the line that is none."""
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise BenchError(f"{path} is larger than {MAX_TRACE_BYTES >> 20} MiB")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    trace = [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not trace:
        raise BenchError(f"{path} has no requests")
    return sorted(trace, key=lambda arrival: arrival.at_s)


def _read_line(line: bytes, where: str) -> Arrival:
    try:
        arrival = msgspec.json.decode(line, type=Arrival)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BenchError(f"{where}: {error}") from None
    if not 0 <= arrival.at_s <= MAX_DURATION_S:
        raise BenchError(f"{where}: at_s is {arrival.at_s:g}; it must be 0 to {MAX_DURATION_S:g} s from the begin")
    if min(arrival.prompt_tokens, arrival.output_tokens) < 1:
        raise BenchError(f"{where}: prompt_tokens and output_tokens must be 1 or more")
    return arrival


def write_arrivals(path: Path, arrivals: Sequence[Arrival]) -> None:
    """A trace file that `read_arrivals` reads. BenchError if it cannot be written."""
    try:
        path.write_bytes(b"".join(msgspec.json.encode(arrival) + b"\n" for arrival in arrivals))
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None
