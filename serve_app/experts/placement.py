"""Which workers of a stage's expert group hold which (layer, expert)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """The primaries of one stage. `primaries[i][expert]` is the rank, in the expert group, for layer `layers[i]`."""

    layers: range
    num_workers: int
    primaries: tuple[tuple[int, ...], ...]

    def table(self, layer: int) -> tuple[int, ...]:
        """expert -> rank. Raises ValueError for a layer of another stage."""
        return self.primaries[self.layers.index(layer)]


def place(layers: range, num_experts: int, num_workers: int) -> Placement:
    """Spread the experts evenly: each worker's share differs by at most one, in every layer and over the stage.

    All (layer, expert) pairs are dealt out in turn, so that a layer goes on where the one before it stopped and what
    does not divide evenly falls on another worker each time. Raises ValueError for sizes below one.
    """
    if num_experts < 1 or num_workers < 1:
        raise ValueError(f"num_experts={num_experts} and num_workers={num_workers} must both be at least 1.")
    primaries = tuple(
        tuple((i * num_experts + expert) % num_workers for expert in range(num_experts)) for i in range(len(layers))
    )
    return Placement(layers, num_workers, primaries)
