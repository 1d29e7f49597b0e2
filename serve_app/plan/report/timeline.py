"""How long a loss lasts, phase by phase, as bars that follow each other."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from serve_app.plan.recovery import Budget, Phase
from serve_app.plan.report.figures import gb, time
from serve_app.plan.report.markup import Html, bar, table, tag

MEANING = {
    "notice": "until the loss is known",
    "replace": "until the broken GPU has been replaced",
    "respawn": "until a new worker has started",
    "load weights": "until whoever takes the seat has its weights",
    "form": "until the next epoch has begun",
    "load": "until the survivors have the experts that had no live copy",
    "step": "until the first stream has its next token",
    "re-add": "until the last stream has its next token",
}


def failover(spent: Budget) -> Html:
    """Until all streams flow again."""
    told = f"All streams flow again after {time(spent.all_streams_s)}, the first after {time(spent.first_token_s)}"
    return _table(told, spent.failover)


def restore(spent: Budget) -> Html:
    """Until every seat is filled again."""
    return _table(f"The capacity is whole again after {time(spent.whole_s)}", spent.restore)


def _table(caption: str, phases: Sequence[Phase]) -> Html:
    heads = ["phase", "when", "takes", "what it is"]
    return tag("div", table(caption, heads, _rows(phases), numbers=[2]), class_="timeline")


def _rows(phases: Sequence[Phase]) -> Iterator[list[str]]:
    total_s = sum(phase.seconds for phase in phases) or 1.0
    ends_s = accumulate(phase.seconds for phase in phases)
    for phase, end_s in zip(phases, ends_s, strict=True):
        drawn = bar((end_s - phase.seconds) / total_s, phase.seconds / total_s, "phase")
        loaded = f" ({gb(phase.loaded_bytes)} on one GPU)" if phase.loaded_bytes else ""
        yield [phase.name, drawn, time(phase.seconds), MEANING.get(phase.name, "") + loaded]
