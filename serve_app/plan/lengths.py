"""Lengths as a user gives them: one number, a range, or a file with a histogram."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from serve_app.errors import PlanError
from serve_app.plan.files import find_path, read_text, shown
from serve_app.plan.workload import Lengths

MAX_TOKENS = 100_000_000
MAX_POINTS = 128  # different lengths that are reckoned with; of a finer histogram, near ones are taken together
_FORMS = "1024, a range as 128:10240, or a CSV or JSON file with a histogram"


def read_lengths(text: str, *, name: str = "lengths") -> Lengths:
    """`1024`, `128:10240` (each length of the range alike), or the path of a histogram.

    CSV: rows of `tokens,weight`, with or without a header. JSON: an object of tokens to weights, or a list of pairs.
    Weights need not sum to one. `name` is what messages call it, such as the option. Raises PlanError.
    """
    if re.fullmatch(r"[0-9]+(:[0-9]+)?", text):
        ends = [_tokens(part, name) for part in text.split(":")]
        if ends[-1] < ends[0]:
            raise PlanError(f"{name} {shown(text)}: a range must not end before it begins")
        return Lengths.fixed(ends[0]) if ends[0] == ends[-1] else Lengths.uniform(*ends)
    path = find_path(text)
    if path is None:
        raise PlanError(f"{name} {shown(text)} is neither a length nor a file here: give {_FORMS}")
    return read_histogram(path)


def read_histogram(path: Path) -> Lengths:
    """Raises PlanError naming the line of a CSV file, or the entry of a JSON one."""
    text = read_text(path)
    points = _json_points(path, text) if text.lstrip()[:1] in ("{", "[") else _csv_points(path, text)
    largest = max((weight for _, weight in points), default=0.0)
    if largest <= 0:
        raise PlanError(f"{shown(path)} has no length with a weight above 0")
    used = [(tokens, weight / largest) for tokens, weight in points if weight > 0]
    return _thinned(Lengths.of(used))


def _csv_points(path: Path, text: str) -> list[tuple[int, float]]:
    points: list[tuple[int, float]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        cells = [cell.strip().strip('"') for cell in line.split(",")]
        is_header = number == 1 and len(cells) == 2 and not any(map(_is_number, cells))
        if is_header or cells == [""]:
            continue
        where = f"line {number} of {shown(path)}"
        if len(cells) != 2:
            raise PlanError(f"{where} must be `tokens,weight`, not {shown(line)}")
        points.append((_tokens(cells[0], where), _weight(cells[1], where)))
    return points


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _json_points(path: Path, text: str) -> list[tuple[int, float]]:
    try:
        # Objects as lists of their pairs, so that a length that is there twice is not lost.
        entries = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        raise PlanError(f"{shown(path)} is not valid JSON") from None
    points: list[tuple[int, float]] = []
    for number, entry in enumerate(entries, start=1):
        where = f"entry {number} of {shown(path)}"
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise PlanError(f"{where} must be a pair of tokens and weight, not {shown(entry)}")
        points.append((_tokens(entry[0], where), _weight(entry[1], where)))
    return points


def _tokens(value: object, where: str) -> int:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]+", text):
        raise PlanError(f"{where}: tokens must be a whole number, not {shown(value)}")
    # What is longer is too large, and may be more than Python converts.
    tokens = int(text) if len(text) < 20 else MAX_TOKENS + 1
    if not 1 <= tokens <= MAX_TOKENS:
        raise PlanError(f"{where}: tokens must be 1 to {MAX_TOKENS:,}, not {shown(value)}")
    return tokens


def _weight(value: object, where: str) -> float:
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise PlanError(f"{where}: a weight must be a number of at least 0, not {shown(value)}")
    return weight


def _thinned(lengths: Lengths) -> Lengths:
    """At most MAX_POINTS lengths. The shortest and the longest stay; others move by a bin's width at most.

    Bins are as wide as their lengths are long, so that all quantiles are off by the same share, 5 % from 128 to 64k.
    """
    points = lengths.points
    if len(points) <= MAX_POINTS:
        return lengths
    least, most = points[0][0], points[-1][0]
    bins: dict[int, list[tuple[int, float]]] = {}
    for tokens, weight in points[1:-1]:
        place = int(math.log(tokens / least) / math.log(most / least) * (MAX_POINTS - 2))
        bins.setdefault(place, []).append((tokens, weight))
    return Lengths.of([points[0], *map(_middle, bins.values()), points[-1]])


def _middle(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Their mean, with all of their weight."""
    weight = sum(part for _, part in points)
    return round(sum(tokens * part for tokens, part in points) / weight), weight
