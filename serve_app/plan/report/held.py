"""What the fullest GPU of a layout holds, by kind, as a bar of its memory."""

from collections.abc import Iterator

from serve_app.plan.answer import Answer
from serve_app.plan.footprint import Footprint
from serve_app.plan.report.candidates import Field
from serve_app.plan.report.figures import gb
from serve_app.plan.report.markup import Html, items, join, section, tag
from serve_app.plan.search import Candidate
from serve_app.plan.system import System

MOST = 6  # layouts that are shown
LETTER = 0.0085  # share of the bar that a letter of a name takes on a wide screen


def parts(held: Footprint) -> list[tuple[str, str, float]]:
    """(class, name, bytes), from what is always there to what comes and goes."""
    return [
        ("runtime", "process", held.runtime_bytes),
        ("dense", "dense weights", held.dense_bytes),
        ("experts", "expert weights", held.experts_bytes),
        ("vocabulary", "vocabulary", held.vocabulary_bytes),
        ("standby", "standby slots", held.standby_bytes),
        ("step", "a step", held.step_bytes),
        ("kv", "KV", held.kv_bytes),
    ]


def memory(answer: Answer) -> Html:
    system = answer.question.system
    field = Field(answer)
    told = (
        f"Of the fullest GPU, under the load that was asked for. The whole bar is {gb(system.memory_gb * 1e9)};"
        f" the line stands at the {100 * system.memory_share:.0f} % of it that may be filled."
        " What is free goes to more KV."
    )
    return section("memory", "Memory", tag("p", told), *(_row(field, one, system) for one in _shown(field)))


def _shown(field: Field) -> list[Candidate]:
    """The chosen one, and the best others."""
    others = [one for one in field.answer.found.candidates if one.deployment != field.answer.deployment]
    return [field.answer.chosen, *others[: MOST - 1]]


def _row(field: Field, candidate: Candidate, system: System) -> Html:
    held, said = candidate.estimate.footprint, field.says(candidate)
    badge = tag("span", said, class_=f"badge {field.role(candidate)}") if said else ""
    room = system.memory_share * system.memory_gb * 1e9
    total = f"{gb(held.total_bytes)} of {gb(room)}"
    return tag(
        "div",
        tag("h3", str(candidate.deployment), " " if badge else "", badge, tag("span", total, class_="total")),
        tag("div", *_bar(held, system), class_="memory", aria_hidden="true"),
        items(_entries(held), class_="legend"),
        class_="held",
    )


def _bar(held: Footprint, system: System) -> Iterator[Html]:
    for kind, name, size in parts(held):
        share = size / (system.memory_gb * 1e9)
        if share > 0:
            label = tag("span", name) if share >= LETTER * (len(name) + 3) else ""
            yield tag("i", label, class_=kind, style=f"width:{100 * share:.3f}%")
    yield tag("b", style=f"left:{100 * system.memory_share:.3f}%")


def _entries(held: Footprint) -> Iterator[Html]:
    for kind, name, size in parts(held):
        if size > 0:
            yield join([tag("i", class_=f"swatch {kind}"), f"{name} {gb(size)}"])
