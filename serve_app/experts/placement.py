"""Which workers of a stage's expert group hold which (layer, expert): the primaries, and their live standbys.

Balance has two levels, the layer before the stage. A layer is a synchronous step: the tokens in it wait for its slowest
worker, and what that worker is spared in another layer does not give the time back. So each layer is split evenly by
itself first. The stage is next: replicas are in different layers at a time, so that a worker's work adds up over all
layers, and its memory, the slots, is counted over all of them. What is uneven in one layer is therefore given to the
workers that had least in the layers before.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True)
class Slots:
    """Experts that one worker has room for. Raises ValueError for no primary or a negative number of standbys."""

    primary: int
    standby: int

    def __post_init__(self) -> None:
        if self.primary < 1:
            raise ValueError(f"primary slots must be at least 1, not {self.primary}.")
        if self.standby < 0:
            raise ValueError(f"standby slots must be at least 0, not {self.standby}.")


@dataclass(frozen=True)
class Placement:
    """The homes of one stage's experts: `hosts[i][expert]` are ranks in the expert group, for layer `layers[i]`.

    The first of them is the primary. `load` below is tokens by (layer, expert); a pair that it lacks has none.
    """

    layers: range
    num_workers: int
    hosts: tuple[tuple[tuple[int, ...], ...], ...]

    def table(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """expert -> ranks, the primary first. Raises ValueError for a layer of another stage."""
        return self.hosts[self.layers.index(layer)]

    def held(self, rank: int) -> list[Pair]:
        """Pairs whose primary is this worker."""
        return [pair for pair, ranks in self._homes() if ranks[:1] == (rank,)]

    def standbys(self, rank: int) -> list[Pair]:
        """Pairs of which this worker has a standby copy."""
        return [pair for pair, ranks in self._homes() if rank in ranks[1:]]

    def loads(self, load: Mapping[Pair, float]) -> list[float]:
        """Tokens by rank, where the copies of an expert share its tokens evenly."""
        loads = [0.0] * self.num_workers
        for pair, ranks in self._homes():
            for rank in ranks:
                loads[rank] += load.get(pair, 0) / len(ranks)
        return loads

    def imbalance(self, load: Mapping[Pair, float]) -> float:
        """Tokens of the busiest worker over their mean; 1.0 where there are none."""
        return max_over_mean(self.loads(load))

    def _homes(self) -> Iterator[tuple[Pair, tuple[int, ...]]]:
        for layer, table in zip(self.layers, self.hosts, strict=True):
            for expert, ranks in enumerate(table):
                yield (layer, expert), ranks


def place(
    layers: range,
    num_experts: int,
    num_workers: int,
    slots: Slots | None = None,
    load: Mapping[Pair, float] | None = None,
    nodes: Sequence[str | None] | None = None,
) -> Placement:
    """Primaries spread evenly, and standby slots given to the experts whose loss or load would hurt most.

    In each layer, and over the stage, the numbers of primaries per worker differ by at most one; within that the load
    is balanced (see `_balance`). Without `load` the pairs are dealt out in turn, so that a layer goes on where the one
    before it stopped and what does not divide evenly falls on another worker each time. The result is never less
    balanced for `load` than the one without it.

    `slots`: None is just enough primary slots, no standbys. `load`: tokens by pair, those of other stages are passed
    over. `nodes`: by rank, None where unknown. Raises ValueError for sizes below one, and for too few slots.
    """
    needed = primaries_per_worker(len(layers), num_experts, num_workers)
    slots = slots or Slots(needed, 0)
    if slots.primary < needed:
        raise ValueError(
            f"{len(layers)} layers x {num_experts} experts need {needed} primary slots"
            f" on each of {num_workers} workers, there are {slots.primary}."
        )
    known = _nodes_of(nodes, num_workers)
    dealt = _deal(len(layers), num_experts, num_workers)
    evenly = {(layer, expert): 1.0 for layer in layers for expert in range(num_experts)}
    blind = _Copies(layers, dealt, slots.standby, evenly, known).fill()
    tokens = {pair: float(load.get(pair, 0)) for pair in evenly} if load else {}
    if not any(tokens.values()):
        return blind
    balanced = _balance(layers, num_experts, num_workers, tokens)
    informed = _Copies(layers, balanced, slots.standby, tokens, known).fill()
    return informed if informed.imbalance(tokens) <= blind.imbalance(tokens) else blind


def primaries_per_worker(num_layers: int, num_experts: int, num_workers: int) -> int:
    """The primary slots that each worker of a stage needs. Raises ValueError for sizes below one."""
    if min(num_layers, num_experts, num_workers) < 1:
        raise ValueError(
            f"num_layers={num_layers}, num_experts={num_experts} and num_workers={num_workers} must all be at least 1."
        )
    return -(-num_layers * num_experts // num_workers)


def max_over_mean(loads: Sequence[float]) -> float:
    """How many times the mean the greatest is: 1.0 is even, and what nothing at all counts as."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def _nodes_of(nodes: Sequence[str | None] | None, num_workers: int) -> list[str | int]:
    """What a copy is to be kept apart from: its node by rank, or the worker alone where that is not known."""
    if nodes is None:
        return list(range(num_workers))
    if len(nodes) != num_workers:
        raise ValueError(f"{len(nodes)} nodes are named for {num_workers} workers.")
    return [rank if node is None else node for rank, node in enumerate(nodes)]


# -- primaries: [i][expert] -> rank ---------------------------------------------------------------------------------


