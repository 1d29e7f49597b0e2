"""The states after a loss, one row each: what the tables and the JSON say of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.plan.answer import Answer
from serve_app.plan.degraded import State
from serve_app.plan.recovery import Budget, budget

NAMES = {
    "spare": "a spare GPU",
    "gpu": "one GPU (N-1)",
    "two of a replica": "two GPUs of a replica (N-2)",
    "two replicas": "two GPUs of two replicas (N-2)",
    "two cells": "two GPUs of two cells (N-2)",
    "node": "a node",
}


@dataclass(frozen=True)
class Loss:
    state: State
    budget: Budget  # where the hardware is broken, and must be replaced

    @property
    def name(self) -> str:
        return NAMES[self.state.kind]

    @property
    def slots_needed(self) -> int | None:
        """On each GPU of the fullest expert group; None: nobody is left in it, or nothing was lost."""
        return max((stage.slots_needed for stage in self.state.homes), default=0) or None

    @property
    def slots_present(self) -> int | None:
        return max((stage.slots_present for stage in self.state.homes), default=None)


def losses_told(answer: Answer) -> Iterator[Loss]:
    for state in answer.losses.states:
        yield Loss(state, budget(state))
