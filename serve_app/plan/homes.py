"""Where the experts of a stage go when workers of its group are lost: slots, copies, and what is beyond both.

What fits is arithmetic, and exact: `experts.repair` keeps the living within their slots as long as there are enough of
them for one copy of each expert, and spreads the rest evenly. Which experts find a live copy depends on the placement.
For groups with few experts it is made and repaired as the cell does it; for others the mean stands in for it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from serve_app.experts.layout import stage_layers
from serve_app.experts.placement import Placement, Slots, place
from serve_app.experts.repair import repair
from serve_app.model.spec import ModelSpec
from serve_app.plan.deployment import Deployment


@dataclass(frozen=True)
class Group:
    """The expert group of one stage: what its placement follows from."""

    layers: range
    num_experts: int  # of a layer
    num_workers: int
    slots: Slots
    nodes: tuple[int, ...]  # by rank

    @property
    def num_pairs(self) -> int:
        return len(self.layers) * self.num_experts

    @property
    def num_copies(self) -> int:
        """Live standbys: as many as there are slots for them, and one on each other worker at most."""
        return min(self.num_workers * self.slots.standby, self.num_pairs * (self.num_workers - 1))

    @property
    def coverage(self) -> float:
        """Share of its experts that have a live standby."""
        return min(1.0, self.num_copies / self.num_pairs)


@dataclass(frozen=True)
class Homes:
    """What becomes of a group's experts after a loss. Numbers of (layer, expert) pairs."""

    num_pairs: int
    num_lost: int  # whose primary was on a lost worker
    num_live: float  # of these: a live standby takes over, at no cost. A mean, if not `is_exact`
    num_beyond: int  # of the others: that find no slot
    num_homeless: int  # of these: that do not fit beside the KV of a single sequence either
    slots_needed: int  # on each worker, for all to have one
    slots_present: int
    most_beyond: int  # on one worker
    most_landed: int  # on one worker: that it must load
    is_exact: bool

    @property
    def num_landed(self) -> float:
        """That a survivor must load."""
        return self.num_lost - self.num_live - self.num_homeless

    @property
    def num_in_slots(self) -> float:
        """Landed in a free slot, or in that of another's standby."""
        return max(0.0, self.num_landed - self.num_doubled)

    @property
    def num_doubled(self) -> int:
        """Landed beyond the slots."""
        return self.num_beyond - self.num_homeless


