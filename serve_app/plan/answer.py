"""What a planner answers: a deployment, what it is expected to do, and what the loss of a GPU makes of it."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from serve_app.errors import PlanError
from serve_app.plan.admission import bound_tokens, budgets
from serve_app.plan.availability import Availability, availability, spares_needed
from serve_app.plan.bounds import Bounds
from serve_app.plan.counts import Params, count_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.elastic import Transition, transition
from serve_app.plan.estimate import Cost, Estimate
from serve_app.plan.legal import Rejected, why_not
from serve_app.plan.loss import Losses, losses
from serve_app.plan.ops import Op, Step
from serve_app.plan.question import Question
from serve_app.plan.recovery import Budget, budget
from serve_app.plan.search import Candidate, Found, Miss, Rank, Search, check_possible, search
from serve_app.plan.sizing import least_gpus
from serve_app.plan.story import Story, story

_NUMBER = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True)
class Answer:
    """`chosen` is the layout that was named, or the best. `better` is the best where another one was named."""

    question: Question
    found: Found
    chosen: Candidate
    better: Candidate | None

    @property
    def cost(self) -> Cost:
        return self.chosen.cost

    @property
    def deployment(self) -> Deployment:
        return self.chosen.deployment

    @property
    def estimate(self) -> Estimate:
        return self.chosen.estimate

    @cached_property
    def params(self) -> Params:
        return count_params(self.question.spec)

    @cached_property
    def bounds(self) -> Bounds:
        return Bounds(self.question.spec, self.question.precision, self.question.system, self.deployment)

    @cached_property
    def losses(self) -> Losses:
        return losses_of(self.chosen, self.question)

    @cached_property
    def recovery(self) -> Budget:
        """Of one GPU that must be replaced."""
        return budget(self.losses.gpu)

    @cached_property
    def restart(self) -> Budget:
        """Of one worker process that died, on a GPU that is well."""
        return budget(self.losses.gpu, "process")

    @cached_property
    def availability(self) -> Availability:
        return availability(self.losses, self.question.workload, self.estimate)

    @cached_property
    def spares_needed(self) -> int | None:
        """Of each cell, for the availability asked for; None where nothing is asked for, or no number does it."""
        target = self.question.workload.objective.availability
        return None if target is None else spares_needed(self.losses, self.question.workload, self.estimate, target)

    @cached_property
    def budgets(self) -> dict[int, int]:
        """Replicas of a cell that serve -> prompt tokens that may wait in it; empty without a TTFT objective."""
        ttft_s = self.question.workload.objective.ttft_s
        return {} if ttft_s is None else budgets(self.cost, self.question.workload, ttft_s)

    @cached_property
    def bound_tokens(self) -> dict[int, float]:
        """The same, as the hardware allows at most."""
        ttft_s, dp = self.question.workload.objective.ttft_s, self.deployment.dp
        if ttft_s is None:
            return {}
        return {num: bound_tokens(self.cost, self.question.workload, ttft_s, num) for num in range(1, dp + 1)}

    @cached_property
    def first_by_other(self) -> Candidate | None:
        """The best by the ranking that was not asked for. None: the fewest GPUs were looked for, or there is none."""
        if self.question.num_gpus is None or not self.found.candidates:
            return None
        rank: Rank = "worst" if self.question.rank == "healthy" else "healthy"
        of = replace(_search_of(self.question), rank=rank, losses=losses, num_places=1)
        return of.ranked(self.found.candidates)[0]

    @cached_property
    def pareto(self) -> list[Candidate]:
        """The front, each with its losses."""
        return [replace(one, losses=losses_of(one, self.question)) for one in self.found.pareto]

    @property
    def sequences(self) -> int:
        """At a time: those that were asked for, or as many as the rate makes."""
        return self.question.workload.concurrency or max(1, round(self.estimate.concurrency))

    @cached_property
    def rejected_by_reason(self) -> dict[str, list[str]]:
        """Reason -> layouts, the most frequent reason first. Reasons that differ in their numbers only are one."""
        groups: dict[str, list[Rejected]] = defaultdict(list)
        for rejected in self.found.rejected:
            groups[_NUMBER.sub("#", rejected.reason)].append(rejected)
        by_size = sorted(groups.values(), key=lambda group: -len(group))
        return {group[0].reason: [str(one.deployment) for one in group] for group in by_size}

    def prompt_ops(self) -> list[Op]:
        """Of the mean prompt, alone."""
        return self.cost.breakdown(Step.prompt(self.question.workload.isl.mean, sampled=1.0))

    def decode_ops(self) -> list[Op]:
        """Of a step of answers, under the load that was asked for."""
        rows = self.estimate.concurrency / self.deployment.num_replicas / self.deployment.pp
        return self.cost.breakdown(Step.decode(max(1.0, rows), self.question.workload.mean_tokens))

    def story(self, gpu: int) -> Story:
        """Raises PlanError for a GPU that there is not."""
        return story(self.cost, self.question.workload, self.estimate, gpu)

    def transition_from(self, before: Deployment) -> Transition:
        """From another deployment to this one."""
        return transition(replace(self.cost, deployment=before), self.cost, self.question.workload)


def answer(question: Question) -> Answer:
    """Raises PlanError where no deployment fits, or none keeps the objective: then it says what the nearest misses.

    One that is named is told about all the same.
    """
    found = _search(question)
    is_named = question.layout is not None and "--layout" not in dict(question.assumed)
    if found.nearest is not None and not is_named:
        raise PlanError(found.nearest.rstrip("."))
    named = None if question.layout is None else _named(question, question.layout)
    best = found.candidates[0] if found.candidates else None
    chosen = named or best
    if chosen is None:
        raise PlanError((found.nearest or "no layout fits").rstrip("."))
    better = None
    if named is not None and best is not None and best.deployment != named.deployment:
        better = best
    return Answer(question, found, chosen, better)


def losses_of(candidate: Candidate, question: Question) -> Losses:
    """As the search has worked them out, or now."""
    if candidate.losses is not None:
        return cast(Losses, candidate.losses)
    return losses(candidate.cost, question.workload, candidate.estimate)


def _search(question: Question) -> Found:
    rank, checks = cast(Rank, question.rank), _checks(question)
    if question.num_gpus is None:
        return least_gpus(
            question.spec,
            question.precision,
            question.system,
            question.workload,
            standby=question.standby,
            rank=rank,
            losses=losses,
            checks=checks,
            across_nodes=question.across_nodes,
        )
    return search(
        question.spec,
        question.precision,
        question.system,
        question.workload,
        question.num_gpus,
        standby=question.standby,
        spares=question.spares,
        strict=question.strict,
        rank=rank,
        losses=losses,
        checks=checks,
        num_places=max(10, question.top),
        across_nodes=question.across_nodes,
    )


def _named(question: Question, layout: Deployment) -> Candidate:
    """PlanError with the reason where it cannot be."""
    reason = why_not(question.spec, layout, question.system.gpus_per_node, across_nodes=question.across_nodes)
    if reason is not None:
        raise PlanError(f"--layout {layout}: {reason.rstrip('.')}")
    check_possible(question.spec, question.precision, question.system, question.workload)
    standby = layout.standby if question.layout_says_standby else None
    found = replace(_search_of(question), standby=standby).candidate(layout)
    if isinstance(found, Rejected):
        raise PlanError(f"--layout {layout}: {found.reason.rstrip('.')}")
    return found


def _search_of(question: Question) -> Search:
    return Search(
        question.spec,
        question.precision,
        question.system,
        question.workload,
        question.standby,
        checks=_checks(question),
    )


def _checks(question: Question) -> Sequence[Callable[[Candidate], Sequence[Miss]]]:
    """The objectives that take the losses of each candidate to be worked out: only where they are asked for."""
    objective = question.workload.objective

    def recovery(candidate: Candidate) -> Sequence[Miss]:
        took_s = budget(losses_of(candidate, question).gpu).all_streams_s
        limit_s = cast(float, objective.recovery_s)
        return [Miss("recovery", took_s, limit_s, "s")] if took_s > limit_s else []

    def available(candidate: Candidate) -> Sequence[Miss]:
        kept = availability(losses_of(candidate, question), question.workload, candidate.estimate).kept
        limit = cast(float, objective.availability)
        return [Miss("availability", 100 * kept, 100 * limit, "%")] if kept < limit else []

    checks: list[Callable[[Candidate], Sequence[Miss]]] = []
    if objective.recovery_s is not None:
        checks.append(recovery)
    if objective.availability is not None:
        checks.append(available)
    return checks
