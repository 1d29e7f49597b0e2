"""What each GPU of a deployment holds, and what one lacks that is to take another seat."""

from dataclasses import dataclass, field, replace

from serve_app.experts.layout import Seat, cut, cut_heads, stage_layers
from serve_app.experts.placement import Pair
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision, shared_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost
from serve_app.plan.homes import group, placed
from serve_app.plan.seats import group_nodes

Home = tuple[int, Seat]  # (cell, seat)


@dataclass(frozen=True)
class Kind:
    """All that the experts of a GPU depend on."""

    stage: int
    rank: int
    nodes: tuple[int, ...]  # of its group, counted from the first one's


@dataclass
class Holdings:
    """Of one deployment. Stages, cells and ranks that are alike are looked at once."""

    cost: Cost
    _kinds: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    _pairs: dict[tuple[int, tuple[int, ...]], list[frozenset[Pair]]] = field(default_factory=dict)

    @property
    def deployment(self) -> Deployment:
        return self.cost.deployment

    def kind(self, home: Home) -> Kind:
        cell, seat = home
        nodes = self._kinds.get((cell, seat.stage))
        if nodes is None:
            found = group_nodes(self.deployment, self.cost.system.gpus_per_node, cell, seat.stage)
            nodes = self._kinds[cell, seat.stage] = tuple(node - found[0] for node in found)
        return Kind(seat.stage, self.deployment.layout.group_rank(seat), nodes)

    def pairs(self, kind: Kind) -> frozenset[Pair]:
        """All (layer, expert) of which such a GPU has a copy, primaries and standbys."""
        key = kind.stage, kind.nodes
        if key not in self._pairs:
            self._pairs[key] = self._by_rank(*key)
        return self._pairs[key][kind.rank]

    def _by_rank(self, stage: int, nodes: tuple[int, ...]) -> list[frozenset[Pair]]:
        """Stages of as many layers are placed alike: the placement is made for one of them."""
        of = group(self.cost.spec, self.deployment, stage, nodes)
        found = placed(replace(of, layers=range(len(of.layers))))
        held: list[list[Pair]] = [[] for _ in range(of.num_workers)]
        for layer, table in zip(of.layers, found.hosts, strict=True):
            for expert, ranks in enumerate(table):
                for rank in ranks:
                    held[rank].append((layer, expert))
        return [frozenset(pairs) for pairs in held]

    def dense(self, seat: Seat) -> "Dense":
        return Dense.of(self.cost.spec, self.deployment, seat)


@dataclass(frozen=True)
class Dense:
    """What is no expert, in one seat. Replicas are alike."""

    layers: range
    heads: frozenset[int]
    kv_heads: frozenset[int]
    words: dict[str, range]  # rows of the embedding and of the head; one name where they are tied

    @staticmethod
    def of(spec: ModelSpec, deployment: Deployment, seat: Seat) -> "Dense":
        heads = cut_heads(spec.num_heads, spec.num_kv_heads, deployment.tp, seat.shard)
        names = ["embedding"] if seat.stage == 0 else []
        if seat.stage == deployment.pp - 1:
            names.append("embedding" if spec.tie_embeddings else "head")
        return Dense(
            stage_layers(spec.num_layers, deployment.pp)[seat.stage],
            frozenset(head for head in heads.queries if head is not None),
            frozenset(heads.kv_heads),
            dict.fromkeys(names, cut(spec.vocab_size, deployment.tp, seat.shard)),
        )


def lacking_bytes(spec: ModelSpec, precision: Precision, needed: Dense, had: Dense | None) -> float:
    """Bytes of `needed` that a GPU lacks that had `had`, or nothing at all."""
    had = had or Dense(range(0), frozenset(), frozenset(), {})
    num_new = sum(layer not in had.layers for layer in needed.layers)
    num_old = len(needed.layers) - num_new
    per_head = 2 * spec.hidden_size * spec.head_dim
    num_heads = num_new * (len(needed.heads) + len(needed.kv_heads))
    num_heads += num_old * (len(needed.heads - had.heads) + len(needed.kv_heads - had.kv_heads))
    num_words = 0
    for name, part in needed.words.items():
        same = had.words.get(name, range(0))
        num_words += len(part) - max(0, min(part.stop, same.stop) - max(part.start, same.start))
    params = num_new * _uncut_params(spec) + num_heads * per_head + num_words * spec.hidden_size
    return params * precision.weight_bytes


def _uncut_params(spec: ModelSpec) -> int:
    """Of one layer: what every shard has as a whole."""
    gate = 0 if spec.is_dense else spec.num_experts * spec.hidden_size
    return gate + shared_params(spec) + 2 * spec.hidden_size