def slots_needed(num_pairs: int, num_workers: int, num_lost: int) -> int:
    """Slots on each worker of a group, so that all its experts have one after so many are lost.

    Raises ValueError where nobody is left.
    """
    if not 0 <= num_lost < num_workers:
        raise ValueError(f"{num_lost} of {num_workers} workers lost leave nobody to hold experts.")
    return -(-num_pairs // (num_workers - num_lost))


def standby_needed(spec: ModelSpec, deployment: Deployment, num_lost: int) -> int:
    """Slots beyond the primaries, for N - `num_lost` in a stage. Raises ValueError where nobody is left."""
    most = group(spec, deployment, longest_stage(spec, deployment))
    return max(0, slots_needed(most.num_pairs, deployment.ep, num_lost) - most.slots.primary)


def longest_stage(spec: ModelSpec, deployment: Deployment) -> int:
    """The first of those with the most layers."""
    stages = stage_layers(spec.num_layers, deployment.pp)
    return max(range(len(stages)), key=lambda stage: len(stages[stage]))


def group(spec: ModelSpec, deployment: Deployment, stage: int, nodes: tuple[int, ...] = ()) -> Group:
    """`nodes`: by rank; none: each worker on its own."""
    layers = stage_layers(spec.num_layers, deployment.pp)[stage]
    return Group(layers, spec.num_experts, deployment.ep, deployment.slots(spec), nodes or tuple(range(deployment.ep)))


@lru_cache(maxsize=512)
def placed(of: Group) -> Placement:
    """As a cell places them before it has seen any load: copies on nodes of their own, if it can be."""
    nodes = [str(node) for node in of.nodes]
    return place(of.layers, of.num_experts, of.num_workers, of.slots, nodes=nodes)


# -- after a loss ---------------------------------------------------------------------------------------------------


def homes(of: Group, lost: frozenset[int], room_beyond: int, exact_pairs: float) -> Homes:
    """`room_beyond`: experts that one worker can hold beyond its slots. The placement is made and repaired for groups
    of up to `exact_pairs` experts and workers."""
    survivors = of.num_workers - len(lost)
    num_lost = sum(num_dealt(of, rank) for rank in lost)
    present = of.slots.primary + of.slots.standby
    if not survivors:
        return Homes(of.num_pairs, num_lost, 0.0, num_lost, num_lost, 0, present, 0, 0, True)
    is_exact = is_small(of, exact_pairs)
    live, most_landed = _copies(of, lost) if is_exact else _mean_copies(of, num_lost, len(lost))
    beyond = max(0, of.num_pairs - survivors * present)
    least, num_more = divmod(beyond, survivors)
    homeless = num_more * max(0, least + 1 - room_beyond) + (survivors - num_more) * max(0, least - room_beyond)
    return Homes(
        num_pairs=of.num_pairs,
        num_lost=num_lost,
        num_live=live,
        num_beyond=beyond,
        num_homeless=homeless,
        slots_needed=slots_needed(of.num_pairs, of.num_workers, len(lost)),
        slots_present=present,
        most_beyond=min(least + (num_more > 0), room_beyond),
        most_landed=most_landed,
        is_exact=is_exact,
    )


def is_small(of: Group, exact_pairs: float) -> bool:
    """Whether its placement is made, rather than taken for even."""
    return max(of.num_pairs, of.num_workers) <= exact_pairs


def num_dealt(of: Group, rank: int) -> int:
    """Primaries of a worker, over all layers."""
    return _in_turn(of.num_pairs, rank, of.num_workers)


def _in_turn(num: int, rank: int, num_workers: int) -> int:
    """How many of the first `num` pairs are dealt to a rank."""
    return (num - rank + num_workers - 1) // num_workers


@lru_cache(maxsize=2048)
def _copies(of: Group, lost: frozenset[int]) -> tuple[float, int]:
    """(Lost pairs with a live copy, experts that land on the worker that takes most.)"""
    living = [rank for rank in range(of.num_workers) if rank not in lost]
    repaired = repair(placed(of), living, of.slots, [str(node) for node in of.nodes])
    return float(len(repaired.promoted)), max(Counter(repaired.landed.values()).values(), default=0)


def _mean_copies(of: Group, num_lost: int, num_workers_lost: int) -> tuple[float, int]:
    """The same where copies are spread evenly over all other workers."""
    others = of.num_workers - 1
    live = num_lost * of.coverage * (of.num_workers - num_workers_lost) / others if others else 0.0
    return live, math.ceil((num_lost - live) / (of.num_workers - num_workers_lost))


# -- the worst of equals --------------------------------------------------------------------------------------------


def worst_one(of: Group, exact_pairs: float) -> frozenset[int]:
    """The rank whose loss leaves most experts without a copy."""
    ranks = [frozenset([rank]) for rank in range(of.num_workers)]
    return max(ranks, key=_alone(of)) if is_small(of, exact_pairs) else ranks[0]


def worst_two(of: Group, tp: int, exact_pairs: float, *, same_replica: bool) -> frozenset[int] | None:
    """The same of two ranks, of one replica or of two; None where there are no such two."""
    if (tp if same_replica else of.num_workers // tp) < 2:
        return None
    if not is_small(of, exact_pairs):
        return frozenset([0, 1 if same_replica else tp])
    pairs = combinations(range(of.num_workers), 2)
    alike = [frozenset(pair) for pair in pairs if (pair[0] // tp == pair[1] // tp) == same_replica]
    return max(alike, key=_alone(of))


def _alone(of: Group) -> Callable[[frozenset[int]], int]:
    """How many experts only these ranks have, as a function of one or two ranks."""
    holders = Counter(frozenset(ranks) for table in placed(of).hosts for ranks in table)

    def num_alone(ranks: frozenset[int]) -> int:
        return sum(holders[frozenset([rank])] for rank in ranks) + (holders[ranks] if len(ranks) == 2 else 0)

    return num_alone


# -- what tokens meet -----------------------------------------------------------------------------------------------


def hit_share(of: Group, lost: frozenset[int], top_k: int) -> float:
    """Share of tokens one of whose experts in this stage has its primary on a lost worker; uniform routing."""
    missed = 1.0
    for num in _lost_by_layer(of, lost):
        for j in range(top_k):
            missed *= max(0, of.num_experts - num - j) / (of.num_experts - j)
    return 1.0 - missed


def _lost_by_layer(of: Group, lost: frozenset[int]) -> Iterator[int]:
    for i in range(len(of.layers)):
        start, stop = i * of.num_experts, (i + 1) * of.num_experts
        yield sum(_in_turn(stop, rank, of.num_workers) - _in_turn(start, rank, of.num_workers) for rank in lost)
