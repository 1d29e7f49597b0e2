"""All layouts that were looked at: the plot of what they give against how long one waits, the ranking, the refusals."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from serve_app.plan.answer import Answer, losses_of
from serve_app.plan.deployment import Deployment
from serve_app.plan.report.figures import gb, number, plural, time
from serve_app.plan.report.markup import Html, items, join, section, table, tag
from serve_app.plan.report.scatter import Limit, Point, Scatter, axis, spread
from serve_app.plan.report.speed import Speed, speed
from serve_app.plan.report.words import layout
from serve_app.plan.search import Candidate

SHOWN = 20  # of the ranking, before the rest is folded away
SMALLEST, LARGEST = 4.0, 13.0  # radius of a mark, pixels


@dataclass(frozen=True)
class Field:
    """Of one answer: its candidates, and which are marked."""

    answer: Answer

    @cached_property
    def all(self) -> list[Candidate]:
        """Ranked; the chosen one first where the search does not have it, as with other standby slots."""
        found, chosen = self.answer.found.candidates, self.answer.chosen
        return found if self.is_ranked else [chosen, *found]

    @cached_property
    def is_ranked(self) -> bool:
        return any(one.deployment == self.answer.deployment for one in self.answer.found.candidates)

    @cached_property
    def front(self) -> frozenset[Deployment]:
        return frozenset(candidate.deployment for candidate in self.answer.found.pareto)

    @cached_property
    def speed(self) -> Speed:
        return speed(self.answer.question.workload)

    def role(self, candidate: Candidate) -> str:
        """`chosen`, `better`, or nothing."""
        if candidate.deployment == self.answer.deployment:
            return "chosen"
        better = self.answer.better
        return "better" if better is not None and candidate.deployment == better.deployment else ""

    def worst(self, candidate: Candidate) -> float | None:
        """Requests/s at once after the loss of one GPU; None: not worked out."""
        if self.role(candidate):
            return losses_of(candidate, self.answer.question).worst_capacity
        return candidate.worst_capacity

    def says(self, candidate: Candidate) -> str:
        """Its role, as one reads it."""
        named = "named" if self.answer.question.layout is not None else "chosen"
        return {"chosen": named, "better": "first of the search", "": ""}[self.role(candidate)]


def candidates(answer: Answer) -> Html:
    field = Field(answer)
    told = f"{plural(len(field.all), 'layout')} fit, {len(field.front)} are on the front, and"
    return section(
        "layouts",
        "Layouts",
        tag("p", f"{told} {len(answer.found.rejected)} were refused."),
        _plot(field),
        *_ranking(field),
        *_refused(answer),
    )


# -- the plot -------------------------------------------------------------------------------------------------------


def _plot(field: Field) -> Html:
    """Drawn twice, for wide screens and for narrow ones, since text in a drawing shrinks with it."""
    shown = [one for one in field.all if _is_drawable(one, field.speed)]
    left_out = len(field.all) - len(shown)
    if not shown:
        return tag("p", "Nothing can be drawn: no layout answers at all under this load.")
    note = f" {plural(left_out, 'layout')} without throughput or end of the wait cannot be drawn." if left_out else ""
    caption = (
        f"Up is better, left is better. The larger a mark, the more GPUs stand still when one is lost.{note}"
        " The front counts more than these two axes: nothing else is better in throughput, TTFT, time between tokens,"
        " GPUs and blast radius together."
    )
    return tag(
        "figure",
        _scatter(field, shown, "wide", 880, 460, 10),
        _scatter(field, shown, "narrow", 358, 420, 4),
        _legend(shown),
        tag("figcaption", caption),
    )


def _is_drawable(candidate: Candidate, measure: Speed) -> bool:
    ttft_s = candidate.estimate.ttft_p99_s.value
    return math.isfinite(ttft_s) and ttft_s > 0 and measure.of(candidate) > 0


def _scatter(field: Field, shown: Sequence[Candidate], name: str, width: int, height: int, most_ticks: int) -> Html:
    ttft_s = field.answer.question.workload.objective.ttft_s
    x = axis("TTFT p99, seconds", (one.estimate.ttft_p99_s.value for one in shown), most_ticks)
    y = axis(field.speed.unit, map(field.speed.of, shown))
    return Scatter(
        name=name,
        title=f"{field.speed.unit} against TTFT p99",
        description=f"One mark for each of {plural(len(shown), 'layout')}; the table below has their figures.",
        x=x,
        y=y,
        points=[_point(field, one, len(shown), is_wide=width > 600) for one in _largest_first(field, shown)],
        limit=None if ttft_s is None else Limit(ttft_s, f"objective {time(ttft_s)}"),
        width=width,
        height=height,
    ).svg()


def _largest_first(field: Field, shown: Sequence[Candidate]) -> list[Candidate]:
    """So that no mark hides a smaller one; those with a label last."""
    return sorted(shown, key=lambda one: (field.role(one) != "", -one.deployment.cell_gpus))


def _point(field: Field, candidate: Candidate, num: int, *, is_wide: bool) -> Point:
    """`num`: marks in all, which are smaller where they are many."""
    deployment, role = candidate.deployment, field.role(candidate)
    is_front = deployment in field.front
    kinds = ["front" if is_front else "behind", "missing" if candidate.misses else "", role]
    title = (
        f"{layout(deployment)}: {number(field.speed.of(candidate))} {field.speed.unit}, TTFT p99"
        f" {time(candidate.estimate.ttft_p99_s.value)}, {plural(deployment.cell_gpus, 'GPU')} stand still when one is"
        f" lost; {'on' if is_front else 'behind'} the front" + ("; misses the objective" if candidate.misses else "")
    )
    label = f"{field.says(candidate)}: {deployment}" if role and is_wide else field.says(candidate)
    return Point(
        x=candidate.estimate.ttft_p99_s.value,
        y=field.speed.of(candidate),
        radius=_radius(deployment.cell_gpus) * (1.0 if num <= 60 else 0.7),
        kind=" ".join(kind for kind in kinds if kind),
        title=title,
        label=label,
    )


def _radius(blast_gpus: int) -> float:
    """By doublings: 1 GPU is the smallest mark, 128 and more the largest."""
    return SMALLEST + (LARGEST - SMALLEST) * min(1.0, math.log2(blast_gpus) / 7)


def _legend(shown: Sequence[Candidate]) -> Html:
    def entry(radius: float, kind: str, says: str) -> Html:
        mark = tag("circle", cx=15, cy=15, r=radius, class_=f"mark {kind}")
        return join([tag("svg", mark, viewBox="0 0 30 30", class_="key", aria_hidden="true"), says])

    entries = [entry(7, "front", "on the front"), entry(7, "behind", "behind it")]
    if any(one.misses for one in shown):
        entries.append(entry(7, "behind missing", "dashed: misses the objective"))
    sizes = spread((one.deployment.cell_gpus for one in shown), 6)
    stops = {num: f"{plural(num, 'GPU')} stop{'s' if num == 1 else ''}" for num in sizes}
    entries += [entry(_radius(num), "behind", says) for num, says in stops.items()]
    return items(entries, class_="legend")


# -- the ranking ----------------------------------------------------------------------------------------------------


def _ranking(field: Field) -> Iterator[Html]:
    yield tag("h3", "Ranking")
    yield tag(
        "p",
        "What a loss leaves is worked out for the first places and for what is named; the others have –.",
        class_="note",
    )
    rows = list(_rows(field))
    yield _table("The layouts, best first", field.speed, rows[:SHOWN])
    if len(rows) > SHOWN:
        more = _table("The other layouts", field.speed, rows[SHOWN:])
        yield tag("details", tag("summary", f"The other {len(rows) - SHOWN}"), more)


def _table(caption: str, measure: Speed, rows: Sequence[Sequence[str]]) -> Html:
    heads = [
        "layout",
        "place",
        measure.unit,
        "TTFT mean",
        "TTFT p99",
        "TPOT",
        "requests/s at most",
        "after a loss",
        "GPUs that stop",
        "standby slots",
        "fullest GPU",
        "remarks",
    ]
    return table(caption, heads, rows, numbers=range(1, 11))


def _rows(field: Field) -> Iterator[list[str]]:
    first = 1 if field.is_ranked else 0  # place 0 has none
    for place, candidate in enumerate(field.all, first):
        found, deployment = candidate.estimate, candidate.deployment
        worst = field.worst(candidate)
        yield [
            _name(field, candidate),
            str(place) if place else "–",
            number(field.speed.of(candidate)),
            time(found.ttft_s.value),
            time(found.ttft_p99_s.value),
            time(found.tpot_s.value),
            "none" if found.capacity is None else number(found.capacity),
            "–" if worst is None else number(worst),
            number(deployment.cell_gpus),
            number(deployment.standby),
            gb(found.footprint.total_bytes),
            _remarks(field, candidate),
        ]


def _name(field: Field, candidate: Candidate) -> Html:
    said = field.says(candidate)
    badge = tag("span", said, class_=f"badge {field.role(candidate)}") if said else ""
    return join([str(candidate.deployment), " " if badge else "", badge])


def _remarks(field: Field, candidate: Candidate) -> Html:
    parts = ["on the front"] if candidate.deployment in field.front else []
    missed = tag("b", "misses: ", " and ".join(map(str, candidate.misses))) if candidate.misses else ""
    return join([part for part in (missed, *parts, *candidate.notes) if part], "; ")


def _refused(answer: Answer) -> Iterator[Html]:
    """By reason, the most frequent first."""
    by_reason: dict[str, list[Deployment]] = defaultdict(list)
    for deployment, reason in answer.found.rejected:
        by_reason[reason].append(deployment)
    if not by_reason:
        return
    yield tag("h3", "Refused")
    found = sorted(by_reason.items(), key=lambda entry: -len(entry[1]))
    listed = items(
        join([tag("b", reason), " ", tag("span", "; ".join(map(str, which)), class_="note")]) for reason, which in found
    )
    told = f"{plural(len(answer.found.rejected), 'layout')} for {plural(len(found), 'reason')}"
    yield tag("details", tag("summary", told), listed, open=len(answer.found.rejected) <= SHOWN)
