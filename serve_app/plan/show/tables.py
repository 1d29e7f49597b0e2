"""Tables of a plan: the ranking, what was rejected, the operations of a step, what losses leave."""

from collections.abc import Iterable, Iterator, Sequence

from rich.align import VerticalAlignMethod
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from serve_app.plan.answer import Answer
from serve_app.plan.ops import Op
from serve_app.plan.question import Question
from serve_app.plan.search import Candidate
from serve_app.plan.show import words
from serve_app.plan.show.lost import losses_told

MOST_REASONS, MOST_NAMES = 8, 3


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """The first `left` columns hold words, the others numbers."""
    vertical: VerticalAlignMethod = "bottom" if any("\n" in column for column in columns) else "top"
    made = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(escape(column), justify="left" if index < left else "right", vertical=vertical)
    for row in rows:
        made.add_row(*map(escape, row))
    return made


# -- layouts -----------------------------------------------------------------------------------------------------------


def ranking(answer: Answer) -> Table:
    question, found = answer.question, answer.found
    shown = found.candidates[: question.top]
    return table(
        f"{len(shown)} of {words.num(len(found.candidates), 'layout')}, by {_by(question)}",
        (
            "layout",
            "GPUs",
            "output\ntokens/s\na GPU",
            "TTFT\np99\nms",
            "TPOT\nms",
            "memory\nGB",
            "capacity\nrequests/s",
            "after N-1\nat once",
            "GPUs\nthat\nstop",
            "note",
        ),
        [_row(candidate, notes_of(shown)) for candidate in shown],
    )


def _by(question: Question) -> str:
    if question.num_gpus is None:
        return "the fewest GPUs that carry the load"
    if question.rank == "worst":
        return "capacity in the worst state after the loss of one GPU"
    what = "output tokens/s" if question.workload.rate is None else "capacity"
    return f"{what} with every GPU alive; those within 1 % by GPUs that stop, then by TTFT"


def notes_of(candidates: Sequence[Candidate]) -> list[str]:
    """Each once, in the order they come: a table has their numbers."""
    texts = (text for one in candidates for text in (*one.notes, *(f"misses {miss}" for miss in one.misses)))
    return list(dict.fromkeys(texts))


def _row(candidate: Candidate, notes: list[str]) -> list[str]:
    found, deployment = candidate.estimate, candidate.deployment
    own = [*candidate.notes, *(f"misses {miss}" for miss in candidate.misses)]
    return [
        str(deployment),
        f"{deployment.num_gpus:,}",
        words.digits(found.output_tokens_s_gpu, 4),
        words.digits(found.ttft_p99_s.value * 1e3),
        words.digits(found.tpot_s.value * 1e3),
        words.gb(found.footprint.total_bytes),
        words.digits(found.capacity or 0.0),
        "-" if candidate.worst_capacity is None else words.digits(candidate.worst_capacity),
        f"{deployment.cell_gpus:,}",
        " ".join(str(notes.index(text) + 1) for text in own),
    ]


def remarks(answer: Answer) -> Iterator[str]:
    """Below the ranking: its notes, and who would be first by the other one."""
    for number, text in enumerate(notes_of(answer.found.candidates[: answer.question.top]), start=1):
        yield f"{number}: {text}"
    if answer.found.nearest is not None:
        yield answer.found.nearest
    if (other := answer.first_by_other) is not None:
        yield _other(answer, other)


def _other(answer: Answer, other: Candidate) -> str:
    first = answer.found.candidates[0]
    is_healthy = answer.question.rank == "healthy"
    by = "by the worst survivable state (--rank worst)" if is_healthy else "with every GPU alive (--rank healthy)"
    if other.deployment == first.deployment:
        return f"Ranked {by}, {first.deployment} would be the first as well."
    return f"Ranked {by}, the first would be {other.deployment}: {_both(other)}; {first.deployment} has {_both(first)}."


def _both(candidate: Candidate) -> str:
    whole, worst = candidate.estimate.capacity or 0.0, candidate.worst_capacity
    left = "" if worst is None else f", {words.digits(worst, 4)} right after the loss of a GPU"
    return f"{words.digits(whole, 4)} requests/s{left}"


def rejected(answer: Answer) -> Table | None:
    reasons = answer.rejected_by_reason
    if not reasons:
        return None
    first = list(reasons.items())[:MOST_REASONS]
    more = len(reasons) - len(first)
    return table(
        f"{words.num(len(answer.found.rejected), 'layout')} rejected"
        + (f" for {len(reasons)} reasons, {more} of them not shown" if more else ""),
        ("reason", "such as", "layouts"),
        [(reason, ", ".join(names[:MOST_NAMES]), f"{len(names):,}") for reason, names in first],
        left=2,
    )


# -- operations --------------------------------------------------------------------------------------------------------


def operations(title: str, ops: Sequence[Op]) -> Table:
    total = sum(op.seconds for op in ops) or 1.0
    return table(
        f"{title}: {words.duration(sum(op.seconds for op in ops))}",
        ("operation", "bound by", "ms", "share", "GFLOP", "memory GB", "link GB"),
        [
            (
                op.name,
                op.bound,
                words.digits(op.seconds * 1e3),
                words.percent(op.seconds / total, 1),
                words.digits(op.flops / 1e9) if op.flops else "",
                words.digits(op.memory_bytes / 1e9) if op.memory_bytes else "",
                words.digits(op.link_bytes / 1e9) if op.link_bytes else "",
            )
            for op in ops
        ],
        left=2,
    )


# -- losses ------------------------------------------------------------------------------------------------------------


def lost(answer: Answer) -> Table:
    rows = []
    for loss in losses_told(answer):
        state = loss.state
        degraded = state.degraded if state.is_survivable else None
        rows.append(
            (
                loss.name,
                f"{state.blast_gpus:,}",
                f"{state.blast_gpus_after:,}",
                "-" if loss.slots_needed is None else f"{loss.slots_needed} of {loss.slots_present}",
                words.digits(state.capacity_at_once),
                words.digits(state.capacity),
                "-" if degraded is None else words.digits(degraded.ttft_p99_s.value * 1e3),
                "kept" if state.keeps_objective else "not kept",
                words.duration(loss.budget.all_streams_s),
            )
        )
    return table(
        "After a loss, the worst of each kind",
        (
            "lost",
            "GPUs\nthat\nstop",
            "GPUs\nthat\nrest",
            "slots\nneeded of\npresent",
            "requests/s\nat once",
            "requests/s\nafter",
            "TTFT\np99\nms",
            "objective",
            "all streams\nflow after",
        ),
        rows,
    )
