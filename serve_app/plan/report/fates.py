"""What a loss makes of each GPU."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from serve_app.plan.degraded import CellLoss, State
from serve_app.plan.report.figures import plural
from serve_app.plan.report.markup import Html, items, join, tag
from serve_app.plan.seats import Place, place_of
from serve_app.plan.story import named

LONGEST = 240  # letters of a list of GPUs

Fate = Literal["lost", "rests", "pauses", "serves", "spare"]

FATES: dict[Fate, tuple[str, str]] = {  # of one GPU, of several
    "lost": ("is lost", "are lost"),
    "rests": ("stops, and rests until the seat is filled", "stop, and rest until the seat is filled"),
    "pauses": ("stops, and serves again in the next epoch", "stop, and serve again in the next epoch"),
    "serves": ("serves as if nothing were", "serve as if nothing were"),
    "spare": ("is a spare and has no seat", "are spares and have no seat"),
}


@dataclass(frozen=True)
class Taken:
    """What the loss of some GPUs takes."""

    state: State

    @cached_property
    def _hit(self) -> dict[int, CellLoss]:
        return {cell.cell: cell for cell in self.state.cells}

    @cached_property
    def _lost(self) -> frozenset[int]:
        return frozenset(self.state.gpus)

    def fate(self, place: Place) -> Fate:
        """All of a hit cell stand still; those of broken replicas, or of a cell that waits, until seats are filled."""
        if place.gpu in self._lost:
            return "lost"
        if place.seat is None:
            return "spare"
        if (hit := self._hit.get(place.cell)) is None:
            return "serves"
        is_broken = any(seat.replica == place.seat.replica for seat in hit.seats)
        return "rests" if is_broken or not hit.num_serving(self.state.cost.deployment.dp) else "pauses"

    def fates(self) -> dict[int, Fate]:
        """Of every GPU."""
        cost = self.state.cost
        per_node, num = cost.system.gpus_per_node, cost.deployment.num_gpus
        return {gpu: self.fate(place_of(cost.deployment, per_node, gpu)) for gpu in range(num)}

    def told(self) -> Html:
        """The map in words, which is its legend as well."""
        fates, parts = self.fates(), []
        for fate, (of_one, of_several) in FATES.items():
            if which := [gpu for gpu, its in fates.items() if its == fate]:
                says = f" {of_one if len(which) == 1 else of_several}: {_some(which)}"
                mark = tag("i", class_=f"gpu key {fate}", aria_hidden="true")
                parts.append(join([mark, tag("span", tag("b", plural(len(which), "GPU")), says)]))
        return items(parts, class_="fates")


def _some(gpus: list[int]) -> str:
    """Runs are short, single numbers may be many."""
    text = named(gpus)
    return text if len(text) <= LONGEST else f"{text[: text.rindex(',', 0, LONGEST)]} and others"