def _deal(num_layers: int, num_experts: int, num_workers: int) -> list[list[int]]:
    return [[(i * num_experts + expert) % num_workers for expert in range(num_experts)] for i in range(num_layers)]


def _balance(layers: range, num_experts: int, num_workers: int, load: Mapping[Pair, float]) -> list[list[int]]:
    """Split each layer into shares as equal as can be, and give the heavy ones to those with little so far."""
    num_held, loads = [0] * num_workers, [0.0] * num_workers
    num_larger = num_experts % num_workers  # shares with one expert more than the others
    primaries = []
    for layer in layers:
        shares = _split([load[layer, expert] for expert in range(num_experts)], num_workers)
        larger = set(sorted(range(num_workers), key=lambda rank: (num_held[rank], loads[rank]))[:num_larger])
        ranks = sorted(range(num_workers), key=lambda rank: (rank not in larger, loads[rank]))
        table = [0] * num_experts
        for rank, share in zip(ranks, shares, strict=True):
            for expert in share:
                table[expert] = rank
                loads[rank] += load[layer, expert]
            num_held[rank] += len(share)
        primaries.append(table)
    return primaries


def _split(loads: list[float], num_shares: int) -> list[list[int]]:
    """Experts of one layer in shares whose sizes differ by at most one: the larger ones first, then the heavy ones.

    Heaviest expert first, to the lightest share with room: LPT (Graham 1969) under a limit on numbers.
    """
    least, num_larger = divmod(len(loads), num_shares)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    weights = [0.0] * num_shares
    for expert in sorted(range(len(loads)), key=lambda expert: -loads[expert]):
        limit = least + (num_larger > 0)
        i = min((i for i in range(num_shares) if len(shares[i]) < limit), key=lambda i: weights[i])
        shares[i].append(expert)
        weights[i] += loads[expert]
        num_larger -= len(shares[i]) > least
    return [shares[i] for i in sorted(range(num_shares), key=lambda i: (-len(shares[i]), -weights[i]))]


# -- standbys -------------------------------------------------------------------------------------------------------


class _Copies:
    """All copies of a stage's experts, while the standby slots are given out one by one."""

    def __init__(
        self,
        layers: range,
        primaries: list[list[int]],
        num_standby: int,
        load: Mapping[Pair, float],
        nodes: list[str | int],
    ) -> None:
        self._layers, self._load, self._nodes = layers, load, nodes
        self._copies = {
            (layer, expert): [rank]
            for layer, table in zip(layers, primaries, strict=True)
            for expert, rank in enumerate(table)
        }
        self._num_free = dict.fromkeys(range(len(nodes)), num_standby) if num_standby else {}
        self._num_covered: Counter[int] = Counter()  # by primary: pairs that have a standby
        self._num_copies: Counter[int] = Counter()  # by layer
        self._layer_loads = {layer: [0.0] * len(nodes) for layer in layers}
        self._loads = [0.0] * len(nodes)
        for pair in self._copies:
            self._share(pair, 1)

    def fill(self) -> Placement:
        """Give a slot to the most urgent pair until no slot is free, or none of those can take any."""
        queue = [(self._urgency(pair), pair) for pair in self._copies]
        heapq.heapify(queue)
        while queue and self._num_free:
            urgency, pair = heapq.heappop(queue)
            if urgency == (urgency_now := self._urgency(pair)):
                rank = self._room_for(pair)
                if rank is None:  # and there never will be: free slots only become fewer
                    continue
                self._give(pair, rank)
                urgency_now = self._urgency(pair)
            heapq.heappush(queue, (urgency_now, pair))
        return self._placement()

    def _urgency(self, pair: Pair) -> tuple[float, int, int, int]:
        """Least is first. It only grows as slots are given out, which is what lets the queue be a heap.

        Tokens per copy decide. Where they are the same, or not known, no worker's loss is to hurt more than another's.
        """
        ranks = self._copies[pair]
        return -self._load[pair] / len(ranks), len(ranks), self._num_covered[ranks[0]], self._num_copies[pair[0]]

    def _room_for(self, pair: Pair) -> int | None:
        """The least loaded worker that can take a copy, on a node that has none if there is one."""
        ranks = self._copies[pair]
        able = [rank for rank in self._num_free if rank not in ranks]
        taken = {self._nodes[rank] for rank in ranks}
        apart = [rank for rank in able if self._nodes[rank] not in taken]
        layer_loads = self._layer_loads[pair[0]]
        return min(apart or able, key=lambda rank: (layer_loads[rank], self._loads[rank], rank), default=None)

    def _give(self, pair: Pair, rank: int) -> None:
        ranks = self._copies[pair]
        self._num_covered[ranks[0]] += len(ranks) == 1
        self._num_copies[pair[0]] += 1
        self._share(pair, -1)
        ranks.append(rank)
        self._share(pair, 1)
        self._num_free[rank] -= 1
        if not self._num_free[rank]:
            del self._num_free[rank]

    def _share(self, pair: Pair, sign: int) -> None:
        """Count the pair's tokens for the workers that share them, or take them off."""
        ranks, layer_loads = self._copies[pair], self._layer_loads[pair[0]]
        for rank in ranks:
            layer_loads[rank] += sign * self._load[pair] / len(ranks)
            self._loads[rank] += sign * self._load[pair] / len(ranks)

    def _placement(self) -> Placement:
        num_experts = len(self._copies) // len(self._layers)
        hosts = tuple(
            tuple(tuple(self._copies[layer, expert]) for expert in range(num_experts)) for layer in self._layers
        )
        return Placement(self._layers, len(self._nodes), hosts)
