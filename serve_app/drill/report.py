"""What a drill found: records of streams and of kills in, figures out. No clock, no HTTP."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

import msgspec

from serve_app.drill.load import Record
from serve_app.runtime.snapshot import EventView

NOTICED = frozenset({"lost", "router"})  # kinds of events that say that a process is missed


class Kill(msgspec.Struct, frozen=True):
    """One strike and what came of it."""

    role: str
    name: str
    pid: int
    node: str
    frozen: bool
    at_unix_s: float  # just before the signal
    until_unix_s: float = 0.0  # when the cell was whole again, or was not waited for any longer; 0: it is waited for
    restored: bool = False
    phases: dict[str, float] = {}  # seconds by name


class KillFigures(msgspec.Struct, frozen=True):
    """One row of a report. Gaps are the longest of each stream between two of its tokens, while the cell healed."""

    role: str
    name: str
    pid: int
    node: str
    frozen: bool
    at_unix_s: float
    restored: bool
    num_streams: int  # that had tokens to wait for
    p50_gap_s: float
    p99_gap_s: float
    max_gap_s: float
    max_first_token_s: float  # that a stream waited for its first token in that time
    phases: dict[str, float]


class Span(msgspec.Struct, frozen=True):
    """Of one phase, over all kills that had it."""

    max: float
    median: float


class Report(msgspec.Struct, frozen=True):
    """All of a drill."""

    failed: int  # streams
    different: int  # from the undisturbed run, failed ones left out
    max_gap_s: float
    p99_gap_s: float
    num_streams: int  # that ended
    num_resumed: int  # times that a stream went on over another connection
    phases: dict[str, Span]
    kills: list[KillFigures]
    problems: list[str]  # sentences

    @property
    def passed(self) -> bool:
        return not self.problems


def digests(records: Sequence[Record]) -> dict[int, str]:
    """Of each request's tokens, from a run without faults."""
    return {record.ask: digest(record.tokens) for record in records}


def digest(tokens: Sequence[int]) -> str:
    return hashlib.sha256(msgspec.json.encode(tokens)).hexdigest()


def phases_of(at_unix_s: float, events: Sequence[EventView]) -> dict[str, float]:
    """Seconds of each phase after a kill, from the events behind it: where one comes twice, the first counts.

    `notice` is measured between two clocks, the kill's and the engine's.
    """
    later = sorted((event for event in events if event.at_unix_s >= at_unix_s), key=lambda event: event.at_unix_s)
    phases: dict[str, float] = {}
    noticed = next((event for event in later if event.kind in NOTICED), None)
    if noticed is not None:
        phases["notice"] = noticed.at_unix_s - at_unix_s
    for event in later:
        phases = event.seconds | phases
    return phases


def report(
    reference: Mapping[int, str], records: Sequence[Record], kills: Sequence[Kill], also: Sequence[str] = ()
) -> Report:
    """`reference`: digests by request. `also`: what went wrong otherwise, in sentences."""
    failed = [record for record in records if record.error]
    different = [record for record in records if not record.error and _differs(reference, record)]
    gaps = [_gaps(kill, records) for kill in kills]
    all_gaps = [gap for of_kill in gaps for gap in of_kill]
    return Report(
        failed=len(failed),
        different=len(different),
        max_gap_s=max(all_gaps, default=0.0),
        p99_gap_s=quantile(all_gaps, 0.99),
        num_streams=len(records),
        num_resumed=sum(record.num_resumed for record in records),
        phases=_spans(kills),
        kills=[_figures(kill, of_kill, records) for kill, of_kill in zip(kills, gaps, strict=True)],
        problems=[*also, *_problems(kills, failed, different, len(records))],
    )


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share `q` of the values does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def _differs(reference: Mapping[int, str], record: Record) -> bool:
    return bool(record.changed) or digest(record.tokens) != reference[record.ask]


def _gaps(kill: Kill, records: Sequence[Record]) -> list[float]:
    """The longest gap of each stream that waited for a token while the cell healed from this kill."""
    by_stream = (
        [later - sooner for sooner, later in pairwise(record.token_unix_s) if _during(kill, sooner, later)]
        for record in records
    )
    return [max(gaps) for gaps in by_stream if gaps]


def _during(kill: Kill, begin_s: float, end_s: float) -> bool:
    return begin_s < kill.until_unix_s and end_s > kill.at_unix_s


def _figures(kill: Kill, gaps: Sequence[float], records: Sequence[Record]) -> KillFigures:
    waits = (
        record.token_unix_s[0] - record.sent_unix_s
        for record in records
        if record.token_unix_s and _during(kill, record.sent_unix_s, record.token_unix_s[0])
    )
    return KillFigures(
        role=kill.role,
        name=kill.name,
        pid=kill.pid,
        node=kill.node,
        frozen=kill.frozen,
        at_unix_s=kill.at_unix_s,
        restored=kill.restored,
        num_streams=len(gaps),
        p50_gap_s=quantile(gaps, 0.5),
        p99_gap_s=quantile(gaps, 0.99),
        max_gap_s=max(gaps, default=0.0),
        max_first_token_s=max(waits, default=0.0),
        phases=kill.phases,
    )


def _spans(kills: Sequence[Kill]) -> dict[str, Span]:
    by_phase: dict[str, list[float]] = defaultdict(list)
    for kill in kills:
        for phase, seconds in kill.phases.items():
            by_phase[phase].append(seconds)
    return {phase: Span(max(seconds), median(seconds)) for phase, seconds in by_phase.items()}


def _problems(
    kills: Sequence[Kill], failed: Sequence[Record], different: Sequence[Record], num_streams: int
) -> Iterator[str]:
    for kill in kills:
        if not kill.restored:
            waited_s = kill.until_unix_s - kill.at_unix_s
            yield f"{waited_s:.0f} s after {kill.role} {kill.name} was struck the cell is not whole"
    if failed:
        yield f"{len(failed)} of {num_streams} streams failed, {failed[0].rid} first: {failed[0].error}"
    if different:
        how = different[0].changed or "it ended with other tokens"
        first = f"{different[0].rid} first: {how}"
        yield f"{len(different)} of {num_streams} streams differ from the undisturbed run, {first}"
