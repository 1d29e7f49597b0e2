"""What a cell asks of its cluster, and in words what of it is missing. Numbers in, a sentence out: no Ray."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Amounts = Mapping[str, float]  # by unit: "GPU", "CPU"

LEAST_CPU = 0.001  # of a worker that asks for nothing: Ray's bundles must not be empty
_DIGITS = 4  # Ray counts in ten-thousandths


@dataclass(frozen=True)
class Demand:
    """The groups of a cell: TP groups, or whole replicas. All are alike: a bundle of resources for each worker."""

    num_groups: int
    group_workers: int
    bundle: Amounts  # nothing of it is zero
    on_one_node: bool  # the workers of a group

    @property
    def name(self) -> str:
        return "TP groups" if self.on_one_node else "replicas"

    @property
    def piece(self) -> Amounts:
        """What must fit on one node."""
        return _times(self.bundle, self.group_workers if self.on_one_node else 1)


@dataclass(frozen=True)
class Node:
    """A living node: all it has, and what nobody has reserved."""

    total: Amounts
    free: Amounts


@dataclass(frozen=True)
class Held:
    """What of a demand is there."""

    num_groups: int  # with a place for all of their workers
    num_workers: int  # with a place, those of groups that lost a part of theirs included


def bundle_of(num_cpus: float, num_gpus: float) -> Amounts:
    """What Ray is to reserve for one worker."""
    wanted = {"GPU": num_gpus, "CPU": num_cpus}
    return {unit: amount for unit, amount in wanted.items() if amount} or {"CPU": LEAST_CPU}


def shortage(demand: Demand, held: Held, nodes: list[Node], waited_s: float) -> str:
    """What keeps the groups that have no place from getting one."""
    parts = [
        f"waiting for resources: {held.num_groups} of {demand.num_groups} {demand.name} have their place",
        *(_causes(demand, held, nodes) or ["Ray has not placed the rest yet"]),
        f"{waited_s:.0f} s so far",
    ]
    return "; ".join(parts)


def _causes(demand: Demand, held: Held, nodes: list[Node]) -> list[str]:
    missing = list(_missing(demand, held, nodes))
    too_large = _too_large(demand, nodes)
    if missing or too_large:
        return missing + too_large
    return _scattered(demand, held, nodes)


def _missing(demand: Demand, held: Held, nodes: list[Node]) -> Iterator[str]:
    """The units of which there are too few, wherever they are."""
    for unit, amount in demand.bundle.items():
        needed = amount * demand.num_groups * demand.group_workers
        total = sum(node.total.get(unit, 0.0) for node in nodes)
        free = sum(node.free.get(unit, 0.0) for node in nodes)
        elsewhere = max(0.0, round(total - free - amount * held.num_workers, _DIGITS))
        missing = round(needed - total + elsewhere, _DIGITS)
        if missing > 0:
            others = f", {_number(elsewhere)} of them in use elsewhere" if elsewhere else ""
            verb = "is" if missing <= 1 else "are"
            yield (
                f"{_number(missing)} {unit} {verb} missing"
                f" ({_number(needed)} needed, the cluster has {_number(total)}{others})"
            )


def _too_large(demand: Demand, nodes: list[Node]) -> list[str]:
    """A piece that would not even fit on an empty node. No wait helps, only another node."""
    if any(_num_pieces(demand.piece, node.total) for node in nodes):
        return []
    most = {unit: max((node.total.get(unit, 0.0) for node in nodes), default=0.0) for unit in demand.piece}
    short = [unit for unit, amount in demand.piece.items() if most[unit] < amount]
    if not short:
        return [f"{_needs(demand, demand.piece)}, and no node has all of them"]
    return [
        f"{_needs(demand, {unit: demand.piece[unit]})}, and the largest node has {_number(most[unit])}"
        for unit in short
    ]


def _scattered(demand: Demand, held: Held, nodes: list[Node]) -> list[str]:
    """Enough is free in all, but in crumbs."""
    room = sum(_num_pieces(demand.piece, node.free) for node in nodes)
    if demand.on_one_node:
        waiting = demand.num_groups - held.num_groups
    else:
        waiting = demand.num_groups * demand.group_workers - held.num_workers
    if room >= waiting:
        return []
    return [f"{_needs(demand, demand.piece)}, and there is room for {room} of the {waiting} that have no place"]


def _needs(demand: Demand, amounts: Amounts) -> str:
    who = "a TP group" if demand.on_one_node else "a worker"
    wanted = " and ".join(f"{_number(amount)} {unit}" for unit, amount in amounts.items())
    return f"{who} needs {wanted} on one node"


def _num_pieces(piece: Amounts, available: Amounts) -> int:
    return min(math.floor(round(available.get(unit, 0.0) / amount, _DIGITS)) for unit, amount in piece.items())


def _times(amounts: Amounts, factor: int) -> Amounts:
    return {unit: amount * factor for unit, amount in amounts.items()}


def _number(amount: float) -> str:
    return f"{round(amount, _DIGITS):.10g}"
