"""All that is shown of a plan, for the terminal and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from serve_app.errors import PlanError
from serve_app.plan.answer import Answer
from serve_app.plan.deployment import Deployment
from serve_app.plan.elastic import Transition
from serve_app.plan.legal import why_not
from serve_app.plan.question import fill_layout
from serve_app.plan.scaling import Row
from serve_app.plan.show import more, tables
from serve_app.plan.show.audited import audit_figures, audit_sentence, audit_table
from serve_app.plan.show.block import block
from serve_app.plan.show.figures import Json, figures
from serve_app.plan.show.paper import lines
from serve_app.plan.story import Story, tell
from serve_app.plan.training import Training, training

if TYPE_CHECKING:  # a pydantic model of each section, which a plan without an audit need not build
    from serve_app.plan.audit import Finding


@dataclass(frozen=True)
class Extras:
    """What is shown on request."""

    kill: int | None = None
    before: str | None = None
    is_training: bool = False
    is_scaling: bool = False
    findings: "Sequence[Finding] | None" = None


@dataclass(frozen=True)
class Shown:
    """What was asked for beside the plan is worked out; `figures` and `parts` work out the rest."""

    answer: Answer
    story: Story | None
    move: tuple[Deployment, Transition] | None
    training: Training | None
    scaling: dict[str, list[Row]] | None
    findings: "Sequence[Finding] | None"

    def figures(self) -> Json:
        """What was not asked for is not there."""
        told = figures(self.answer)
        if self.story is not None:
            told["story"] = more.story_figures(self.story)
        if self.move is not None:
            told["transition"] = more.transition_figures(*self.move)
        if self.training is not None:
            told["training"] = more.training_figures(self.training)
        if self.scaling is not None:
            told["scaling"] = more.scaling_figures(self.scaling)
        if self.findings is not None:
            told["audit"] = audit_figures(self.findings)
        return told

    def parts(self) -> Iterator[RenderableType]:
        """For the terminal, from top to bottom."""
        if self.training is not None:
            yield lines(more.training_lines(self.training, self.answer))
        else:
            yield from self._serving()
        yield from self._on_request()

    def _serving(self) -> Iterator[RenderableType]:
        answer = self.answer
        yield lines(block(answer))
        yield tables.lost(answer)
        yield tables.ranking(answer)
        for remark in tables.remarks(answer):
            yield escape(remark)
        yield ""
        if (rejected := tables.rejected(answer)) is not None:
            yield rejected
        yield tables.operations("A mean prompt on each replica, in one piece through all stages", answer.prompt_ops())
        yield tables.operations("A step of answers under this load, through all stages", answer.decode_ops())

    def _on_request(self) -> Iterator[RenderableType]:
        if self.story is not None:
            yield f"[bold]The loss of GPU {self.story.place.gpu}[/bold]"
            yield from map(escape, tell(self.story))
            yield more.story_table(self.story)
        if self.move is not None:
            yield lines(more.transition_lines(*self.move, self.answer))
            yield ""
        if self.scaling is not None:
            yield from more.scaling_tables(self.scaling)
        if self.findings is not None:
            yield audit_table(self.findings)
            yield escape(audit_sentence(self.findings))


def shown(answer: Answer, extras: Extras) -> Shown:
    """Raises PlanError naming the option that asks for what there is not."""
    return Shown(
        answer,
        story=None if extras.kill is None else _story(answer, extras.kill),
        move=None if extras.before is None else _move(answer, extras.before),
        training=_training(answer) if extras.is_training else None,
        scaling=more.scaling(answer) if extras.is_scaling else None,
        findings=extras.findings,
    )


def _story(answer: Answer, gpu: int) -> Story:
    try:
        return answer.story(gpu)
    except PlanError as error:
        raise PlanError(f"--kill {gpu}: {_plain(error)}") from None


def _move(answer: Answer, text: str) -> tuple[Deployment, Transition]:
    question = answer.question
    before, _ = fill_layout(text, question.spec, question.system.gpus_per_node, option="--from")
    reason = why_not(question.spec, before, question.system.gpus_per_node, across_nodes=True)
    if reason is not None:
        raise PlanError(f"--from {text!r}: {reason.rstrip('.')}")
    made = answer.transition_from(before)
    if not made.before:
        raise PlanError(f"--from {text!r}: {before} serves nothing under this workload, so there is nothing to leave")
    return before, made


def _training(answer: Answer) -> Training:
    question, num = answer.question, answer.question.workload.concurrency
    if num is None:
        raise PlanError("--view training takes --concurrency for the sequences of a step: --rate says nothing of them")
    return _of_batch(answer, num, question.workload.isl.most)


def _of_batch(answer: Answer, batch: int, sequence: int) -> Training:
    question, replicas = answer.question, answer.deployment.num_replicas
    if batch % replicas:
        raise PlanError(
            f"--view training spreads the {batch} sequences of a step evenly over {replicas} replicas: give"
            " --concurrency a multiple of that"
        )
    return training(
        question.spec, question.precision, question.system, answer.deployment, batch=batch, sequence=sequence
    )


def _plain(error: PlanError) -> str:
    return str(error).rstrip(".")
