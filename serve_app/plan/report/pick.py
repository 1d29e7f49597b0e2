"""The loss of a GPU that the reader chooses in the map: radio buttons and style rules, no script."""

from collections.abc import Iterator

from serve_app.plan.answer import Answer
from serve_app.plan.report.fates import FATES, Fate, Taken
from serve_app.plan.report.figures import number, percent, time
from serve_app.plan.report.gpu_map import draw, draw_taken, where
from serve_app.plan.report.markup import Html, items, join, table, tag
from serve_app.plan.report.style import LOOKS
from serve_app.plan.report.timeline import failover
from serve_app.plan.seats import Place
from serve_app.plan.story import Moment, Story, tell

MOST = 64  # GPUs to choose from


def picked(answer: Answer, first: int) -> Html:
    """A map whose GPUs are the buttons; behind each its story. `first`: the one that is chosen before anybody does."""
    stories = [answer.story(gpu) for gpu in range(answer.deployment.num_gpus)]
    buttons = (
        tag("input", type="radio", name="gpu", id=f"gpu-{gpu}", checked=gpu == first, aria_label=f"GPU {gpu}")
        for gpu in range(len(stories))
    )
    return tag(
        "div",
        tag("style", Html("".join(_rules(stories)))),
        tag("p", "Choose a GPU in the map, or with the arrow keys."),
        *buttons,
        tag("div", draw(stories[0].state, _label), _legend(stories), class_="taken"),
        tag("div", *(tag("div", _story(story), class_=f"story story-{gpu}") for gpu, story in enumerate(stories))),
        class_="pick",
    )


def told(answer: Answer, gpu: int) -> Html:
    """The same of one GPU, where there are too many to choose from."""
    story = answer.story(gpu)
    return join([tag("div", draw_taken(story.state), Taken(story.state).told(), class_="taken"), _story(story)])


def _label(place: Place) -> Html:
    replica = "" if place.seat is None else f" of-{place.cell}-{place.seat.replica}"
    cell = f" in-{place.cell}" if place.seat is not None else " spare"
    gpu = place.gpu
    return tag("label", str(gpu), for_=f"gpu-{gpu}", class_=f"gpu gpu-{gpu}{cell}{replica}", title=where(place))


def _legend(stories: list[Story]) -> Html:
    seen = {fate for story in stories for fate in Taken(story.state).fates().values()}
    return items(
        (
            join([tag("i", class_=f"gpu key {fate}", aria_hidden="true"), tag("span", says)])
            for fate, (says, _) in FATES.items()
            if fate in seen
        ),
        class_="fates",
    )


# -- rules of style -------------------------------------------------------------------------------------------------


def _rules(stories: list[Story]) -> Iterator[str]:
    """What is said later counts where two say something of the same GPU."""
    by_fate: dict[Fate, list[str]] = {"serves": [".pick .map .gpu"], "pauses": [], "rests": [], "lost": []}
    if stories[0].state.cost.deployment.spares:
        by_fate["spare"] = [".pick .map .gpu.spare"]
    for gpu, story in enumerate(stories):
        chosen = f"#gpu-{gpu}:checked~.taken "
        by_fate["lost"].append(f"{chosen}.gpu-{gpu}")
        for cell in story.state.cells:
            by_fate["pauses"].append(f"{chosen}.in-{cell.cell}")
            rests = {f".of-{cell.cell}-{seat.replica}" for seat in cell.seats}
            if not cell.num_serving(story.state.cost.deployment.dp):
                rests = {f".in-{cell.cell}"}
            by_fate["rests"] += [chosen + which for which in sorted(rests)]
    for fate in ("serves", "spare", "pauses", "rests", "lost"):
        if selectors := by_fate.get(fate):
            style, sign = LOOKS[fate]
            yield f"{','.join(selectors)}{{{style}}}\n"
            yield f'{",".join(f"{selector}::before" for selector in selectors)}{{content:"{sign}"}}\n'
    yield f"{','.join(f'#gpu-{gpu}:checked~div>.story-{gpu}' for gpu in range(len(stories)))}{{display:block}}\n"
    focused = ",".join(f"#gpu-{gpu}:focus-visible~.taken .gpu-{gpu}" for gpu in range(len(stories)))
    yield f"{focused}{{outline:3px solid var(--accent);outline-offset:1px}}\n"


# -- the story ------------------------------------------------------------------------------------------------------


def _story(story: Story) -> Html:
    return join(
        [
            tag("div", *(tag("p", sentence) for sentence in tell(story)), class_="told"),
            failover(story.budget) if story.budget.failover else "",
            _moments(story),
        ]
    )


def _ttft(moment: Moment) -> str:
    """Nobody is served, or nobody knows how soon those of other cells are."""
    if moment.ttft_s is not None:
        return time(moment.ttft_s)
    return "–" if moment.capacity else "they wait"


def _moments(story: Story) -> Html:
    heads = ["from", "what", "requests/s", "TTFT mean", "what is the case"]
    rows = [
        [
            time(moment.at_s),
            moment.name,
            f"{number(moment.capacity)} ({percent(moment.capacity_share)})",
            _ttft(moment),
            moment.text,
        ]
        for moment in story.moments
    ]
    return table("What is the case when", heads, rows, numbers=[2, 3])
