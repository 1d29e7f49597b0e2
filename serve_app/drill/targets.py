"""Whom a drill strikes, drawn from a seed; and what must be there again before it strikes anew."""

import random
from collections import Counter
from collections.abc import Collection, Sequence

import msgspec

from serve_app.runtime.snapshot import ProcessView

ROLES = ("worker", "router", "engine", "ingress", "node")
_SETTLED = frozenset({"serving", "hosting", "spare", "live"})


class Target(msgspec.Struct, frozen=True):
    """One process; or a node, with those of the cell's processes that are on it."""

    role: str
    name: str
    node: str
    pids: list[int]

    @property
    def pid(self) -> int:
        """0 of a node."""
        return 0 if self.role == "node" else self.pids[0]


def strike_order(roles: Sequence[str], count: int, seed: int) -> list[str]:
    """Each role `count` times, shuffled."""
    order = [role for role in roles for _ in range(count)]
    random.Random(f"order {seed}").shuffle(order)
    return order


def targets(role: str, processes: Sequence[ProcessView], mortal_nodes: Collection[str]) -> list[Target]:
    """All that might be struck in that role. A node is one that hosts workers, and that the cluster can lose."""
    if role != "node":
        return [Target(role, p.name, p.node, [p.pid]) for p in processes if p.role == role]
    hosts = sorted({p.node for p in processes if p.role == "worker" and p.node in mortal_nodes})
    return [Target(role, node[:8], node, [p.pid for p in processes if p.node == node]) for node in hosts]


def census(processes: Sequence[ProcessView]) -> Counter[tuple[str, str]]:
    """How many there are of each role and state; those that are still on their way are left out."""
    return Counter((p.role, p.state) for p in processes if p.state in _SETTLED)
