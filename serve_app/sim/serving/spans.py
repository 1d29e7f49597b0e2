"""What each worker did when, for a picture of the pipeline."""

from typing import NamedTuple

from serve_app.sim.serving.pipelines import Flight


class Span(NamedTuple):
    """Something that took time, in a row of its own kind. Seconds of the run."""

    row: str
    name: str
    begin_s: float
    end_s: float


class Spans:
    """Keeps the first `most` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.spans: list[Span] = []

    def add(self, row: str, name: str, begin_s: float, end_s: float) -> None:
        if len(self.spans) < self._most:
            self.spans.append(Span(row, name, begin_s, end_s))

    def step(self, cell: int, flight: Flight, now_s: float) -> None:
        """A step leaves a stage: named by its number, prompt tokens and rows of answers."""
        work, plan = flight.work, flight.plan
        row = f"cell {cell} replica {plan.replica} stage {flight.stage}"
        self.add(row, f"step {plan.step}: {work.prompt_tokens} + {work.decode_rows}", flight.begun_s, now_s)
