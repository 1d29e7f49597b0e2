"""A placement after a loss: every expert has a home among the living again, and no other expert moves.

A live standby is the next primary. An expert that is left without a copy lands where there is a free slot, or in the
slot of a standby, since a second copy is only a means; beyond the slots where the living are too few for anything else.
Balance has the levels of a placement, the layer before the stage: see `placement`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from serve_app.experts.placement import Pair, Placement, Slots


@dataclass(frozen=True)
class Repair:
    """A placement that names living ranks only, and what is new in it."""

    placement: Placement  # a pair that nobody can host has no ranks
    promoted: list[Pair]  # a live standby became the primary
    landed: dict[Pair, int]  # pair -> the rank that must take its weights now
    uncovered: list[Pair]  # no rank is alive


def repair(
    placement: Placement,
    living: Collection[int],
    slots: Slots,
    nodes: Sequence[str | None] | None = None,
    load: Mapping[Pair, float] | None = None,
) -> Repair:
    """Take the ranks that are not `living` out of a placement, which may have been repaired before.

    Nothing changes where nobody is missing. The living stay within their slots, primary and standby together, as long
    as there are enough of them for one copy of each expert; a rank that was beyond them before gives nothing away.
    `nodes`: by rank, None where unknown; between equals an expert lands on a node that lost no worker. `load`: tokens
    by pair. Raises ValueError where `nodes` are not as many as the ranks.
    """
    assert set(living) <= set(range(placement.num_workers)), f"living {sorted(living)} of {placement.num_workers}"
    before = {
        (layer, expert): hosts
        for layer, table in zip(placement.layers, placement.hosts, strict=True)
        for expert, hosts in enumerate(table)
    }
    homes = {pair: [rank for rank in hosts if rank in living] for pair, hosts in before.items()}
    promoted = [pair for pair, hosts in homes.items() if hosts and hosts[0] != before[pair][0]]
    lost = [pair for pair, hosts in homes.items() if not hosts]
    near = _near_the_lost(placement.num_workers, living, nodes)
    landed = _Living(homes, living, slots, near, load or {}).land(lost) if living else {}
    return Repair(_placement(placement, homes), promoted, landed, [] if living else lost)


def _near_the_lost(num_workers: int, living: Collection[int], nodes: Sequence[str | None] | None) -> set[int]:
    """Living ranks on a node that lost another."""
    known = [None] * num_workers if nodes is None else nodes
    if len(known) != num_workers:
        raise ValueError(f"{len(known)} nodes are named for {num_workers} workers.")
    hurt = {known[rank] for rank in range(num_workers) if rank not in living} - {None}
    return {rank for rank in living if known[rank] in hurt}


def _placement(before: Placement, homes: Mapping[Pair, Sequence[int]]) -> Placement:
    hosts = tuple(
        tuple(tuple(homes[layer, expert]) for expert in range(len(table)))
        for layer, table in zip(before.layers, before.hosts, strict=True)
    )
    return Placement(before.layers, before.num_workers, hosts)


class _Living:
    """What each living rank holds and does, while experts land. `homes` is changed."""

    def __init__(
        self,
        homes: dict[Pair, list[int]],
        living: Collection[int],
        slots: Slots,
        near: Collection[int],
        load: Mapping[Pair, float],
    ) -> None:
        self._homes, self._near = homes, near
        self._num_slots = slots.primary + slots.standby
        # One token more than each has, so that experts without any are spread too.
        self._load = {pair: 1 + load.get(pair, 0) for pair in homes}
        self._num_held = dict.fromkeys(sorted(living), 0)
        self._standbys: dict[int, set[Pair]] = {rank: set() for rank in self._num_held}
        self._loads = dict.fromkeys(self._num_held, 0.0)
        self._layer_loads = {layer: dict.fromkeys(self._num_held, 0.0) for layer, _ in homes}
        for pair, ranks in homes.items():
            self._share(pair, 1)
            for rank in ranks:
                self._num_held[rank] += 1
            for rank in ranks[1:]:
                self._standbys[rank].add(pair)

    def land(self, lost: list[Pair]) -> dict[Pair, int]:
        """Pair -> its new home. Layer after layer, the heaviest first."""
        landed = {}
        for pair in sorted(lost, key=lambda pair: (pair[0], -self._load[pair], pair)):
            rank = min(self._num_held, key=lambda rank: self._cost(pair[0], rank))
            if self._num_held[rank] >= self._num_slots and self._standbys[rank]:
                self._give_up(rank)
            self._homes[pair].append(rank)
            self._num_held[rank] += 1
            self._share(pair, 1)
            landed[pair] = rank
        return landed

    def _cost(self, layer: int, rank: int) -> tuple[int, float, float, bool, int]:
        """Least is best: room before balance, the layer's before the stage's."""
        is_near = rank in self._near
        return self._want_of_room(rank), self._layer_loads[layer][rank], self._loads[rank], is_near, rank

    def _want_of_room(self, rank: int) -> int:
        """0 for a free slot, 1 for that of a standby, and from 2 on how far one more would be beyond the slots."""
        num_beyond = self._num_held[rank] + 1 - self._num_slots
        if num_beyond <= 0:
            return 0
        return 1 if self._standbys[rank] else 1 + num_beyond

    def _give_up(self, rank: int) -> None:
        """Drop the standby here that is missed least: one of many copies, or of few tokens."""
        pair = min(self._standbys[rank], key=lambda pair: (-len(self._homes[pair]), self._load[pair], pair))
        self._share(pair, -1)
        self._homes[pair].remove(rank)
        self._share(pair, 1)
        self._standbys[rank].remove(pair)
        self._num_held[rank] -= 1

    def _share(self, pair: Pair, sign: int) -> None:
        """Count the pair's tokens for the ranks that share them, or take them off."""
        ranks, layer_loads = self._homes[pair], self._layer_loads[pair[0]]
        for rank in ranks:
            layer_loads[rank] += sign * self._load[pair] / len(ranks)
            self._loads[rank] += sign * self._load[pair] / len(ranks)
