"""What a loss takes: each kind beside the others as a table, then one at a time as a map and a timeline."""

from collections.abc import Iterator

from serve_app.plan.answer import Answer
from serve_app.plan.degraded import Kind, State
from serve_app.plan.recovery import budget
from serve_app.plan.report.fates import Taken
from serve_app.plan.report.figures import gb, nines, number, percent, plural, time
from serve_app.plan.report.gpu_map import draw_taken
from serve_app.plan.report.markup import Html, join, section, table, tag
from serve_app.plan.report.pick import MOST as MOST_PICKED
from serve_app.plan.report.pick import picked, told
from serve_app.plan.report.timeline import failover, restore
from serve_app.plan.story import named

NAMES: dict[Kind, str] = {
    "spare": "a spare",
    "gpu": "one GPU",
    "two of a replica": "two GPUs of a replica",
    "two replicas": "two GPUs of two replicas",
    "two cells": "two GPUs of two cells",
    "node": "a node",
}


def lost(answer: Answer, killed: int | None) -> Html:
    """`killed`: a GPU whose loss is shown first."""
    return section(
        "losses",
        "What a loss takes",
        tag(
            "p",
            "Of each kind the worst there is. At once every cell that lost a GPU stands still while its next epoch"
            " forms; then its whole replicas serve again, and the broken ones rest until their seats are filled.",
        ),
        table("Losses", _HEADS, map(_row, answer.losses.states), numbers=range(2, 12)),
        _coverage(answer),
        _choice(answer, killed),
        *_available(answer),
    )


_HEADS = [
    "lost",
    "objective while degraded",
    "GPUs that stop",
    "that rest after",
    "requests/s at once",
    "until filled",
    "TTFT p99",
    "experts lost",
    "with a live copy",
    "beyond the slots",
    "first stream after",
    "all streams after",
]


def _row(state: State) -> list[str]:
    spent = budget(state)
    experts = sum(stage.num_lost for stage in state.homes)
    kept = "✓ kept" if state.keeps_objective else "✕ not kept" if state.is_survivable else "✕ nothing serves"
    return [
        f"{NAMES[state.kind]} ({_gpus(state)})",
        kept,
        number(state.blast_gpus),
        number(state.blast_gpus_after),
        f"{number(state.capacity_at_once)} ({percent(state.share_at_once)})",
        f"{number(state.capacity)} ({percent(state.share)})",
        time(state.degraded.ttft_p99_s.value) if state.is_survivable else "–",
        number(experts),
        number(sum(stage.num_live for stage in state.homes)),
        number(sum(stage.num_beyond for stage in state.homes)),
        time(spent.first_token_s),
        time(spent.all_streams_s),
    ]


def _gpus(state: State) -> str:
    return f"GPU{'s' if len(state.gpus) > 1 else ''} {named(state.gpus)}"


def _coverage(answer: Answer) -> Html:
    found, standby = answer.losses, answer.deployment.standby
    needed = (
        "nobody would be left to hold the experts of a lost worker"
        if found.standby_needed is None
        else f"the loss of one worker of a stage takes {plural(found.standby_needed, 'slot')}"
    )
    return tag(
        "p",
        f"{percent(found.coverage)} of a stage's experts have a live copy. There are {plural(standby, 'standby slot')}"
        f" on each GPU; {needed}.",
    )


# -- one at a time --------------------------------------------------------------------------------------------------


def _choice(answer: Answer, killed: int | None) -> Html:
    """Radio buttons, and of the panels behind them the one that is chosen. On paper all of them."""
    panels = [(NAMES[state.kind], _panel(state)) for state in answer.losses.states]
    if answer.deployment.num_gpus <= MOST_PICKED:
        panels.append(
            ("a GPU that you choose", picked(answer, answer.losses.gpu.gpus[0] if killed is None else killed))
        )
    elif killed is not None:
        panels.append((f"GPU {killed}", told(answer, killed)))
    of_gpu = next(index for index, state in enumerate(answer.losses.states) if state.kind == "gpu")
    first = of_gpu if killed is None else len(panels) - 1
    buttons = (_button(index, name, index == first) for index, (name, _) in enumerate(panels))
    shown = (
        tag("div", tag("h3", f"The loss of {name}", class_="print"), panel, class_=f"panel panel-{index}")
        for index, (name, panel) in enumerate(panels)
    )
    legend = tag("p", tag("b", "Show the loss of"), class_="legend-of", id="loss-of")
    return tag("div", legend, *buttons, *shown, class_="choice", role="group", aria_labelledby="loss-of")


def _button(index: int, name: str, is_first: bool) -> Html:
    button = tag("input", type="radio", name="loss", id=f"loss-{index}", checked=is_first)
    return join([button, tag("label", name, for_=f"loss-{index}", class_="button")])


def _panel(state: State) -> Html:
    spent = budget(state)
    drawn = tag("div", draw_taken(state), Taken(state).told(), class_="taken")
    if not spent.failover:
        return join([tag("p", f"Nobody waits where {_gpus(state)} is lost."), drawn])
    told = tag("p", f"The worst is the loss of {_gpus(state)}.")
    return join([told, drawn, failover(spent), restore(spent), tag("p", *_besides(state), class_="note")])


def _besides(state: State) -> Iterator[str]:
    """What the bars do not say."""
    processes = budget(state, "process")
    yield (
        "Where only the processes die and the GPUs are well, all streams flow again after"
        f" {time(processes.all_streams_s)}, and the capacity is whole after {time(processes.whole_s)}."
    )
    if state.landed_bytes:
        yield f" Survivors load {gb(state.landed_bytes)} of experts, {gb(state.worker_bytes)} the one that loads most."


# -- in the long run ------------------------------------------------------------------------------------------------


def _available(answer: Answer) -> Iterator[Html]:
    found, target = answer.availability, answer.question.workload.objective.availability
    yield tag("h3", "In the long run")
    yield tag(
        "p",
        f"Some GPU fails every {number(found.failure_h)} hours. The objective is kept for ",
        tag("b", nines(found.kept)),
        f" of the time; a failure interrupts it for {time(found.pause_s)}.",
    )
    rows = [
        ["a cell fails over", percent(found.paused), _hours(found.lost_h_month["paused"])],
        ["what is left does not keep it", percent(found.degraded), _hours(found.lost_h_month["degraded"])],
        ["nothing serves", percent(found.standing), _hours(found.lost_h_month["standing"])],
    ]
    heads = ["it is not kept since", "share of the time", "in a month"]
    yield table("Availability", heads, rows, numbers=[1, 2], wide=False)
    if target is not None:
        needed = answer.spares_needed
        keeps = "keeps" if needed == 1 else "keep"
        how_many = "No number of spares keeps" if needed is None else f"{plural(needed, 'spare')} of each cell {keeps}"
        yield tag("p", f"{how_many} it for {100 * target:g} % of the time.")


def _hours(value_h: float) -> str:
    return time(value_h * 3600) if value_h * 3600 >= 1e-3 else "0 s"
